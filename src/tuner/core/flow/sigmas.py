"""Noise levels from random draws: every value of ``noise.timesteps``.

Formulas as in kohya-ss/sd-scripts and, for the beta density and the automatic shift, bghira/SimpleTuner. All tensors
here are [B] float32 on the CPU.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.core.config import NoiseConfig

TABLE_SIZE = 1000
"""Entries of the noise-level table that ``noise.timesteps = sigma`` draws from."""

SHIFTED = ("uniform", "shift", "sigma", "logit_normal", "mode", "beta")
"""Values of ``noise.timesteps`` that ``noise.shift`` acts on; ``flux_shift`` has its own, ``sigmoid`` none."""

_BETA_CELLS = 8192


def stratify(normal: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draws [B] with one sample in each of B equal segments of the unit interval, for both kinds of draw.

    Which sample gets which segment is random: the order of the normal draws decides, so no further draw is needed.
    """
    count = uniform.numel()
    segments = torch.argsort(torch.argsort(normal)).to(torch.float64)
    spread = ((segments + uniform.to(torch.float64)) / count).clamp(0.0, 1.0)
    # float32 rounding at the ends would give an infinite normal value
    spread = spread.clamp(torch.finfo(torch.float32).tiny, 1.0 - torch.finfo(torch.float32).eps / 2)
    return torch.special.ndtri(spread).to(torch.float32), spread.to(torch.float32)


def sigmas_from_draws(noise_cfg: NoiseConfig, *, normal: Tensor, uniform: Tensor, latent_hw: tuple[int, int]) -> Tensor:
    """Sigmas [B] float32 in 0..1 for one batch; each value depends on its own two draws alone.

    normal: standard normal draws [B]. uniform: draws in [0, 1) [B]; both went through `stratify` before when
    ``noise.stratified`` is on. latent_hw: latent height and width, for the resolution-dependent shifts.
    """
    normal, uniform = normal.to(torch.float32), uniform.to(torch.float32)
    name = noise_cfg.timesteps
    if name == "uniform":
        sigmas = uniform
    elif name in ("sigmoid", "shift", "flux_shift"):
        sigmas = torch.sigmoid(noise_cfg.sigmoid_scale * normal)
    elif name in ("logit_normal", "mode"):
        sigmas = _density(name, noise_cfg, normal, uniform)
    elif name == "sigma":
        sigmas = _table_sigmas(_density(noise_cfg.density, noise_cfg, normal, uniform))
    elif name == "beta":
        sigmas = beta_quantile(uniform, *noise_cfg.beta)
    else:
        raise ValueError(f"unknown noise.timesteps {name!r}")

    if name == "flux_shift":
        sigmas = apply_shift(sigmas, math.exp(resolution_mu(latent_hw)))
    elif name in SHIFTED:
        sigmas = apply_shift(sigmas, shift_value(noise_cfg.shift, latent_hw))
    low, high = noise_cfg.min_timestep, noise_cfg.max_timestep
    if noise_cfg.truncate:
        return (low + sigmas * (high - low)).floor().clamp(0.0, 1000.0) / 1000.0
    low, high = low / 1000.0, high / 1000.0
    return (low + sigmas * (high - low)).clamp(0.0, 1.0)


def shift_value(shift: float | str | None, latent_hw: tuple[int, int]) -> float:
    """The number behind ``noise.shift``: ``auto`` means the resolution's own, None means no shift."""
    if shift is None:
        return 1.0
    return math.exp(resolution_mu(latent_hw)) if isinstance(shift, str) else float(shift)


def apply_shift(sigmas: Tensor, shift: float) -> Tensor:
    """shift*s / (1 + (shift - 1)*s): above 1 moves towards noise, keeps 0 and 1 in place."""
    if shift == 1.0:
        return sigmas
    return shift * sigmas / (1.0 + (shift - 1.0) * sigmas)


def resolution_mu(latent_hw: tuple[int, int]) -> float:
    """Logarithm of the resolution's shift: linear in image tokens (2x2 latents), 0.5 at 256 and 1.15 at 4096."""
    tokens = (latent_hw[0] // 2) * (latent_hw[1] // 2)
    return 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)


def _density(name: str, noise_cfg: NoiseConfig, normal: Tensor, uniform: Tensor) -> Tensor:
    """Draws with the named density, as in Esser et al. 2024, section 3.1."""
    if name == "logit_normal":
        return torch.sigmoid(noise_cfg.logit_mean + noise_cfg.logit_std * normal)
    if name == "mode":
        bend = torch.cos(math.pi / 2 * uniform) ** 2 - 1 + uniform
        return (1 - uniform - noise_cfg.mode_scale * bend).clamp(0.0, 1.0)
    return uniform


def _table_sigmas(position: Tensor) -> Tensor:
    """Entry of the table 1, 0.999, ..., 0.001 at a relative position 0..1; small positions mean much noise."""
    index = (position * TABLE_SIZE).long().clamp(0, TABLE_SIZE - 1)
    return (TABLE_SIZE - index).to(torch.float32) / TABLE_SIZE


def beta_quantile(uniform: Tensor, alpha: float, beta: float) -> Tensor:
    """Inverse of the Beta(alpha, beta) distribution function by a table, exact to about 1e-4; both must be >= 0.5."""
    points, cumulative = _beta_table(float(alpha), float(beta))
    position = uniform.to(torch.float64)
    right = torch.searchsorted(cumulative, position).clamp(1, cumulative.numel() - 1)
    low, high = cumulative[right - 1], cumulative[right]
    share = (position - low) / (high - low).clamp(min=1e-300)
    return (points[right - 1] + share * (points[right] - points[right - 1])).clamp(0.0, 1.0).to(torch.float32)


@lru_cache(maxsize=8)
def _beta_table(alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    # With x = sin(a)^2 the density has no pole for parameters >= 0.5, so the midpoint rule converges quickly.
    edges = torch.linspace(0.0, math.pi / 2, _BETA_CELLS + 1, dtype=torch.float64)
    middles = (edges[1:] + edges[:-1]) / 2
    mass = torch.sin(middles) ** (2 * alpha - 1) * torch.cos(middles) ** (2 * beta - 1)
    cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumsum(mass, 0)])
    return torch.sin(edges) ** 2, cumulative / cumulative[-1]
