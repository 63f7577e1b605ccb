"""Losses, weights, masks and their order equal the published numbers."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from tests.helpers import golden
from tuner.core.config import LossConfig
from tuner.core.flow import elementwise_loss, huber_threshold, loss_weight, min_snr_weight, reduce_loss
from tuner.core.flow.losses import huber, smooth_l1
from tuner.core.flow.weights import SIGMA_FLOOR

LOSSES = golden("core/losses.json")
DATA = golden("core/losses.safetensors")
WEIGHTS = golden("core/loss_weights.json")
SAMPLERS = golden("anima/timestep_samplers.safetensors")
ONES = torch.ones(6)

LATER = {"debiased", "soft_min_snr_simpletuner", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss"}
"""Kinds of weight in the table of noise-prediction models that come later, or that no flow model has."""
INFORMATION = {"snr_schedule_with_flow_scheduler", "simpletuner_flow_snr_reference_quirk"}


def config_of(case: dict) -> LossConfig:
    keys = {"type": case["loss_type"]}
    if case["huber_schedule"] is not None:
        keys |= {"huber_c": case["huber_c"], "huber_schedule": case["huber_schedule"]}
        if case["huber_schedule"] != "snr":
            keys["huber_scale"] = case["huber_scale"]
    return LossConfig(**keys)


def sigmas_of(case: dict) -> torch.Tensor:
    return DATA[f"timesteps_{case['timesteps'] or 'int'}"].float() / 1000


def elementwise_of(case: dict) -> torch.Tensor:
    if case["huber_schedule"] != "snr":
        return elementwise_loss(config_of(case), DATA["pred"], DATA["target"], sigmas_of(case))
    # the reference's snr thresholds come from a noise-prediction schedule; the loss around them is the same
    function = huber if case["loss_type"] == "huber" else smooth_l1
    return function(DATA["pred"] - DATA["target"], torch.tensor(case["threshold"]).view(-1, 1, 1, 1))


@pytest.mark.parametrize(
    "case",
    LOSSES["cases"],
    ids=lambda c: f"{c['loss_type']}-{c['huber_schedule']}-{c['huber_c']}-{c['huber_scale']}-{c['timesteps']}",
)
def test_a_loss_case_equals_the_reference(case: dict) -> None:
    elementwise = elementwise_of(case)
    if case["threshold"] is not None and case["huber_schedule"] != "snr":
        torch.testing.assert_close(
            huber_threshold(config_of(case), sigmas_of(case)), torch.tensor(case["threshold"]), rtol=1e-5, atol=0
        )
    config = LossConfig()
    plain = reduce_loss(elementwise, weight=ONES, mask=None, sample_weight=ONES, loss_cfg=config)
    masked = reduce_loss(elementwise, weight=ONES, mask=DATA["mask_latent"], sample_weight=ONES, loss_cfg=config)
    weighted = reduce_loss(elementwise, weight=ONES, mask=None, sample_weight=DATA["sample_weights"], loss_cfg=config)
    both = reduce_loss(
        elementwise, weight=ONES, mask=DATA["mask_latent"], sample_weight=DATA["sample_weights"], loss_cfg=config
    )
    near = {"rtol": 1e-5, "atol": 1e-9}
    torch.testing.assert_close(plain, torch.tensor(case["per_sample"]), **near)
    torch.testing.assert_close(masked, torch.tensor(case["per_sample_masked"]), **near)
    assert plain.mean().item() == pytest.approx(case["mean"], rel=1e-5)
    assert elementwise.sum().item() == pytest.approx(case["sum"], rel=1e-5)
    assert weighted.mean().item() == pytest.approx(case["weighted_mean"], rel=1e-5)
    assert both.mean().item() == pytest.approx(case["masked_weighted_mean"], rel=1e-5)


@pytest.mark.parametrize("name", sorted(name for name in DATA if name.startswith("elementwise.")))
def test_the_loss_of_every_element_equals_the_reference(name: str) -> None:
    kind, _, schedule = name.removeprefix("elementwise.").partition(".")
    stored = {"loss_type": kind, "huber_schedule": schedule or None}
    cases = [case for case in LOSSES["cases"] if stored.items() <= case.items()]
    # several thresholds share a name; the mean tells which case the elements are of
    [case] = [case for case in cases if DATA[name].mean().item() == pytest.approx(case["mean"], rel=1e-6)][:1]
    torch.testing.assert_close(elementwise_of(case), DATA[name], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("row", LOSSES["flow_snr_closed_form"], ids=lambda row: f"c={row['huber_c']}")
def test_the_snr_threshold_of_flow_models_equals_the_closed_form(row: dict) -> None:
    config = LossConfig(type="huber", huber_schedule="snr", huber_c=row["huber_c"])
    got = huber_threshold(config, torch.tensor(row["sigma"]))
    torch.testing.assert_close(got, torch.tensor(row["threshold"]), rtol=1e-5, atol=1e-7)


def test_only_information_is_left_out_of_the_loss_tables() -> None:
    assert set(LOSSES) == {"inputs", "cases", "flow_snr_closed_form"} | INFORMATION
    assert set(WEIGHTS) == {"flow_weighting_scheme", "flow_min_snr_closed_form", "ddpm", "ddpm_weights"}
    assert {row["kind"] for row in WEIGHTS["ddpm_weights"]} == {"min_snr"} | LATER


@pytest.mark.parametrize("row", WEIGHTS["flow_weighting_scheme"], ids=lambda row: row["scheme"])
def test_a_weighting_equals_the_reference(row: dict) -> None:
    # the reference also accepts the names of densities here, where they mean no weight
    scheme = "none" if row["scheme"] in ("logit_normal", "mode") else row["scheme"]
    got = loss_weight(LossConfig(weighting=scheme), torch.tensor(row["sigma"]))
    torch.testing.assert_close(got, torch.tensor(row["weight"]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", sorted(name for name in SAMPLERS if ".weight." in name))
def test_the_weight_of_a_sampler_case_equals_the_reference(case: str) -> None:
    sampler, _, scheme = case.rpartition(".weight.")
    got = loss_weight(LossConfig(weighting=scheme), SAMPLERS[f"{sampler}.sigmas"])
    torch.testing.assert_close(got, SAMPLERS[case], rtol=1e-5, atol=0)


@pytest.mark.parametrize("row", WEIGHTS["flow_min_snr_closed_form"], ids=lambda row: f"gamma={row['gamma']}")
def test_min_snr_equals_the_closed_form(row: dict) -> None:
    table = torch.tensor(row["rows"], dtype=torch.float64).float()
    sigmas, noise_target, velocity_target = table[:, 0], table[:, 2], table[:, 3]
    torch.testing.assert_close(min_snr_weight(sigmas, row["gamma"], "noise"), noise_target, rtol=1e-5, atol=0)
    got = loss_weight(LossConfig(min_snr_gamma=row["gamma"]), sigmas)
    torch.testing.assert_close(got, velocity_target, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "row",
    [row for row in WEIGHTS["ddpm_weights"] if row["kind"] == "min_snr"],
    ids=lambda row: f"gamma={row['gamma']} velocity={row['v_prediction']}",
)
def test_min_snr_is_the_same_function_of_the_ratio_as_for_noise_prediction(row: dict) -> None:
    # the sigma of a flow model with the signal-to-noise ratio of that schedule
    sigmas = 1 / (1 + torch.tensor(WEIGHTS["ddpm"]["snr"], dtype=torch.float64).sqrt())
    got = min_snr_weight(sigmas, row["gamma"], "velocity" if row["v_prediction"] else "noise")
    torch.testing.assert_close(got, torch.tensor(row["weight"], dtype=torch.float64), rtol=1e-5, atol=0)


def test_weights_are_finite_at_both_ends() -> None:
    ends = torch.tensor([0.0, 1.0])
    assert loss_weight(LossConfig(weighting="sigma_sqrt"), ends)[0].item() == pytest.approx(SIGMA_FLOOR**-2)
    for config in (LossConfig(weighting="cosmap"), LossConfig(min_snr_gamma=5.0)):
        assert bool(torch.isfinite(loss_weight(config, ends)).all())


def test_min_snr_multiplies_the_weighting() -> None:
    sigmas = torch.linspace(0.1, 0.9, 5)
    got = loss_weight(LossConfig(weighting="cosmap", min_snr_gamma=5.0), sigmas)
    torch.testing.assert_close(got, loss_weight(LossConfig(weighting="cosmap"), sigmas) * min_snr_weight(sigmas, 5.0))


def test_comparing_clean_latents_is_the_velocity_error_times_sigma() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, noise, pred = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(3))
    sigmas = torch.tensor([0.25, 0.75])
    share = sigmas.view(2, 1, 1, 1)
    noisy = (1 - share) * latents + share * noise
    implied = noisy - share * pred
    for kind in ("l2", "l1", "huber"):
        config = LossConfig(type=kind, target="clean")
        got = elementwise_loss(config, pred, noise - latents, sigmas)
        expected = elementwise_loss(LossConfig(type=kind), implied, latents, sigmas)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_predictions_are_compared_in_float32() -> None:
    pred, target = torch.full((1, 1, 1, 1), 1.0).bfloat16(), torch.full((1, 1, 1, 1), 0.001)
    got = elementwise_loss(LossConfig(), pred, target, torch.tensor([0.5]))
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(0.998001)


def test_the_order_is_weight_then_mask_then_mean_then_sample_weight() -> None:
    elementwise = torch.ones(2, 3, 2, 2)
    mask = torch.zeros(2, 1, 2, 2)
    mask[0, 0, 0, 0] = 1.0
    got = reduce_loss(
        elementwise,
        weight=torch.tensor([2.0, 2.0]),
        mask=mask,
        sample_weight=torch.tensor([10.0, 1.0]),
        loss_cfg=LossConfig(),
    )
    assert got.tolist() == [5.0, 0.0]


def test_a_normalised_mask_averages_over_the_masked_area_and_is_zero_for_an_empty_one() -> None:
    elementwise = torch.full((2, 3, 2, 2), 4.0)
    mask = torch.zeros(2, 1, 2, 2)
    mask[0, 0, 0, 0] = 0.5
    config = LossConfig(mask={"normalise": True})
    got = reduce_loss(elementwise, weight=torch.ones(2), mask=mask, sample_weight=torch.ones(2), loss_cfg=config)
    assert got.tolist() == [4.0, 0.0]


def test_the_floor_raises_masked_out_pixels() -> None:
    config = LossConfig(mask={"floor": 0.25})
    mask = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    got = reduce_loss(
        torch.ones(1, 1, 1, 2), weight=torch.ones(1), mask=mask, sample_weight=torch.ones(1), loss_cfg=config
    )
    assert got.item() == pytest.approx(0.625)


def test_the_probability_spares_samples_whose_draw_reaches_it() -> None:
    config = LossConfig(mask={"probability": 0.5})
    mask = torch.zeros(2, 1, 2, 2)
    keys = {"weight": torch.ones(2), "mask": mask, "sample_weight": torch.ones(2), "loss_cfg": config}
    got = reduce_loss(torch.ones(2, 1, 2, 2), **keys, mask_chance=torch.tensor([0.49, 0.5]))
    assert got.tolist() == [0.0, 1.0]


def test_a_disabled_mask_and_a_mask_of_ones_give_the_plain_loss() -> None:
    elementwise = DATA["elementwise.l2"]
    keys = {"weight": ONES, "sample_weight": ONES}
    plain = reduce_loss(elementwise, **keys, mask=None, loss_cfg=LossConfig())
    off = reduce_loss(elementwise, **keys, mask=DATA["mask_latent"], loss_cfg=LossConfig(mask={"enabled": False}))
    neutral = reduce_loss(elementwise, **keys, mask=torch.ones(6, 1, 8, 8), loss_cfg=LossConfig())
    assert torch.equal(plain, off)
    assert torch.equal(plain, neutral)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"huber_c": 0.2}, "huber_c is not used by type 'l2'"),
        ({"type": "l1", "huber_schedule": "snr"}, "huber_schedule is not used"),
        ({"type": "huber", "huber_schedule": "snr", "huber_scale": 2.0}, "huber_scale is not used"),
    ],
)
def test_a_key_that_would_do_nothing_is_refused(keys: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LossConfig(**keys)
