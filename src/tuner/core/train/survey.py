"""``tuner data inspect``: what a person would look for in the pictures and captions of a configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tuner.core.config import RunConfig
from tuner.core.data.index import scan_sources
from tuner.core.data.inspect import DataReport, broken_files, inspect_indices
from tuner.core.data.pictures import Picture, alike, blurred, look_at_all
from tuner.core.data.plan import DataPlan, expand_tiers, plan_indices
from tuner.core.data.records import ImageRecord, SourceIndex
from tuner.core.data.report import PlanReport, report_plan
from tuner.core.data.tags import CaptionReport, caption_report
from tuner.core.data.texts import planned_texts
from tuner.core.errors import NotHereError, Problems, UsageError
from tuner.core.places import here_only
from tuner.core.registry import MODELS, Catalog
from tuner.core.types import ModelFacts

ENLARGED = 1.05
CROPPED = 0.25
ASPECT = 2.5
"""Listed: pictures that are enlarged by more, lose more of themselves to the crop, or are longer than wide by more."""

KINDS: Mapping[str, str] = {
    "small": "smaller than their bucket, so they are enlarged",
    "cropped": f"lose more than {CROPPED:.0%} to the crop",
    "blurred": "perhaps blurred",
    "flat": "almost one colour",
    "stretched": f"more than {ASPECT} times as long as wide, or as wide as long",
    "mode": "stored in an unusual way and converted",
    "transparent": "transparent, laid over white",
    "grey": "without colours",
}
"""What may be odd about a picture; none of it stops a run."""


@dataclass(frozen=True, slots=True)
class Remark:
    """A picture, as ``source/key``, and what is odd about it in numbers."""

    image: str
    detail: str


@dataclass(kw_only=True)
class Survey:
    """plan: None while there are problems. remarks: by the names of ``KINDS``. alike: groups of pictures that look the
    same without being the same file. tokens: by tokenizer, (limit, longest, captions above the limit); empty where the
    model cannot count or its tokenizers are not on this machine."""

    data: DataReport
    plan: PlanReport | None
    remarks: dict[str, list[Remark]]
    alike: list[list[str]]
    captions: list[CaptionReport]
    tokens: dict[str, tuple[int, int, int]]
    notes: list[str] = field(default_factory=list)
    layout: DataPlan | None = None

    @property
    def problems(self) -> tuple[UsageError, ...]:
        return self.data.problems

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        sources = [asdict(source) | {"root": str(source.root)} for source in self.data.sources]
        tokens = {name: dict(zip(("limit", "longest", "above"), row, strict=True)) for name, row in self.tokens.items()}
        return {
            "ok": not self.problems,
            "problems": [{"what": each.what, "where": each.where, "why": each.why} for each in self.problems],
            "sources": sources,
            "plan": None if self.plan is None else self.plan.as_dict(),
            "remarks": {kind: [asdict(each) for each in found] for kind, found in self.remarks.items()},
            "same_files": [list(group) for group in self.data.duplicates],
            "alike": self.alike,
            "leaks": list(self.data.leaks),
            "captions": [asdict(each) for each in self.captions],
            "tokens": tokens,
            "notes": self.notes,
        }


def survey(
    config: RunConfig, facts: ModelFacts, catalog: Catalog, on_progress: Callable[[int, int], None] | None = None
) -> Survey:
    """Scan, plan, decode and measure. Nothing but the stored index under ``cache.dir`` is written.

    on_progress: called with (pictures that were just done, all). Problems of the data are in the result.
    """
    indices = scan_sources(config.data, Path(config.cache.dir), verify=config.cache.verify)
    records = [record for index in indices.values() for record in index.records]
    seen = _look(config, records, on_progress)
    pictures = {each.name: picture for each in records if isinstance(picture := seen[each.path], Picture)}
    problems = Problems()
    problems.extend(error for error in seen.values() if isinstance(error, UsageError))
    problems.extend(broken_files({each.mask_path: None for each in records if each.mask_path is not None}))
    found = inspect_indices(config.data, list(indices.values()), decode=False)
    plan = _plan(config, facts, indices, problems)
    data = DataReport(
        sources=found.sources, duplicates=found.duplicates, leaks=found.leaks,
        problems=(*found.problems, *problems.errors),
    )  # fmt: skip
    sources = {source.id: source for each in config.data.sets for source in each.sources}
    result = Survey(
        data=data,
        plan=None if plan is None else report_plan(plan, config.train),
        remarks=_remarks(config, records, pictures, plan),
        alike=_alike(records, pictures),
        captions=[caption_report(name, sources[name].captions, index.records) for name, index in indices.items()],
        tokens={},
        layout=plan,
    )
    if plan is not None:
        _count_tokens(plan, config, catalog, result)
    return result


def _look(
    config: RunConfig, records: Iterable[ImageRecord], on_progress: Callable[[int, int], None] | None
) -> dict[Path, Picture | UsageError]:
    paths = list(dict.fromkeys(record.path for record in records))
    tick = None if on_progress is None else (lambda done: on_progress(done, len(paths)))
    return look_at_all(paths, config.data.workers.scan, tick)


def _plan(
    config: RunConfig, facts: ModelFacts, indices: dict[str, SourceIndex], problems: Problems
) -> DataPlan | None:  # fmt: skip
    tiers = expand_tiers(config.data, config.train.batch_size, facts.resolution_multiple, problems)
    if problems or any(index.problems for index in indices.values()):
        return None
    try:
        return plan_indices(config, tiers, indices)
    except UsageError as error:
        problems.add(error)
        return None


def _alike(records: Iterable[ImageRecord], pictures: Mapping[str, Picture]) -> list[list[str]]:
    """Groups that look alike, each file once: the same bytes are told as such."""
    first: dict[str, str] = {}
    for record in records:
        first.setdefault(record.digest, record.name)
    return alike({name: pictures[name] for name in first.values() if name in pictures})


def _remarks(
    config: RunConfig, records: Iterable[ImageRecord], pictures: Mapping[str, Picture], plan: DataPlan | None
) -> dict[str, list[Remark]]:
    """What is odd, by kind; the worst first where there is a measure."""
    found: dict[str, list[Remark]] = {kind: [] for kind in KINDS}
    masks = {source.id: source.mask for each in config.data.sets for source in each.sources}
    if plan is not None:
        for item in sorted((*plan.items, *plan.validation), key=lambda each: -each.fit.scale):
            if item.fit.scale > ENLARGED:
                size = f"{item.record.width}x{item.record.height} for {item.fit.bucket_key}"
                found["small"].append(Remark(item.record.name, f"{size}, {item.fit.scale:.2f} times"))
        for item in sorted((*plan.items, *plan.validation), key=lambda each: -each.fit.cropped_share):
            if item.fit.cropped_share > CROPPED:
                size = f"{item.record.width}x{item.record.height} for {item.fit.bucket_key}"
                found["cropped"].append(Remark(item.record.name, f"{size}, {item.fit.cropped_share:.0%} cut"))
    for name in blurred(pictures):
        found["blurred"].append(Remark(name, f"sharpness {pictures[name].sharpness:.0f}"))
    for record in records:
        picture = pictures.get(record.name)
        if picture is not None and picture.flat:
            found["flat"].append(Remark(record.name, f"deviation {picture.spread:.1f} of 255"))
        elif picture is not None and picture.grey:
            found["grey"].append(Remark(record.name, f"mode {record.mode}"))
        if max(record.size) > ASPECT * min(record.size):
            found["stretched"].append(Remark(record.name, f"{record.width}x{record.height}"))
        if record.mode not in ("RGB", "RGBA", "L", "LA", "P"):
            found["mode"].append(Remark(record.name, f"mode {record.mode}"))
        if record.alpha and masks.get(record.source) != "alpha":
            found["transparent"].append(Remark(record.name, f"mode {record.mode}"))
    return {kind: remarks for kind, remarks in found.items() if remarks}


def _count_tokens(plan: DataPlan, config: RunConfig, catalog: Catalog, result: Survey) -> None:
    """Token counts, where the model counts them and its tokenizers are on this machine."""
    entry = catalog.entry(MODELS, config.model.family)
    reference = catalog.model(entry.name).count_tokens
    if reference is None:
        result.notes.append("this model cannot count tokens")
        return
    try:
        with here_only():
            texts = planned_texts(plan, config)
            counters = catalog.call(entry, "token counter", catalog.load(entry, "descriptor", reference), config)
    except NotHereError as absent:
        result.notes.append(f"tokens are not counted: {absent.what}")
        return
    except UsageError as problem:
        result.notes.append(f"tokens are not counted: {problem.what}")
        return
    for name, count in counters.items():
        limit = config.text_encoder.max_tokens.get(name)
        if limit is not None:
            lengths = count(texts)
            result.tokens[name] = (limit, max(lengths, default=0), sum(length > limit for length in lengths))
