"""Adaptive layer norm and gated residuals with as few passes over the activations as plain torch calls allow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm(x) * scale + shift over the last axis; ``scale`` already contains the 1 of ``1 + scale``.

    x: [B, L, D]; shift, scale: [B, D] in the dtype of x. Returns [B, L, D]. Statistics are float32 in every dtype.
    """
    width = (x.shape[-1],)
    if x.shape[0] == 1:
        # One sample: the modulation is the norm's own affine part, so no further pass is needed.
        return F.layer_norm(x, width, scale[0], shift[0], eps)
    return torch.addcmul(shift[:, None], F.layer_norm(x, width, eps=eps), scale[:, None])


def gated_residual(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate * update in one pass. x, update: [B, L, D]; gate: [B, D]. Returns [B, L, D]."""
    return torch.addcmul(x, gate[:, None], update)
