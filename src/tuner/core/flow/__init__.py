"""The flow-matching objective as pure functions of float32 tensors: sigmas, noise, targets, losses, preview sampling.

Meaning fixed for every model: sigma is the share of noise, ``noisy = (1 - sigma) * latents + sigma * noise``, and the
target is the velocity ``noise - latents``. Nothing here draws random numbers: the caller hands the draws in.
"""

from __future__ import annotations

from tuner.core.flow.losses import elementwise_loss, huber_threshold
from tuner.core.flow.objective import offset_noise, perturb_noise, rectified_flow
from tuner.core.flow.reduction import reduce_loss
from tuner.core.flow.sampler import apply_cfg, euler_sample, euler_sigmas
from tuner.core.flow.sigmas import apply_shift, resolution_mu, shift_value, sigmas_from_draws, stratify
from tuner.core.flow.weights import loss_weight, min_snr_weight

__all__ = [
    "apply_cfg",
    "apply_shift",
    "elementwise_loss",
    "euler_sample",
    "euler_sigmas",
    "huber_threshold",
    "loss_weight",
    "min_snr_weight",
    "offset_noise",
    "perturb_noise",
    "rectified_flow",
    "reduce_loss",
    "resolution_mu",
    "shift_value",
    "sigmas_from_draws",
    "stratify",
]
