"""Noise levels, prediction types and the preview schedule against kohya-ss/sd-scripts (tests/golden/flux)."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.helpers import golden, golden_path
from tests.plugins.flux.golden_models import golden_case, golden_denoiser, run
from tuner.core.config import LossConfig, NoiseConfig
from tuner.core.files import safetensors_header
from tuner.core.flow import (
    apply_cfg,
    elementwise_loss,
    euler_sample,
    euler_sigmas,
    loss_weight,
    rectified_flow,
    resolution_mu,
    shift_value,
    sigmas_from_draws,
)
from tuner.plugins.flux.denoiser import pack, unpack

GOLDEN = "flux/objective.safetensors"
CASES = json.loads(safetensors_header(golden_path(GOLDEN)).metadata["cases"])
GRID = (4, 6)


def noise_config(case: dict[str, object]) -> NoiseConfig:
    """The settings of a recorded case in our names."""
    ours: dict[str, object] = {"timesteps": case.get("timestep_sampling", "sigma")}
    if "weighting_scheme" in case:
        ours |= {"density": case["weighting_scheme"]}
    ours |= {name: case[name] for name in ("logit_mean", "logit_std", "mode_scale", "sigmoid_scale") if name in case}
    if ours["timesteps"] in ("sigma", "shift"):
        ours["shift"] = case.get("discrete_flow_shift", 3.0)
    return NoiseConfig.model_validate(ours)


@pytest.mark.parametrize("name", CASES)
def test_noise_levels_and_noisy_latents_agree_for_every_way_of_drawing(name):
    data = golden(GOLDEN)
    latents, noise = data["latents"], data["noise"]
    sigmas = sigmas_from_draws(
        noise_config(CASES[name]),
        normal=data["normal_draws"],
        uniform=data["uniform_draws"],
        latent_hw=(latents.shape[2], latents.shape[3]),
    )
    torch.testing.assert_close(sigmas, data[f"{name}.sigmas"], rtol=1e-6, atol=1e-7)
    assert (1000 * sigmas - data[f"{name}.timesteps"]).abs().max() < 2e-4
    shaken = noise + CASES[name].get("ip_noise_gamma", 0.0) * data["ip_noise"]
    noisy = rectified_flow(latents, shaken, data[f"{name}.sigmas"]).noisy
    torch.testing.assert_close(noisy, data[f"{name}.noisy"], rtol=0, atol=1e-6)


def test_the_target_is_noise_less_latents_whatever_disturbs_the_input():
    data = golden(GOLDEN)
    target = rectified_flow(data["latents"], data["noise"], data["shift.sigmas"]).target
    torch.testing.assert_close(target, data["target"], rtol=0, atol=1e-6)


def test_prediction_types_agree_and_the_scaled_one_is_compared_with_the_latents():
    data = golden(GOLDEN)
    sigmas, noisy, output = data["shift.sigmas"], data["shift.noisy"], data["model_pred"]
    assert torch.equal(output, data["pred.raw"])
    torch.testing.assert_close(output + noisy, data["pred.additive"], rtol=0, atol=1e-6)
    estimate = noisy - sigmas[:, None, None, None] * output
    torch.testing.assert_close(estimate, data["pred.sigma_scaled"], rtol=0, atol=1e-6)
    loss = elementwise_loss(LossConfig(target="clean"), output, data["target"], sigmas)
    torch.testing.assert_close(loss, (data["pred.sigma_scaled"] - data["latents"]) ** 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighting", ["uniform", "cosmap", "sigma_sqrt"])
def test_loss_weights_agree(weighting):
    data = golden(GOLDEN)
    weight = loss_weight(LossConfig(weighting=weighting), data["shift.sigmas"])
    torch.testing.assert_close(weight, data[f"weight.{weighting}"], rtol=1e-6, atol=0)


def test_limits_of_the_timestep_are_honoured():
    data = golden(GOLDEN)
    config = NoiseConfig(timesteps="flux_shift", min_timestep=200, max_timestep=600)
    sigmas = sigmas_from_draws(
        config, normal=3 * data["normal_draws"], uniform=data["uniform_draws"], latent_hw=(128, 128)
    )
    assert float(sigmas.min()) >= 0.2 and float(sigmas.max()) <= 0.6


def test_the_shift_grows_with_the_picture():
    data = golden("flux/schedule.safetensors")
    sides = {256: 32, 1024: 64, 4096: 128}
    for length, value in zip(data["mu.seqlen"].tolist(), data["mu.value"].tolist(), strict=True):
        side = sides[int(length)]
        assert resolution_mu((side, side)) == pytest.approx(value, abs=1e-6)
        assert shift_value("auto", (side, side)) == pytest.approx(math.exp(value), rel=1e-6)


@pytest.mark.parametrize("steps", [4, 20])
def test_preview_schedules_agree_with_and_without_shift(steps):
    data = golden("flux/schedule.safetensors")
    torch.testing.assert_close(euler_sigmas(steps, 1.0), data[f"noshift.steps{steps}"], rtol=1e-6, atol=1e-7)
    for length, side in ((256, 32), (1024, 64), (4096, 128)):
        shifted = euler_sigmas(steps, shift_value("auto", (side, side)))
        torch.testing.assert_close(shifted, data[f"shift.steps{steps}.seq{length}"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("scale", "name"), [(1.0, "traj.out"), (2.0, "traj.out_cfg2")])
@torch.no_grad()
def test_a_sampled_trajectory_agrees(scale, name):
    data = golden("flux/schedule.safetensors")
    case, _ = golden_case("forward_0")
    denoiser = golden_denoiser()

    def velocity(latents: torch.Tensor, sigmas: torch.Tensor, sample: int) -> torch.Tensor:
        one = {key: value[sample : sample + 1] for key, value in case.items() if key in ("txt", "y")}
        one |= {"img": pack(latents), "timesteps": sigmas, "guidance": torch.tensor([3.5])}
        return unpack(run(denoiser, one, GRID), GRID)

    def predict(latents: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        positive = velocity(latents, sigmas, 0)
        return positive if scale == 1 else apply_cfg(positive, velocity(latents, sigmas, 1), scale)

    out = euler_sample(predict, unpack(data["traj.x_init"], GRID), data["traj.timesteps"])
    assert (pack(out) - data[name]).abs().max() < 2e-5
