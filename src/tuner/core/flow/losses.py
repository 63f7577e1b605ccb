"""Elementwise losses and the schedule of the Huber threshold."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from tuner.core.flow.objective import per_sample

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.core.config import LossConfig


def elementwise_loss(loss_cfg: LossConfig, pred: Tensor, target: Tensor, sigmas: Tensor) -> Tensor:
    """Loss of every element [B,C,h,w] in float32. pred, target [B,C,h,w] velocities; sigmas [B].

    With d = pred - target and c the threshold: l2 d**2; l1 |d|; huber 2c(sqrt(d**2 + c**2) - c); smooth_l1
    2(sqrt(d**2 + c**2) - c). ``loss.target = clean`` compares the images that the velocities imply,
    noisy - sigma*velocity, which is the same with d times sigma. Formulas: `conditional_loss` of kohya-ss/sd-scripts.
    """
    difference = pred.to(torch.float32) - target.to(torch.float32)
    if loss_cfg.target == "clean":
        difference = per_sample(sigmas.to(torch.float32), difference) * difference
    if loss_cfg.type == "l2":
        return difference**2
    if loss_cfg.type == "l1":
        return difference.abs()
    threshold = per_sample(huber_threshold(loss_cfg, sigmas), difference)
    if loss_cfg.type == "huber":
        return huber(difference, threshold)
    if loss_cfg.type == "smooth_l1":
        return smooth_l1(difference, threshold)
    raise ValueError(f"unknown loss.type {loss_cfg.type!r}")


def huber(difference: Tensor, threshold: Tensor) -> Tensor:
    """2c(sqrt(d**2 + c**2) - c): about d**2 for small d, 2c|d| for large."""
    return threshold * smooth_l1(difference, threshold)


def smooth_l1(difference: Tensor, threshold: Tensor) -> Tensor:
    """2(sqrt(d**2 + c**2) - c). Its gradient 2d/sqrt(d**2 + c**2) keeps all digits, also where the value is tiny."""
    return 2.0 * (torch.sqrt(difference**2 + threshold**2) - threshold)


def huber_threshold(loss_cfg: LossConfig, sigmas: Tensor) -> Tensor:
    """Threshold per sample [B] float32.

    constant: c*scale. exponential: c**sigma * scale, that is 1 at sigma 0 and c at sigma 1. snr: (1 - c)/(1 + r)**2 + c
    with r = sigma/(1 - sigma) the noise-to-signal ratio of a flow model; huber_scale does not act here.
    """
    sigmas = sigmas.to(torch.float32)
    if loss_cfg.huber_schedule == "constant":
        return torch.full_like(sigmas, loss_cfg.huber_c * loss_cfg.huber_scale)
    if loss_cfg.huber_schedule == "exponential":
        return torch.exp(math.log(loss_cfg.huber_c) * sigmas) * loss_cfg.huber_scale
    if loss_cfg.huber_schedule == "snr":
        return (1.0 - loss_cfg.huber_c) * (1.0 - sigmas) ** 2 + loss_cfg.huber_c
    raise ValueError(f"unknown loss.huber_schedule {loss_cfg.huber_schedule!r}")
