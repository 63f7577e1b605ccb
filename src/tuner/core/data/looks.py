"""How an image is seen at a visit: mirrored or not, which part of it, in which colours."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tuner.core.data.crops import crop_offset, zoomed
from tuner.core.errors import UsageError
from tuner.core.rng import Rng

if TYPE_CHECKING:
    from tuner.core.data.plan import DataPlan, PlanItem
    from tuner.core.data.records import Fit, Size


@dataclass(frozen=True, slots=True)
class Look:
    """flip: mirrored left to right. crop: left, top of the part that is kept. color: names the draw, None for none.

    resized: size before the crop; None for the one of the item's fit.
    """

    flip: bool
    crop: tuple[int, int]
    color: Rng | None = None
    resized: Size | None = None


def is_fixed(plan: DataPlan, item: PlanItem) -> bool:
    """Whether the item has so few looks that all of them can be cached."""
    crop = plan.tiers[item.tier].config.crop
    drawn = crop.style == "random" or crop.face_range is not None
    return item.validation or not (drawn or plan.sources[item.source].augment.color)


def fixed_looks(plan: DataPlan, item: PlanItem) -> tuple[Look, ...]:
    """Every look that the visits of a fixed item can have."""
    look = _framed(plan, item, None)
    if item.validation or not plan.sources[item.source].augment.flip:
        return (look,)
    return (look, replace(look, flip=True))


def draw_look(plan: DataPlan, item: PlanItem, rng: Rng) -> Look:
    """The look of one visit; ``rng`` is named after the visit."""
    if item.validation:
        return _framed(plan, item, None)
    augment = plan.sources[item.source].augment
    flip = augment.flip and rng.child("flip").random() < 0.5
    return replace(
        _framed(plan, item, rng.child("crop")), flip=flip, color=rng.child("color") if augment.color else None
    )


def fit_of(item: PlanItem, look: Look) -> Fit:
    """How the item is sized when it is seen with ``look``."""
    return item.fit if look.resized is None else replace(item.fit, resized=look.resized)


def _framed(plan: DataPlan, item: PlanItem, rng: Rng | None) -> Look:
    """What part is kept; ``rng`` names the draws, None for none."""
    crop = plan.tiers[item.tier].config.crop
    fit = zoomed(item.record, item.fit, crop, rng)
    return Look(False, crop_offset(item.record, fit, crop, rng), resized=fit.resized if fit is not item.fit else None)


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
