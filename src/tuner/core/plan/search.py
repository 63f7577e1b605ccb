"""The fastest way to run a configuration in a given amount of memory, and what each lever costs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tuner.core.optim.names import entry_of
from tuner.core.plan.devices import DEVICES, Device
from tuner.core.plan.plan import Plan, costs_of, predict
from tuner.core.plan.trained import FULL, trained_values
from tuner.core.plan.work import Work
from tuner.core.track.progress import byte_size

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.types import ModelFacts

LEVELS = ("off", "selective", "keep_attention", "block")
METHODS = ("int8", "nf4")
"""Quantized weights that the search tries: half and a quarter of the bytes."""
WORTH = 0.10
"""How much faster a lossy way must be before it is taken although a lossless one fits."""
REFERENCE = "4090"
"""Whose rates compare levers where the device's own are not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way. changes: keys and values that differ from the configuration. seconds: per update, on the device or,
    where its rates are not known, on the one that ways are compared on. divisor: of the size of micro-batches."""

    changes: tuple[tuple[str, Any], ...]
    plan: Plan
    seconds: float
    lossless: bool
    divisor: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """memory: bytes that were given. fits: whether ``best`` does; else it is the nearest miss. faster: a way that
    changes results and would be faster. as_is: the configuration unchanged. why: what each lever chosen saves and
    costs, by its key; of keys that go together, by the first."""

    memory: float
    fits: bool
    best: Candidate
    as_is: Candidate
    faster: Candidate | None
    why: Mapping[str, str]

    def lines(self) -> list[str]:
        """The levers chosen: ``key = value``, and why."""
        return [f"{key} = {value}: {self.why[key]}" for key, value in self.best.changes if key in self.why]


class _Planner:
    """Makes candidates. What no lever changes is worked out once."""

    def __init__(self, config: RunConfig, facts: ModelFacts, work: Work, device: Device, memory: float) -> None:
        self.config, self.facts, self.work = config, facts, work
        self.device = replace(device, memory=memory)
        self.timed = device if device.is_timed else DEVICES[REFERENCE]
        self.values = trained_values(config, facts, costs_of(facts))

    def candidate(self, changes: Mapping[str, Any], divisor: int = 1) -> Candidate:
        """The configuration with other values at some keys, and micro-batches of a ``divisor``-th of the size."""
        config = changed_config(self.config, changes)
        work = self.work.divided(divisor)
        plan = predict(config, self.facts, work, self.device, trained=self.values)
        seconds = plan.seconds
        if seconds is None:
            seconds = predict(config, self.facts, work, self.timed, trained=self.values).seconds
        assert seconds is not None
        different = tuple((key, value) for key, value in changes.items() if _value(self.config, key) != value)
        lossless = not any(key == "quantize.denoiser" for key, _ in different)
        return Candidate(changes=different, plan=plan, seconds=seconds, lossless=lossless, divisor=divisor)


def fit(config: RunConfig, facts: ModelFacts, work: Work, device: Device, memory: float) -> Choice:
    """Choose streaming, recomputation, quantized weights, the size of micro-batches and where the optimizer's state
    lies, so that every phase fits into ``memory`` bytes, and updates are as fast as they can be.

    The samples of an update stay the same: smaller micro-batches are accumulated. Quantized weights change results:
    they are taken when nothing else fits, and named when they would be at least a tenth faster.
    """
    planner = _Planner(config, facts, work, device, memory)
    encoders = _encoder_settings(planner, memory)
    as_is = planner.candidate({})
    every = [planner.candidate({**changes, **encoders}, divisor) for changes, divisor in _ways(config, facts, work)]
    fitting = [each for each in every if each.plan.needed() <= memory]
    lossless = min((each for each in fitting if each.lossless), key=_order, default=None)
    lossy = min((each for each in fitting if not each.lossless), key=_order, default=None)
    best = lossless or lossy or min(every, key=lambda each: each.plan.needed())
    faster = None
    if lossless is not None and lossy is not None and lossy.seconds < lossless.seconds * (1 - WORTH):
        faster = lossy
    return Choice(
        memory=memory, fits=bool(fitting), best=best, as_is=as_is, faster=faster, why=dict(_reasons(best, planner))
    )


def _order(candidate: Candidate) -> tuple[float, int]:
    # Fewer levers at equal speed.
    return round(candidate.seconds, 4), len(candidate.changes)


def _ways(config: RunConfig, facts: ModelFacts, work: Work) -> Iterator[tuple[dict[str, Any], int]]:
    """Every combination that is tried, as (changed keys, what micro-batches are divided by)."""
    full = str(config.train.mode) == FULL
    quantized: list[str | None] = [config.quantize.denoiser]
    if not full and config.quantize.denoiser is None:
        quantized += [each for each in METHODS if f"quantize.{each}" not in facts.capabilities]
    offloads = [config.optimizer.offload]
    if full and _separate(config) and not config.optimizer.offload:
        offloads.append(True)
    settings = itertools.product(
        _divisors(config, work), quantized, offloads, _levels(config), _streams(config, facts, full)
    )
    for divisor, method, offload, level, streamed in settings:
        changes: dict[str, Any] = {
            "memory.checkpointing": level,
            "memory.swap_blocks": streamed,
            "quantize.denoiser": method,
            "optimizer.offload": offload,
        }
        if divisor > 1:
            changes["train.batch_size"] = config.train.batch_size // divisor
            changes["train.accumulate"] = config.train.accumulate * divisor
        yield changes, divisor


def changed_config(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The configuration with other values at dotted keys."""
    found = config
    for key, value in changes.items():
        section, _, name = key.partition(".")
        part = getattr(found, section)
        if "." in name:
            name, _, inner = name.partition(".")
            value = {**getattr(part, name), inner: value}
        found = found.model_copy(update={section: part.model_copy(update={name: value})})
    memory = found.memory
    if memory.checkpointing == "off" and (memory.checkpoint_every != 1 or memory.offload_activations != "off"):
        memory = memory.model_copy(update={"checkpoint_every": 1, "offload_activations": "off"})
        found = found.model_copy(update={"memory": memory})
    return found


def _streams(config: RunConfig, facts: ModelFacts, full: bool) -> Sequence[int]:
    """Numbers of streamed blocks to try: what is configured, none, quarters, and all but two."""
    if full and not _separate(config):
        return (config.memory.swap_blocks,)
    limit = sum(each.count for each in facts.block_lists) - 2
    steps = {round(limit * part / 8) for part in range(1, 9)}
    return sorted({0, config.memory.swap_blocks, *(each for each in steps if 2 <= each <= limit)})


def _levels(config: RunConfig) -> tuple[str, ...]:
    """Recompute levels that go with the rest: a compiled block cannot keep the results of single operations."""
    return ("off", "block") if config.compile.enabled else LEVELS


def _divisors(config: RunConfig, work: Work) -> list[int]:
    """What micro-batches can be divided by. Sets that name their own sizes keep them."""
    size = config.train.batch_size
    if not work.common:
        return [1]
    return [each for each in range(1, size + 1) if all(shape.batch % each == 0 for shape in work.shapes)]


def _separate(config: RunConfig) -> bool:
    """Whether the optimizer goes with state, or weights, that come from host memory a few at a time."""
    entry = entry_of(config.optimizer.name)
    return entry is not None and entry.separate


def _encoder_settings(planner: _Planner, memory: float) -> dict[str, Any]:
    """Quantization of the largest text encoder, when captions do not fit otherwise."""
    config, facts = planner.config, planner.facts
    frozen = [name for name in facts.text_components if name not in config.train.components]
    if not frozen or config.quantize.text_encoder:
        return {}
    parts = costs_of(facts).parts
    key = f"quantize.text_encoder.{max(frozen, key=lambda name: parts[name].parameters)}"
    tried: dict[str, Any] = {}
    for method in (None, *METHODS):
        tried = {} if method is None else {key: method}
        plan = planner.candidate(tried).plan
        phase = next((each for each in plan.phases if each.name == "captions"), None)
        if phase is None or plan.needed(phase) <= memory:
            break
    return tried


def _value(config: RunConfig, key: str) -> Any:
    found: Any = config
    for name in key.split("."):
        found = found.get(name) if isinstance(found, dict) else getattr(found, name)
    return found


# --- saying why -------------------------------------------------------------------------------------------------------

WHAT = {
    "memory.checkpointing": "exact",
    "memory.swap_blocks": "exact",
    "optimizer.offload": "exact",
    "train.batch_size": "the same samples per update",
    "train.accumulate": "the same samples per update",
    "quantize.denoiser": "changes results a little",
    "quantize.text_encoder": "captions are encoded a little differently",
}


def _reasons(best: Candidate, planner: _Planner) -> Iterator[tuple[str, str]]:
    """(key, what it saves and what it costs) of each lever: the plan against the same plan without it."""
    pairs = {"train.batch_size": ("train.batch_size", "train.accumulate")}
    done: set[str] = set()
    for key, _ in best.changes:
        if key in done:
            continue
        together = pairs.get(key, (key,))
        done |= set(together)
        without = {name: each for name, each in best.changes if name not in together}
        other = planner.candidate(without, 1 if key == "train.batch_size" else best.divisor)
        kind = next(text for start, text in WHAT.items() if key.startswith(start))
        saved = other.plan.needed() - best.plan.needed()
        if key.startswith("quantize.text_encoder"):
            saved = other.plan.needed(other.plan.phase("captions")) - best.plan.needed(best.plan.phase("captions"))
        slower = best.seconds / other.seconds - 1
        effect = f"{byte_size(abs(saved))} {'less' if saved >= 0 else 'more'}"
        pace = "as fast" if abs(slower) < 0.005 else f"{abs(slower):.0%} {'slower' if slower > 0 else 'faster'}"
        yield key, f"{effect} than without, {pace}; {kind}"
