"""Masks at latent size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def reduce_mask(mask: Tensor, factor: int) -> Tensor:
    """Mean of every ``factor`` x ``factor`` square: [H,W] -> [h,w], or [B,1,H,W] -> [B,1,h,w]; sides are multiples."""
    if mask.dim() == 2:
        return reduce_mask(mask[None, None], factor)[0, 0]
    if mask.shape[-1] % factor or mask.shape[-2] % factor:
        raise ValueError(f"a mask of {tuple(mask.shape)} has sides that are no multiples of {factor}")
    return F.avg_pool2d(mask, factor)
