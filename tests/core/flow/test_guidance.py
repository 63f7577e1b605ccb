"""Guided targets equal the published numbers, gradients included; neutral scales change nothing at all."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from tests.helpers import golden
from tuner.core.config import GuidanceConfig, GuidanceDistill
from tuner.core.flow import differential_target, guided_target, zero_star_share

DATA = golden("anima/guidance_targets.safetensors")
PREDICTION, TARGET, UNCONDITIONAL = DATA["model_pred"], DATA["target"], DATA["uncond_pred"]
SCALE, DIFFERENTIAL = float(DATA["guidance_scale"]), float(DATA["differential_scale"])


@pytest.mark.parametrize(
    ("name", "zero_star", "distill", "differential"),
    [
        ("target_guidance", False, True, False),
        ("target_guidance_cfg_zero", True, True, False),
        ("target_differential", False, False, True),
        ("target_guidance_then_differential", False, True, True),
        ("target_cfg_zero_then_differential", True, True, True),
    ],
)
def test_targets_are_the_published_ones(name: str, zero_star: bool, distill: bool, differential: bool) -> None:
    config = GuidanceConfig(
        distill=GuidanceDistill(scale=SCALE, zero_star=zero_star) if distill else None,
        differential=DIFFERENTIAL if differential else None,
    )
    found = guided_target(config, TARGET, PREDICTION, UNCONDITIONAL)
    torch.testing.assert_close(found, DATA[name], rtol=0, atol=1e-5)


def test_the_share_of_the_unconditional_is_the_published_one() -> None:
    torch.testing.assert_close(zero_star_share(TARGET, UNCONDITIONAL), DATA["cfg_zero_alpha"], rtol=0, atol=1e-5)


def test_differential_guidance_squares_the_loss_and_scales_the_gradient() -> None:
    prediction = PREDICTION.clone().requires_grad_()
    plain = ((prediction - TARGET) ** 2).mean()
    [plain_grad] = torch.autograd.grad(plain, prediction)
    sharper = ((prediction - differential_target(TARGET, prediction, DIFFERENTIAL)) ** 2).mean()
    [grad] = torch.autograd.grad(sharper, prediction)
    torch.testing.assert_close(plain, DATA["loss_plain"])
    torch.testing.assert_close(sharper, DATA["loss_differential"])
    torch.testing.assert_close(grad, DATA["grad_differential"], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(grad, DIFFERENTIAL * plain_grad, rtol=1e-4, atol=1e-9)


def test_scales_of_one_give_the_very_same_target() -> None:
    neutral = GuidanceConfig(distill=GuidanceDistill(scale=1), differential=1)
    assert guided_target(neutral, TARGET, PREDICTION, UNCONDITIONAL) is TARGET
    assert guided_target(GuidanceConfig(), TARGET, PREDICTION, None) is TARGET


@pytest.mark.parametrize("key", ["zero_star", "batched"])
def test_a_setting_of_an_idle_distillation_is_refused(key: str) -> None:
    with pytest.raises(ValidationError, match=f"{key} has no effect with scale 1"):
        GuidanceDistill(scale=1, **{key: True})
