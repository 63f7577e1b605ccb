"""What a plan looks like to a person: images per bucket, how much is cut away, what is left out and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.core.config.train import TrainConfig
    from tuner.core.data.plan import DataPlan, LeftOut, PlanItem


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketRow:
    """One bucket of one tier. cropped: mean share of pixels cut away. enlarged: images that are scaled up, and
    largest_scale the factor of the worst."""

    tier: str
    bucket: str
    images: int
    visits: int
    batches: int
    cropped: float
    enlarged: int
    largest_scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRow:
    """One source: images that take part, uses per epoch over all resolutions, images held out."""

    source: str
    role: str
    images: int
    visits: int
    held_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """Everything that ``tuner check`` and the start of a run show about the data.

    left_out: by reason, the images as ``source/key``.
    """

    buckets: tuple[BucketRow, ...]
    sources: tuple[SourceRow, ...]
    left_out: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]
    images: int
    visits_per_epoch: int
    batches_per_epoch: int
    validation_images: int
    steps_per_epoch: int
    total_steps: int
    cropped: float

    def left_out_lines(self, shown: int = 5) -> list[str]:
        """One line for each reason, with the first ``shown`` images."""
        return [_line(reason, images, shown) for reason, images in self.left_out.items()]

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def report_plan(plan: DataPlan, train: TrainConfig, ranks: int = 1) -> PlanReport:
    """Summarise a plan. Images count once, however many resolutions and repeats they have."""
    rows = []
    for group in plan.groups:
        items = [plan.items[index] for index in group.items]
        rows.append(
            BucketRow(
                tier=plan.tiers[group.tier].name,
                bucket=f"{group.bucket[0]}x{group.bucket[1]}",
                images=len(items),
                visits=sum(item.repeats for item in items),
                batches=plan.batches_of(group),
                cropped=sum(item.fit.cropped_share for item in items) / len(items),
                enlarged=sum(item.fit.scale > 1 for item in items),
                largest_scale=max(item.fit.scale for item in items),
            )
        )
    visits = plan.visits_per_epoch
    return PlanReport(
        buckets=tuple(rows),
        sources=tuple(_source_row(plan, name) for name in plan.sources),
        left_out=_by_reason(plan.left_out),
        notes=plan.notes,
        images=_images(plan.items),
        visits_per_epoch=visits,
        batches_per_epoch=plan.batches_per_epoch,
        validation_images=_images(plan.validation),
        steps_per_epoch=plan.steps_per_epoch(train.accumulate, ranks),
        total_steps=plan.total_steps(train, ranks),
        cropped=sum(item.fit.cropped_share * item.repeats for item in plan.items) / visits,
    )


def _source_row(plan: DataPlan, name: str) -> SourceRow:
    items = [item for item in plan.items if item.source == name]
    return SourceRow(
        source=name,
        role=plan.sources[name].role,
        images=_images(items),
        visits=sum(item.repeats for item in items),
        held_out=_images(item for item in plan.validation if item.source == name),
    )


def _images(items: Iterable[PlanItem]) -> int:
    return len({_name(item) for item in items})


def _name(item: PlanItem) -> tuple[str, str]:
    return item.source, item.record.key


def _by_reason(entries: Iterable[LeftOut]) -> dict[str, tuple[str, ...]]:
    images: dict[str, dict[str, None]] = {}
    for entry in entries:
        images.setdefault(_kind(entry.reason), {})[f"{entry.source}/{entry.key}"] = None
    return {reason: tuple(names) for reason, names in images.items()}


def _line(reason: str, images: Sequence[str], shown: int) -> str:
    more = f" and {len(images) - shown} more" if len(images) > shown else ""
    return f"{len(images)} left out: {reason} ({', '.join(images[:shown])}{more})"


def _kind(reason: str) -> str:
    """The reason without the image's own size, so that equal reasons are counted together."""
    first, _, rest = reason.partition(" ")
    return rest if "x" in first and first.replace("x", "").isdigit() else reason
