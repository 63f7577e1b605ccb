"""The plan of a run's data: which image is seen how often, at which size, and what is left out and why.

Made from the index alone, no pixel is read. Everything later (caching, order, batches, the ledger) follows from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.core.data.buckets import Geometry, set_geometry
from tuner.core.data.filters import refused_by, refused_by_crop
from tuner.core.data.fingerprint import fingerprint
from tuner.core.data.index import scan_source
from tuner.core.data.records import Fit, ImageRecord, Refused, Size, SourceIndex
from tuner.core.data.repeats import balance_regularisation
from tuner.core.data.split import limited, own_draw, split_validation
from tuner.core.errors import Problems, UsageError

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.config.data import DataConfig, SetConfig, SourceConfig
    from tuner.core.config.train import TrainConfig
    from tuner.core.types import ModelFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """One resolution of a set: what ``resolution: [1024, 768]`` makes two of. ``name`` is unique inside its set."""

    name: str
    set_index: int
    resolution: Size
    batch_size: int
    config: SetConfig
    geometry: Geometry


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanItem:
    """An image at one resolution.

    id: stable over runs and unique in its source; with the source it keys every random choice.
    repeats: visits per epoch, at least 1.
    loss_weight: factor on its loss. sampling_weight: relative chance of its source outside ``epoch`` sampling.
    """

    id: str
    source: str
    tier: int
    record: ImageRecord
    fit: Fit
    repeats: int = 1
    loss_weight: float = 1.0
    sampling_weight: float = 1.0
    validation: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Items that may share a batch: same tier and bucket, and same source when sources are drawn by weight."""

    tier: int
    bucket: Size
    items: tuple[int, ...]
    batch_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """An image that does not take part. ``tier`` is None when that holds for every resolution."""

    source: str
    key: str
    reason: str
    tier: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPlan:
    """Everything about the data that is fixed before the first step.

    items: what is trained on, in a fixed order; validation: what is held out. groups and validation_groups index into
    them. fingerprint: changes whenever the order or the content of an epoch would.
    """

    tiers: tuple[Tier, ...]
    sources: dict[str, SourceConfig]
    items: tuple[PlanItem, ...]
    validation: tuple[PlanItem, ...]
    groups: tuple[Group, ...]
    validation_groups: tuple[Group, ...]
    sampling: str
    short_batches: str
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]
    fingerprint: str
    batches_per_epoch: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "batches_per_epoch", sum(self.batches_of(group) for group in self.groups))

    @property
    def visits_per_epoch(self) -> int:
        """Images per epoch, repeats included."""
        return sum(item.repeats for item in self.items)

    def batches_of(self, group: Group) -> int:
        """Batches that a group gives per epoch."""
        visits = sum(self.items[item].repeats for item in group.items)
        return visits // group.batch_size if self.short_batches == "drop" else -(-visits // group.batch_size)

    def steps_per_epoch(self, accumulate: int, ranks: int = 1) -> int:
        """Updates per epoch. An update never takes batches of two epochs, so the last one may have fewer."""
        return -(-self.batches_per_epoch // (accumulate * ranks))

    def total_steps(self, train: TrainConfig, ranks: int = 1) -> int:
        """Updates of the whole run, from ``train.steps`` or ``train.epochs``."""
        if train.steps is not None:
            return train.steps
        assert train.epochs is not None
        return train.epochs * self.steps_per_epoch(train.accumulate, ranks)

    def left_steps(self, config: RunConfig) -> int:
        """Updates of a run without a state: all but those that ``checkpoint.start_at`` skips. UsageError for none."""
        total = self.total_steps(config.train)
        left = total - (config.checkpoint.start_at or 0)
        if left <= 0:
            raise UsageError(
                f"nothing is left to do: the run has {total} steps",
                where="checkpoint.start_at",
                fix="raise train.steps or train.epochs",
            )
        return left


def plan_data(config: RunConfig, facts: ModelFacts, seed: int | None = None) -> DataPlan:
    """Scan the sources and plan an epoch. ``seed`` (of the validation split) defaults to the configured one.

    Raises one UsageError that lists every problem found in the data.
    """
    problems = Problems()
    tiers = expand_tiers(config.data, config.train.batch_size, facts.resolution_multiple, problems)
    indices: dict[str, SourceIndex] = {}
    for set_config in config.data.sets:
        for source in set_config.sources:
            if source.enabled:
                index = scan_source(source, Path(config.cache.dir), verify=config.cache.verify, data=config.data)
                problems.extend(index.problems)
                indices[source.id] = index
    problems.raise_if_any()
    return plan_indices(config, tiers, indices, seed)


def expand_tiers(data: DataConfig, batch_size: int, multiple: int, problems: Problems) -> tuple[Tier, ...]:
    """One tier per set and resolution."""
    tiers: list[Tier] = []
    for set_index, set_config in enumerate(data.sets):
        seen: set[Size] = set()
        for resolution, size in set_config.tiers(batch_size):
            where = f"data.sets[{set_index}]"
            if resolution in seen:
                problems.add(
                    UsageError(
                        f"resolution {resolution[0]}x{resolution[1]} is listed twice",
                        where=f"{where}.resolution",
                        why="a list means several resolutions",
                        fix="write [[width, height]] for one size with two sides, or raise repeats",
                    )
                )
            seen.add(resolution)
            try:
                geometry = set_geometry(set_config, resolution, multiple)
            except UsageError as error:
                problems.add(UsageError(error.what, where=error.where or where, why=error.why, fix=error.fix))
                continue
            name = f"{resolution[0]}x{resolution[1]}"
            tiers.append(
                Tier(
                    name=name, set_index=set_index, resolution=resolution, batch_size=size, config=set_config,
                    geometry=geometry,
                )
            )  # fmt: skip
    return tuple(tiers)


def plan_indices(
    config: RunConfig, tiers: Sequence[Tier], indices: dict[str, SourceIndex], seed: int | None = None
) -> DataPlan:
    """The plan for sources that have been scanned; ``indices`` maps source ids to scans, in order."""
    builder = _Builder(config, tiers, indices)
    builder.place()
    builder.hold_out(config.validation.split, _split_seed(config) if seed is None else seed)
    builder.balance(config.data.regularisation_weight)
    plan = builder.finish()
    if plan.batches_per_epoch == 0:
        reasons = sorted({entry.reason for entry in plan.left_out})
        raise UsageError(
            "there is nothing to train on",
            where="data.sets",
            why="; ".join(reasons[:5]) or "no source has images",
            fix='"tuner check" lists what was left out; or set data.short_batches to "keep"',
        )
    return plan


def _split_seed(config: RunConfig) -> int:
    return config.train.seed if config.validation.seed is None else config.validation.seed


class _Builder:
    """Collects items while planning; the steps run in the order of their definition."""

    def __init__(self, config: RunConfig, tiers: Sequence[Tier], indices: dict[str, SourceIndex]) -> None:
        self.config, self.tiers, self.indices = config, tiers, indices
        self.sources = {source.id: source for each in config.data.sets for source in each.sources if source.enabled}
        self.left_out = [
            LeftOut(source=name, key=skip.key, reason=skip.reason)
            for name, index in indices.items()
            for skip in index.skipped
        ]
        self.notes = [note for index in indices.values() for note in index.notes]
        self.notes += [note for tier in tiers for note in tier.geometry.notes]
        self.placed: list[PlanItem] = []
        self.held_out: list[PlanItem] = []

    def place(self) -> None:
        """Give every image its bucket at every resolution of its set."""
        for tier_index, tier in enumerate(self.tiers):
            for source in tier.config.sources:
                if not source.enabled:
                    continue
                fitting: list[tuple[ImageRecord, Fit]] = []
                for record in self.indices[source.id].records:
                    size = record.width, record.height
                    refused = refused_by(source.filters, *size, tier.config.resolution_mode)
                    refused = refused or refused_by_crop(tier.config.crop, record)
                    placed = refused or tier.geometry.fit(*size, own_draw(source.id, record.digest))
                    if isinstance(placed, Refused):
                        self._leave_out(source.id, record, placed.reason, tier)
                    else:
                        fitting.append((record, placed))
                chosen = limited(source.id, [record.digest for record, _ in fitting], source.limit)
                for index in sorted(set(range(len(fitting))) - set(chosen)):
                    self._leave_out(source.id, fitting[index][0], f"beyond limit {source.limit}", tier)
                for index in chosen:
                    self.placed.append(self._item(source, tier_index, *fitting[index]))

    def hold_out(self, share: float, seed: int) -> None:
        """Move the validation part out of what is trained on."""
        roles = {name: source.role for name, source in self.sources.items()}
        samples = [(item.source, item.record.digest) for item in self.placed if roles[item.source] == "train"]
        if 0 < share < 1 and len(set(samples)) == 1:
            raise UsageError(
                "one image cannot be both trained on and held out",
                where="validate.split",
                fix='set validate.split to 0, or add a source with "role": "validation"',
            )
        chosen = split_validation(samples, share, seed)
        kept = []
        for item in self.placed:
            sample = (item.source, item.record.digest)
            if roles[item.source] == "validation" or (roles[item.source] == "train" and sample in chosen):
                self.held_out.append(replace(item, repeats=1, validation=True))
            else:
                kept.append(item)
        self.placed = kept

    def balance(self, weight: float) -> None:
        """Give regularisation images the repeats that match the training images of their set and resolution."""
        for tier_index, tier in enumerate(self.tiers):
            here = [index for index, item in enumerate(self.placed) if item.tier == tier_index]
            extra = [index for index in here if self.sources[self.placed[index].source].role == "regularisation"]
            visits = sum(self.placed[index].repeats for index in here) - sum(
                self.placed[index].repeats for index in extra
            )
            balanced = balance_regularisation(visits, [self.placed[index].repeats for index in extra])
            for index, repeats in zip(extra, balanced, strict=True):
                item = self.placed[index]
                if repeats == 0:
                    self._leave_out(item.source, item.record, "more regularisation than training images", tier)
                self.placed[index] = replace(item, repeats=repeats, loss_weight=weight)
        self.placed = [item for item in self.placed if item.repeats]

    def finish(self) -> DataPlan:
        data = self.config.data
        per_source = data.sampling != "epoch"
        groups = _groups(self.placed, self.tiers, per_source)
        if data.short_batches == "drop":
            self.notes += self._unused_notes(groups)
        return DataPlan(
            tiers=tuple(self.tiers),
            sources=self.sources,
            items=tuple(self.placed),
            validation=tuple(self.held_out),
            groups=groups,
            validation_groups=_groups(self.held_out, self.tiers, False),
            sampling=data.sampling,
            short_batches=data.short_batches,
            left_out=tuple(self.left_out),
            notes=tuple(self.notes),
            fingerprint=fingerprint(self.placed, self.held_out, self.tiers, self.config),
        )

    def _unused_notes(self, groups: Sequence[Group]) -> list[str]:
        """Buckets of which every batch is dropped: their images would go unused without a word."""
        notes = []
        for group in groups:
            visits = sum(self.placed[item].repeats for item in group.items)
            if visits < group.batch_size:
                size = f"{group.bucket[0]}x{group.bucket[1]}"
                notes.append(
                    f"bucket {size} is never trained: data.short_batches is drop, and it has {visits} of the"
                    f" {group.batch_size} images of a batch"
                )
        return notes

    def _item(self, source: SourceConfig, tier: int, record: ImageRecord, placed: Fit) -> PlanItem:
        return PlanItem(
            id=f"{record.key}@{self.tiers[tier].name}",
            source=source.id,
            tier=tier,
            record=record,
            fit=placed,
            repeats=source.repeats,
            sampling_weight=source.weight,
        )

    def _leave_out(self, source: str, record: ImageRecord, reason: str, tier: Tier) -> None:
        name = tier.name if len(tier.config.resolution) > 1 else None
        self.left_out.append(LeftOut(source=source, key=record.key, reason=reason, tier=name))


def _groups(items: Sequence[PlanItem], tiers: Sequence[Tier], per_source: bool) -> tuple[Group, ...]:
    members: dict[tuple[int, Size, str], list[int]] = {}
    for index, item in enumerate(items):
        members.setdefault((item.tier, item.fit.bucket, item.source if per_source else ""), []).append(index)
    return tuple(
        Group(tier=tier, bucket=bucket, items=tuple(indices), batch_size=tiers[tier].batch_size)
        for (tier, bucket, _), indices in sorted(members.items())
    )
