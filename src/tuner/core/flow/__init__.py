"""The flow-matching objective as pure functions of float32 tensors: sigmas, noise, targets, losses, preview sampling.

Meaning fixed for every model: sigma is the share of noise, ``noisy = (1 - sigma) * latents + sigma * noise``, and the
target is the velocity ``noise - latents``. Nothing here draws random numbers: the caller hands the draws in.
"""

from __future__ import annotations

from tuner.core.flow.guidance import differential_target, distilled_target, guided_target, zero_star_share
from tuner.core.flow.losses import elementwise_loss, huber_threshold
from tuner.core.flow.objective import offset_noise, perturb_noise, rectified_flow
from tuner.core.flow.reduction import reduce_loss
from tuner.core.flow.sampler import SAMPLERS, apply_cfg, euler_sample, euler_sigmas, heun_sample, rescale_cfg
from tuner.core.flow.sigmas import apply_shift, resolution_mu, shift_value, sigmas_from_draws, stratify
from tuner.core.flow.weights import loss_weight, min_snr_weight

__all__ = [
    "SAMPLERS",
    "apply_cfg",
    "apply_shift",
    "differential_target",
    "distilled_target",
    "elementwise_loss",
    "euler_sample",
    "euler_sigmas",
    "guided_target",
    "heun_sample",
    "huber_threshold",
    "loss_weight",
    "min_snr_weight",
    "offset_noise",
    "perturb_noise",
    "rectified_flow",
    "reduce_loss",
    "rescale_cfg",
    "resolution_mu",
    "shift_value",
    "sigmas_from_draws",
    "stratify",
    "zero_star_share",
]
