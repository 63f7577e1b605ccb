"""How an image is seen at a visit: mirrored or not, which part of it, in which colours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tuner.core.errors import UsageError
from tuner.core.rng import Rng

from .images import crop_offset

if TYPE_CHECKING:
    from .plan import DataPlan, PlanItem


@dataclass(frozen=True, slots=True)
class Look:
    """flip: mirrored left to right. crop: left, top of the part that is kept. color: names the draw, None for none."""

    flip: bool
    crop: tuple[int, int]
    color: Rng | None = None


def is_fixed(plan: DataPlan, item: PlanItem) -> bool:
    """Whether the item has so few looks that all of them can be cached."""
    random_crop = plan.tiers[item.tier].config.crop.style == "random"
    return item.validation or not (random_crop or plan.sources[item.source].augment.color)


def fixed_looks(plan: DataPlan, item: PlanItem) -> tuple[Look, ...]:
    """Every look that the visits of a fixed item can have."""
    crop = crop_offset(item.record, item.fit, plan.tiers[item.tier].config.crop, None)
    if item.validation or not plan.sources[item.source].augment.flip:
        return (Look(False, crop),)
    return (Look(False, crop), Look(True, crop))


def draw_look(plan: DataPlan, item: PlanItem, rng: Rng) -> Look:
    """The look of one visit; ``rng`` is named after the visit."""
    config, augment = plan.tiers[item.tier].config, plan.sources[item.source].augment
    if item.validation:
        return Look(False, crop_offset(item.record, item.fit, config.crop, None))
    flip = augment.flip and rng.child("flip").random() < 0.5
    crop = crop_offset(item.record, item.fit, config.crop, rng.child("crop"))
    return Look(flip, crop, rng.child("color") if augment.color else None)


def check_cacheable(plan: DataPlan) -> None:
    """Raise UsageError when an item's latents differ at every visit, so that no cache can hold them."""
    for item in plan.items:
        if not is_fixed(plan, item):
            tier, source = plan.tiers[item.tier], plan.sources[item.source]
            setting = f"data.sets[{tier.set_index}].crop.style" if not source.augment.color else "augment.color"
            raise UsageError(
                f"the latents of source {item.source} cannot be cached",
                where=setting,
                why="the image looks different at every visit",
                fix='set cache.latents to "off" to encode in every step, or turn the random change off',
            )
