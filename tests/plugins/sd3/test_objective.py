"""The objective with the defaults of this family, against recorded draws, and the schedule of the previews."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from tests.helpers import golden, golden_path
from tuner.core.config import LossConfig, NoiseConfig
from tuner.core.flow import elementwise_loss, euler_sigmas, loss_weight, rectified_flow, reduce_loss, sigmas_from_draws

FILE = "sd3/objective.safetensors"
with safe_open(golden_path(FILE), framework="pt") as opened:
    CASES = json.loads(opened.metadata()["cases"])


def configs(settings: dict) -> tuple[NoiseConfig, LossConfig]:
    scheme = settings.get("weighting_scheme", "uniform")
    density = scheme if scheme in ("logit_normal", "mode") else "uniform"
    names = ("logit_mean", "logit_std", "mode_scale", "min_timestep", "max_timestep")
    noise = {name: settings[name] for name in names if name in settings}
    shift = settings.get("training_shift")
    noise |= {} if shift is None else {"shift": shift}
    weighting = scheme if scheme in ("cosmap", "sigma_sqrt") else "uniform"
    return NoiseConfig(timesteps=density, truncate=True, **noise), LossConfig(weighting=weighting, target="clean")


@pytest.mark.parametrize("name", CASES)
def test_draws_become_the_recorded_timesteps_weights_and_losses(name):
    data = golden(FILE)
    noise, loss = configs(CASES[name])
    sigmas = sigmas_from_draws(noise, normal=data["normal_draws"], uniform=data["uniform_draws"], latent_hw=(6, 8))
    assert torch.equal((sigmas * 1000).round(), data[f"{name}.timesteps"])
    torch.testing.assert_close(sigmas, data[f"{name}.sigmas"], rtol=1e-6, atol=0)
    flow = rectified_flow(data["latents"], data["noise"], sigmas)
    torch.testing.assert_close(flow.noisy, data[f"{name}.noisy"], rtol=1e-6, atol=1e-6)
    weight = loss_weight(loss, sigmas)
    torch.testing.assert_close(weight, data[f"{name}.weight"], rtol=1e-6, atol=0)
    losses = reduce_loss(
        elementwise_loss(loss, data["model_pred"], flow.target, sigmas),
        weight=weight, mask=None, sample_weight=torch.ones_like(sigmas), loss_cfg=loss,
    )  # fmt: skip
    torch.testing.assert_close(losses, data[f"{name}.loss_per_sample"], rtol=1e-5, atol=0)
    clean = flow.noisy - sigmas[:, None, None, None] * data["model_pred"]
    torch.testing.assert_close(clean, data[f"{name}.x0_pred"], rtol=1e-5, atol=1e-5)


def test_the_clean_loss_is_the_velocity_loss_times_sigma_squared():
    data = golden(FILE)
    sigmas = data["uniform.sigmas"]
    velocity = data["noise"] - data["latents"]
    clean, plain = (
        elementwise_loss(LossConfig(target=target), data["model_pred"], velocity, sigmas)
        for target in ("clean", "velocity")
    )
    torch.testing.assert_close(clean, plain * sigmas[:, None, None, None] ** 2, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weighting", ("none", "uniform", "sigma_sqrt", "cosmap"))
@pytest.mark.parametrize("target", ("clean", "velocity"))
@pytest.mark.parametrize("truncate", (True, False))
def test_no_weighting_is_lost_at_the_ends(weighting, target, truncate):
    loss = LossConfig(weighting=weighting, target=target)
    noise = NoiseConfig(timesteps="uniform", truncate=truncate)
    ends = torch.tensor([0.0, 0.00001, 0.9999999])
    sigmas = sigmas_from_draws(noise, normal=torch.zeros(3), uniform=ends, latent_hw=(8, 8))
    prediction, wanted = torch.randn(2, 3, 4, 8, 8)
    losses = elementwise_loss(loss, prediction.requires_grad_(), wanted, sigmas).mean(dim=(1, 2, 3))
    total = (losses * loss_weight(loss, sigmas)).sum()
    total.backward()
    assert torch.isfinite(total) and torch.isfinite(prediction.grad).all()


def test_the_schedule_of_the_previews_is_the_recorded_one():
    recorded = golden("sd3/sampler_and_pos_embed.safetensors")
    for key in (key for key in recorded if key.startswith("sigmas.")):
        shift, steps = key.removeprefix("sigmas.shift").split(".steps")
        made = euler_sigmas(int(steps), float(shift), "table")
        torch.testing.assert_close(made, recorded[key], rtol=1e-6, atol=1e-7)
