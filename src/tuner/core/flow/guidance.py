"""Guidance inside the training target: classifier-free guidance distilled into the prediction, and its sharpening.

All functions are per element on [B,C,h,w] velocities and return float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tuner.core.flow.objective import per_sample

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.core.config import GuidanceConfig

EPSILON = 1e-8


def guided_target(guidance: GuidanceConfig, target: Tensor, prediction: Tensor, unconditional: Tensor | None) -> Tensor:
    """What the loss compares ``prediction`` with: ``target`` after ``distill``, then after ``differential``.

    unconditional: the model's prediction for the empty caption; None when ``distill`` is off. No gradient flows through
    the result. A scale of 1 changes nothing, and then ``target`` itself comes back.
    """
    if guidance.distill is not None and unconditional is not None:
        target = distilled_target(target, unconditional, guidance.distill.scale, zero_star=guidance.distill.zero_star)
    if guidance.differential is not None:
        target = differential_target(target, prediction, guidance.differential)
    return target


def distilled_target(target: Tensor, unconditional: Tensor, scale: float, *, zero_star: bool = False) -> Tensor:
    """u + scale*(target - u) with u the unconditional prediction; ``zero_star`` first scales u by its share in target.

    The model learns to give at once what guidance of this strength would give. Formula: the guidance loss of
    ostris/ai-toolkit.
    """
    if scale == 1.0:
        return target
    target, base = target.to(torch.float32), unconditional.detach().to(torch.float32)
    if zero_star:
        base = per_sample(zero_star_share(target, base), base) * base
    return base + scale * (target - base)


def zero_star_share(target: Tensor, unconditional: Tensor) -> Tensor:
    """<target, u> / (||u||**2 + 1e-8) per sample [B]: the least-squares factor of CFG-Zero* (Fan et al. 2025)."""
    target, base = target.flatten(1).to(torch.float32), unconditional.flatten(1).to(torch.float32)
    return (target * base).sum(dim=1) / ((base * base).sum(dim=1) + EPSILON)


def differential_target(target: Tensor, prediction: Tensor, scale: float) -> Tensor:
    """p + scale*(target - p) with the prediction p held constant.

    The squared error is scale**2 times the plain one, its gradient only scale times, because p is constant.
    """
    if scale == 1.0:
        return target
    base = prediction.detach().to(torch.float32)
    return base + scale * (target.to(torch.float32) - base)
