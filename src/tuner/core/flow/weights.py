"""Loss weights as functions of sigma."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.core.config import LossConfig

SIGMA_FLOOR = 1e-3
"""``sigma_sqrt`` weighs no sample more than SIGMA_FLOOR**-2, because sigma**-2 has no bound at 0."""


def loss_weight(loss_cfg: LossConfig, sigmas: Tensor) -> Tensor:
    """Weight per sample [B] float32 from ``loss.weighting`` and ``loss.min_snr_gamma``.

    sigma_sqrt: max(sigma, SIGMA_FLOOR)**-2. cosmap: 2/(pi*(1 - 2 sigma + 2 sigma**2)). none, uniform: 1.
    Formulas: Esser et al. 2024.
    """
    sigmas = sigmas.to(torch.float32)
    if loss_cfg.weighting == "sigma_sqrt":
        weight = sigmas.clamp(min=SIGMA_FLOOR) ** -2.0
    elif loss_cfg.weighting == "cosmap":
        weight = 2.0 / (math.pi * (1.0 - 2.0 * sigmas + 2.0 * sigmas**2))
    elif loss_cfg.weighting in ("none", "uniform"):
        weight = torch.ones_like(sigmas)
    else:
        raise ValueError(f"unknown loss.weighting {loss_cfg.weighting!r}")
    if loss_cfg.min_snr_gamma is not None:
        weight = weight * min_snr_weight(sigmas, loss_cfg.min_snr_gamma)
    return weight


def min_snr_weight(sigmas: Tensor, gamma: float, target: Literal["velocity", "noise"] = "velocity") -> Tensor:
    """min(SNR, gamma) / (SNR + 1) for velocity targets, / SNR for noise targets, with SNR = ((1 - sigma)/sigma)**2.

    Written without the division by sigma**2, so both ends are finite (Hang et al. 2023 carried over to flow models).
    """
    signal, noise = (1.0 - sigmas) ** 2, sigmas**2
    capped = torch.minimum(signal, gamma * noise)
    if target == "velocity":
        return capped / (signal + noise)
    return torch.where(signal > 0, capped / signal.clamp(min=torch.finfo(torch.float32).tiny), 1.0)
