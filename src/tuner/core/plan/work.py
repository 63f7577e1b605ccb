"""What a run has to do: sizes of pictures, how many of each, how long."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.core.data.plan import DataPlan, expand_tiers, plan_data
from tuner.core.data.texts import planned_texts
from tuner.core.errors import Problems

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.types import ModelFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Batches of one size: width and height in pixels, pictures per micro-batch, micro-batches per epoch."""

    width: int
    height: int
    batch: int
    batches: int = 1

    def tokens(self, side: int) -> int:
        """Tokens of one picture, ``side`` pixels wide each."""
        return (self.width // side) * (self.height // side)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a run has to do.

    shapes: everything that is trained on. updates: of the whole run, None when it is not known. captions: number of
    texts that are cached; pixels: of all images that are cached. seen: whether the data was there; if not, one size per
    set is assumed. common: whether ``train.batch_size`` is the size of all micro-batches, because no set names another.
    absent: which of the model's files is not here, None when all are.
    """

    shapes: tuple[Shape, ...]
    updates: int | None
    captions: int = 0
    pixels: int = 0
    seen: bool = True
    common: bool = False
    absent: str | None = None

    def divided(self, by: int) -> Work:
        """The same work in micro-batches of a ``by``-th of the size."""
        shapes = tuple(replace(each, batch=each.batch // by, batches=each.batches * by) for each in self.shapes)
        return replace(self, shapes=shapes)


def work_of(config: RunConfig, facts: ModelFacts) -> Work:
    """The work of a run: from its pictures when every source is there, else from the sizes that it asks for."""
    sources = [source for each in config.data.sets for source in each.sources if source.enabled]
    if not all(Path(source.path).exists() for source in sources):
        return assumed_work(config, facts)
    return work_of_plan(plan_data(config, facts), config)


def work_of_plan(plan: DataPlan, config: RunConfig) -> Work:
    """The work that planned data makes."""
    counted: dict[tuple[int, int, int], int] = {}
    for group in plan.groups:
        key = (*group.bucket, group.batch_size)
        counted[key] = counted.get(key, 0) + plan.batches_of(group)
    return Work(
        shapes=tuple(
            Shape(width=width, height=height, batch=batch, batches=batches)
            for (width, height, batch), batches in counted.items()
            if batches
        ),
        updates=plan.left_steps(config),
        captions=len(planned_texts(plan, config)) if config.cache.text != "off" else 0,
        pixels=cached_pixels(plan),
    )


def cached_pixels(plan: DataPlan) -> int:
    """Pixels of every picture that is encoded, each size and each side of a flip once."""
    looks = {
        (each.record.digest, each.fit.bucket, flip)
        for each in (*plan.items, *plan.validation)
        for flip in ((False, True) if plan.sources[each.source].augment.flip else (False,))
    }
    return sum(width * height for _, (width, height), _ in looks)


def assumed_work(config: RunConfig, facts: ModelFacts) -> Work:
    """One size per set and resolution, seen equally often; how many pictures there will be is not known."""
    problems = Problems()
    tiers = expand_tiers(config.data, config.train.batch_size, facts.resolution_multiple, problems)
    problems.raise_if_any()
    shapes = tuple(Shape(width=each.resolution[0], height=each.resolution[1], batch=each.batch_size) for each in tiers)
    steps = config.train.steps
    return Work(shapes=shapes, updates=steps and steps - (config.checkpoint.start_at or 0), seen=False)
