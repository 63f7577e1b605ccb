"""Noise levels from given draws equal the published formulas, and every key of ``noise`` acts."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from tests.helpers import golden
from tuner.core.config import NoiseConfig
from tuner.core.flow import resolution_mu, sigmas_from_draws, stratify
from tuner.core.types import NoiseDefaults

TIMESTEPS = golden("core/timesteps.json")
SAMPLERS = golden("anima/timestep_samplers.safetensors")
NORMAL = torch.tensor(TIMESTEPS["injected_normal"])
UNIFORM = torch.tensor(TIMESTEPS["injected_uniform"])
HW = (64, 64)

LATER = {"bias_weights"}
"""Tables of the timestep file whose feature comes later."""


def sigmas(hw: tuple[int, int] = HW, normal=NORMAL, uniform=UNIFORM, **keys) -> torch.Tensor:
    return sigmas_from_draws(NoiseConfig(**keys), normal=normal, uniform=uniform, latent_hw=hw)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("row", [row for row in TIMESTEPS["sampling"] if row["family"] == "flux_anima"], ids=str)
def test_a_named_schedule_equals_the_reference(row: dict) -> None:
    name = row["timestep_sampling"]
    keys = {"timesteps": name}
    if name != "uniform":
        keys["sigmoid_scale"] = row["sigmoid_scale"]
    if name == "shift":  # the reference reads its shift in this mode only
        keys["shift"] = row["discrete_flow_shift"]
    close(sigmas((row["latent_h"], row["latent_w"]), **keys), torch.tensor(row["sigmas"]))


@pytest.mark.parametrize("row", [row for row in TIMESTEPS["sampling"] if row["family"] == "sd3"], ids=str)
def test_a_density_with_shift_and_range_equals_the_reference_before_it_truncates(row: dict) -> None:
    density = row["weighting_scheme"]
    keys = {"timesteps": "uniform" if density == "none" else density, "shift": row["training_shift"]}
    keys |= {key: row[key] for key in ("min_timestep", "max_timestep") if key in row}
    if density == "logit_normal":
        keys |= {"logit_mean": row["logit_mean"], "logit_std": row["logit_std"]}
    if density == "mode":
        keys |= {"mode_scale": row["mode_scale"]}
    whole = torch.floor(sigmas(**keys) * 1000 + 1e-3)
    assert whole.tolist() == row["timesteps"]


@pytest.mark.parametrize("case", sorted(name[: -len(".sigmas")] for name in SAMPLERS if name.endswith(".sigmas")))
def test_a_sampler_case_equals_the_reference(case: str) -> None:
    name, *rest = case.split("_")
    numbers = {part.rstrip("0123456789."): part.lstrip("abcdefghijklmnopqrstuvwxyz") for part in rest}
    hw = HW
    if case == "uniform":
        keys = {"timesteps": "uniform"}
    elif case.startswith("flux_shift"):
        hw = tuple(int(side) for side in case.rsplit("_", 1)[1].split("x"))
        keys = {"timesteps": "flux_shift"}
    elif case.startswith("sigma_"):
        density = case[len("sigma_") :].rsplit("_", 1)[0]
        keys = {"timesteps": "sigma", "shift": float(numbers["shift"])}
        if density != "none":
            keys["density"] = density
        if density == "logit_normal":
            keys |= {"logit_mean": 0.3, "logit_std": 0.9}
    elif name.startswith("shift"):
        keys = {"timesteps": "shift", "shift": float(name[len("shift") :]), "sigmoid_scale": float(numbers["scale"])}
    else:
        keys = {"timesteps": "sigmoid", "sigmoid_scale": float(numbers["scale"])}
    got = sigmas(hw, normal=SAMPLERS["normal"], uniform=SAMPLERS["uniform"], **keys)
    close(got, SAMPLERS[f"{case}.sigmas"])
    close(got, SAMPLERS[f"{case}.t_model"])


@pytest.mark.parametrize("row", TIMESTEPS["simpletuner_shift"], ids=str)
def test_a_fixed_and_the_automatic_shift_equal_the_reference(row: dict) -> None:
    shift = "auto" if row["auto"] else row["flow_schedule_shift"]
    values = torch.tensor(row["sigma_in"])
    got = sigmas((row["latent_h"], row["latent_w"]), normal=values, uniform=values, timesteps="uniform", shift=shift)
    close(got, torch.tensor(row["sigma_out"]))


def test_only_the_tables_of_later_features_are_left_out() -> None:
    covered = {"injected_normal", "injected_uniform", "sampling", "simpletuner_shift", "validation_timesteps"}
    assert set(TIMESTEPS) == covered | LATER


def test_flux_shift_is_shift_with_the_automatic_value() -> None:
    close(sigmas((96, 160), timesteps="flux_shift"), sigmas((96, 160), timesteps="shift", shift="auto"))
    assert resolution_mu((32, 32)) == 0.5
    assert resolution_mu((128, 128)) == pytest.approx(1.15)


@pytest.mark.parametrize(
    "keys",
    [
        {"timesteps": "sigmoid"},
        {"timesteps": "shift", "shift": 3.0},
        {"timesteps": "flux_shift"},
        {"timesteps": "sigma", "density": "mode"},
        {"timesteps": "beta"},
    ],
    ids=lambda keys: keys["timesteps"],
)
def test_the_range_is_an_affine_map_of_sigma_for_every_schedule(keys: dict) -> None:
    close(sigmas(**keys, min_timestep=200, max_timestep=600), 0.2 + 0.4 * sigmas(**keys))


@pytest.mark.parametrize("timesteps", ["uniform", "sigmoid", "shift", "flux_shift", "sigma", "mode", "beta"])
def test_extreme_draws_stay_inside_zero_and_one(timesteps: str) -> None:
    got = sigmas(normal=torch.tensor([-60.0, 60.0]), uniform=torch.tensor([0.0, 1.0 - 2**-24]), timesteps=timesteps)
    assert bool(((got >= 0) & (got <= 1)).all())
    assert got.dtype == torch.float32


def test_a_density_position_of_exactly_one_takes_the_last_table_entry() -> None:
    got = sigmas(normal=torch.tensor([60.0]), uniform=torch.zeros(1), timesteps="sigma", density="logit_normal")
    close(got, torch.tensor([0.001]))


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 2.0), (0.6, 0.6), (3.0, 1.0)])
def test_beta_draws_have_the_moments_of_the_beta_distribution(alpha: float, beta: float) -> None:
    grid = (torch.arange(20000) + 0.5) / 20000
    got = sigmas(normal=grid, uniform=grid, timesteps="beta", beta=(alpha, beta)).double()
    total = alpha + beta
    assert got.mean().item() == pytest.approx(alpha / total, abs=2e-4)
    assert got.var().item() == pytest.approx(alpha * beta / (total**2 * (total + 1)), abs=2e-4)


def test_stratified_draws_put_one_sample_into_each_segment() -> None:
    generator = torch.Generator().manual_seed(3)
    normal, uniform = torch.randn(8, generator=generator), torch.rand(8, generator=generator)
    normal, uniform = stratify(normal, uniform)
    got = sigmas(normal=normal, uniform=uniform, timesteps="uniform")
    assert sorted((got * 8).long().tolist()) == list(range(8))
    assert got.tolist() != sorted(got.tolist())
    bent = sigmas(normal=normal, uniform=uniform, timesteps="sigmoid")
    quantiles = torch.special.ndtr(torch.logit(bent.double()))
    assert sorted((quantiles * 8).long().tolist()) == list(range(8))


def test_stratifying_one_sample_changes_only_which_draw_is_used() -> None:
    normal, uniform = torch.tensor([1.5]), torch.tensor([0.25])
    assert sigmas(normal=normal, uniform=uniform, timesteps="uniform", stratified=True).item() == 0.25


def test_a_batch_split_after_stratifying_gives_the_same_sigmas() -> None:
    generator = torch.Generator().manual_seed(5)
    normal, uniform = stratify(torch.randn(4, generator=generator), torch.rand(4, generator=generator))
    config = NoiseConfig(timesteps="shift", shift=2.0, stratified=True)
    whole = sigmas_from_draws(config, normal=normal, uniform=uniform, latent_hw=HW)
    parts = [
        sigmas_from_draws(config, normal=n, uniform=u, latent_hw=HW)
        for n, u in zip(normal.split(2), uniform.split(2), strict=True)
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_the_models_defaults_fill_what_the_file_leaves_out() -> None:
    defaults = NoiseDefaults(timesteps="shift", shift=3.0)
    assert NoiseConfig().resolved(defaults).shift == 3.0
    assert NoiseConfig(shift=2.0).resolved(defaults).shift == 2.0
    other = NoiseConfig(timesteps="uniform").resolved(defaults)
    assert (other.timesteps, other.shift) == ("uniform", None)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"timesteps": "sigmoid", "shift": 3.0}, "use timesteps 'shift'"),
        ({"timesteps": "flux_shift", "shift": 3.0}, "shift is not used by timesteps 'flux_shift'"),
        ({"timesteps": "uniform", "sigmoid_scale": 2.0}, "sigmoid_scale is not used"),
        ({"timesteps": "sigma", "logit_mean": 1.0}, "logit_mean is not used"),
        ({"timesteps": "mode", "density": "mode"}, "density is not used"),
        ({"min_timestep": 500, "max_timestep": 500}, "min_timestep must be below"),
    ],
)
def test_a_key_that_would_do_nothing_is_refused(keys: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        NoiseConfig(**keys)


def test_validation_timesteps_of_the_reference_divide_the_range_evenly() -> None:
    for row in TIMESTEPS["validation_timesteps"]:
        low, high, count = row["min_timestep"], row["max_timestep"], row["count"]
        inner = [math.floor(low + (high - low) * index / (count + 1)) for index in range(1, count + 1)]
        assert inner == row["timesteps"]
