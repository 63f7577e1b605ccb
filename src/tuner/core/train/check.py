"""Everything that can be known before a run: configuration, files, images, captions, disk. No weight is read."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tuner.core.adapters.targets import Target, check_targets
from tuner.core.compute.attention_kernels import check_attention
from tuner.core.config import RawConfig, RunConfig, examine_config, load_config
from tuner.core.config.network import has_rank
from tuner.core.data.index import scan_sources
from tuner.core.data.inspect import inspect_indices
from tuner.core.data.plan import DataPlan, expand_tiers, plan_indices
from tuner.core.data.records import SourceIndex
from tuner.core.data.report import PlanReport, report_plan
from tuner.core.data.text_cache import planned_texts
from tuner.core.data.texts import check_homes
from tuner.core.errors import Problems, UsageError
from tuner.core.files import safetensors_header
from tuner.core.optim import check_optimizer
from tuner.core.plan.disk import latent_bytes, text_bytes
from tuner.core.plan.trained import adapter_values, component_layers
from tuner.core.plan.work import cached_pixels
from tuner.core.registry import EXTENSIONS, MODELS, Catalog, Opened, family_of, model_schema, open_facts
from tuner.core.track.trackers import check_trackers
from tuner.core.train.averaging import check_ema
from tuner.core.train.compiling import check_compile
from tuner.core.train.device import pick_device
from tuner.core.train.folder import RunFolder
from tuner.core.train.merging import read_additions
from tuner.core.train.mounting import read_extra
from tuner.core.train.prompts import resolve_prompts
from tuner.core.train.quantizing import check_quantize
from tuner.core.types import ModelFacts

T = TypeVar("T")

SHOWN = 5


@dataclass(kw_only=True)
class CheckReport:
    """What a check found. files, disk: name to a line of text. plan: the data as it would be trained. adapter: what
    would train, a line for each kind of modules; empty where the modules are not known yet, and for whole models."""

    plan: PlanReport
    files: dict[str, str] = field(default_factory=dict)
    adapter: list[str] = field(default_factory=list)
    disk: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def check(
    raw: Mapping[str, Any],
    *,
    base_dir: Path | None = None,
    resuming: bool = False,
    catalog: Catalog | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Check everything a run with this configuration needs. Raises one UsageError that lists all problems.

    resuming: the run folder is meant to hold an earlier run. on_progress: called with (files that were just decoded,
    all).
    """
    catalog = catalog or Catalog()
    document = raw if isinstance(raw, RawConfig) else load_config(raw, env={}, base_dir=base_dir)
    typed, found = examine_config(document, model_schema(catalog, family_of(document, catalog)))
    problems = Problems()
    problems.extend(found)
    if typed is None:
        problems.raise_if_any()
        raise AssertionError("a configuration without types and without a problem")
    config = typed
    opened = _collected(problems, lambda: open_facts(config, catalog, document))
    _collected(problems, lambda: check_optimizer(config.optimizer))
    _collected(problems, lambda: check_ema(config))
    _collected(problems, lambda: check_quantize(config, pick_device()))
    _collected(problems, lambda: check_compile(config, pick_device()))
    _collected(problems, lambda: check_trackers(config.log))
    for name in config.extensions:
        _collected(problems, lambda name=name: catalog.entry(EXTENSIONS, name))  # type: ignore[misc]
    facts = opened.facts if opened is not None else None
    _collected(problems, lambda: check_attention(config, facts, pick_device()))
    if opened is not None:
        config = opened.config
        problems.extend(_header_problems(opened))
        _collected(problems, lambda: resolve_prompts(config.sample, opened.facts))
        _collected(problems, lambda: check_network(config, opened.facts))
    problems.extend(_folder_problems(config, resuming=resuming or config.checkpoint.resume != "none"))
    if found:
        # Data settings that contradict each other cannot be followed.
        problems.raise_if_any()
    indices, warnings = _look_at_data(config, problems, on_progress)
    plan = _plan(config, opened.facts if opened else None, indices, problems)
    if opened is None or plan is None:
        problems.raise_if_any()
        raise AssertionError("a part is missing without a problem")
    _collected(problems, lambda: plan.left_steps(config))
    report = CheckReport(
        plan=report_plan(plan, config.train),
        files=_file_lines(opened),
        adapter=adapter_lines(config, opened.facts),
        warnings=warnings,
    )
    texts = _collected(problems, lambda: planned_texts(plan, config)) if config.cache.text != "off" else []
    if texts:
        _check_lengths(texts, config, catalog, report)
    _check_disk(plan, config, opened.facts, texts or [], report, problems)
    problems.raise_if_any()
    return report


def check_network(config: RunConfig, facts: ModelFacts) -> None:
    """Raise a UsageError for patterns that match no module, a start file that is no weight file, adapters that do not
    belong to the model they are to be merged into, or to act on in pictures, and encoders in the wrong place."""
    read_additions(config, facts)
    read_extra(config, facts)
    check_homes(config, facts)
    if config.network.init_from is not None:
        safetensors_header(config.network.init_from)
    if config.train.mode == "full":
        return
    check_targets(config.network, config.train.components, facts)


def adapter_lines(config: RunConfig, facts: ModelFacts) -> list[str]:
    """What an adapter is put beside: modules whose paths differ in numbers are one line."""
    if config.train.mode == "full":
        return []
    kinds: dict[tuple[str, str], list[Target]] = {}
    for target in check_targets(config.network, config.train.components, facts):
        path = re.sub(r"(?<![^.])\d+(?![^.])", "*", target.path)
        size = f", rank {target.rank}, alpha {target.alpha:g}" if has_rank(config.network) else ""
        rate = "" if target.lr is None else f", rate {target.lr:g}"
        kinds.setdefault((f"{target.component} {path}", f"{target.kind}{size}{rate}"), []).append(target)
    found = []
    for (path, settings), targets in kinds.items():
        values = ""
        if facts.costs is not None:
            layers = component_layers(facts.costs, targets[0].component)
            values = f", {sum(adapter_values(each, layers) for each in targets):,} values"
        found.append(f"{path}: {len(targets)} modules, {settings}{values}")
    return [*found, "norms of these components"] if found and config.network.train_norms else found


def _collected(problems: Problems, action: Callable[[], T]) -> T | None:
    try:
        return action()
    except UsageError as error:
        problems.add(error)
        return None


def _header_problems(opened: Opened) -> list[UsageError]:
    """Weight files that are cut short or something else; the denoiser's was read already."""
    found = Problems()
    for files in opened.files.values():
        for path in files:
            if path.suffix in (".safetensors", ".sft") and path not in opened.header.files:
                _collected(found, lambda path=path: safetensors_header(path))  # type: ignore[misc]
    return found.errors


def _folder_problems(config: RunConfig, *, resuming: bool) -> list[UsageError]:
    found = []
    run = RunFolder(Path(config.checkpoint.dir), config.checkpoint.name or "")
    if not resuming and run.is_used(config.log.file):
        found.append(
            UsageError(
                "the run folder is not empty",
                where=f"{run.path}, checkpoint.dir",
                fix="go on with --resume, or choose another checkpoint.dir",
            )
        )
    for key, folder in (("checkpoint.dir", config.checkpoint.dir), ("cache.dir", config.cache.dir)):
        place = _existing(Path(folder))
        if not place.is_dir():
            found.append(UsageError("a file is in the way of a folder", where=f"{place}, {key}"))
        elif not os.access(place, os.W_OK):
            found.append(UsageError("the folder cannot be written to", where=f"{place}, {key}"))
    return found


def _look_at_data(
    config: RunConfig, problems: Problems, on_progress: Callable[[int, int], None] | None
) -> tuple[dict[str, SourceIndex], list[str]]:
    """Scan every source and decode every image, so that all bad ones are listed; also what is rarely meant."""
    indices = scan_sources(config.data, Path(config.cache.dir), verify=config.cache.verify)
    found = inspect_indices(config.data, list(indices.values()), on_progress=on_progress)
    problems.extend(found.problems)
    return indices, found.warnings()


def _plan(
    config: RunConfig, facts: ModelFacts | None, indices: dict[str, SourceIndex], problems: Problems
) -> DataPlan | None:
    """Plan when everything is in order."""
    if facts is None:
        return None
    before = len(problems.errors)
    tiers = expand_tiers(config.data, config.train.batch_size, facts.resolution_multiple, problems)
    if len(problems.errors) > before or any(index.problems for index in indices.values()):
        return None
    return _collected(problems, lambda: plan_indices(config, tiers, indices))


def _file_lines(opened: Opened) -> dict[str, str]:
    lines = {}
    for name, files in opened.files.items():
        weights = sum(path.stat().st_size for path in files if path.is_file())
        lines[name] = f"{files[0]} ({size_text(weights)})" if files else "code alone, without weights"
    lines["model"] = " ".join(filter(None, (opened.facts.family, opened.facts.flavour, opened.facts.architecture)))
    return lines


def _check_lengths(texts: Sequence[str], config: RunConfig, catalog: Catalog, report: CheckReport) -> None:
    """Captions that would be cut, by tokenizer, with the longest of them."""
    entry = catalog.entry(MODELS, config.model.family)
    reference = catalog.model(entry.name).count_tokens
    if reference is None:
        report.warnings.append(
            "this model cannot count tokens; captions over the limit are cut without being listed here"
        )
        return
    counters = catalog.call(entry, "token counter", catalog.load(entry, "descriptor", reference), config)
    for name, count in counters.items():
        limit = config.text_encoder.max_tokens.get(name)
        if limit is None:
            continue
        lengths = count(texts)
        over = sorted(((n, text) for n, text in zip(lengths, texts, strict=True) if n > limit), reverse=True)
        if over:
            shown = "; ".join(f"{n}: {_short(text)}" for n, text in over[:SHOWN])
            report.warnings.append(f"captions with more than {limit} {name} tokens are cut, here {len(over)}: {shown}")


def _check_disk(
    plan: DataPlan,
    config: RunConfig,
    facts: ModelFacts,
    texts: Sequence[str],
    report: CheckReport,
    problems: Problems,
) -> None:
    latents = latent_bytes(cached_pixels(plan), config, facts) if config.cache.latents == "disk" else 0
    encoded = text_bytes(len(texts), config, facts) if config.cache.text == "disk" else 0
    folder = _existing(Path(config.cache.dir))
    free = shutil.disk_usage(folder).free
    need = latents + encoded
    report.disk["cache"] = f"at most {size_text(need)} in {config.cache.dir}, {size_text(free)} free"
    run_free = shutil.disk_usage(_existing(Path(config.checkpoint.dir))).free
    report.disk["run folder"] = f"{config.checkpoint.dir}, {size_text(run_free)} free"
    if need > free:
        problems.add(
            UsageError(
                "there is not enough space for the cache",
                where=f"{config.cache.dir}, cache.dir",
                why=f"it may need {size_text(need)}, {size_text(free)} are free",
                fix="set cache.dir to a folder on a larger disk",
            )
        )


def _existing(path: Path) -> Path:
    """The nearest part of ``path`` that is there."""
    return next((place for place in (path, *path.parents) if place.exists()), Path.cwd())


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def size_text(count: int) -> str:
    """Bytes for people: ``1.4 GB``."""
    value = float(count)
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
