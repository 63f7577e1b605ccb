"""From the loss of every element to one number per sample, in one fixed order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tuner.core.flow.objective import per_sample

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.core.config import LossConfig, LossMask


def reduce_loss(
    elementwise: Tensor,
    *,
    weight: Tensor,
    mask: Tensor | None,
    sample_weight: Tensor,
    loss_cfg: LossConfig,
    mask_chance: Tensor | None = None,
) -> Tensor:
    """Loss per sample [B]: elementwise [B,C,h,w] -> times weight [B] -> times mask -> mean -> times sample_weight [B].

    mask [B,1,h,w] in 0..1, or None for a batch without masks. mask_chance [B]: uniform draws, needed when
    ``loss.mask.probability`` is below 1. The mean runs over all elements, so masked-out places count in the
    denominator unless ``loss.mask.normalise``; then the sum is divided by the mask's own sum (0 for an empty mask).
    The caller divides the sum over samples by the number of samples of the update, over all its micro-batches.
    """
    weighted = elementwise * per_sample(weight.to(torch.float32), elementwise)
    if mask is None or loss_cfg.mask.enabled is False:
        per_item = weighted.flatten(1).mean(dim=1)
    else:
        mask = effective_mask(loss_cfg.mask, mask, mask_chance)
        masked = (weighted * mask).flatten(1)
        if loss_cfg.mask.normalise:
            area = mask.flatten(1).sum(dim=1) * elementwise.shape[1]
            per_item = torch.where(area > 0, masked.sum(dim=1) / area.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
        else:
            per_item = masked.mean(dim=1)
    return per_item * sample_weight.to(torch.float32)


def effective_mask(config: LossMask, mask: Tensor, chance: Tensor | None) -> Tensor:
    """The mask as the loss uses it: not below ``floor``, and all ones for samples that ``probability`` spares."""
    mask = mask.to(torch.float32).clamp(min=config.floor)
    if config.probability < 1.0:
        if chance is None:
            raise ValueError("loss.mask.probability below 1 needs the draws mask_chance")
        spared = per_sample(chance.to(mask.device) >= config.probability, mask)
        mask = torch.where(spared, torch.ones_like(mask), mask)
    return mask
