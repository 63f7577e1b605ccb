"""The presets that are offered: each with the memory and the time that the planner predicts for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from tuner.core.config import load_config
from tuner.core.errors import UsageError
from tuner.core.plan.plan import Plan, predict
from tuner.core.plan.prepare import prepare
from tuner.core.plan.search import Candidate, fit
from tuner.core.registry import Catalog
from tuner.core.track.progress import byte_size
from tuner.core.wizard.card import Card
from tuner.core.wizard.goals import PACES, Pace
from tuner.core.wizard.reasons import FEWER_BITS

FASTER = "faster"
"""The balanced way with base weights in fewer bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """name: what an answers file says. changes: keys that make it fit, with their reasons. plan: None when there can be
    none, ``unknown`` says why. fits: whether the card has the memory, None when that is not known."""

    name: str
    pace: Pace
    changes: Mapping[str, Any]
    reasons: Mapping[str, str]
    plan: Plan | None
    fits: bool | None
    unknown: str = ""

    def cost(self) -> str:
        """Memory and time, in words."""
        if self.plan is None:
            return f"memory and time unknown: {self.unknown}"
        memory = self.plan.needed()
        parts = [byte_size(memory) if memory else f"{byte_size(self.plan.host)} of host memory"]
        if self.fits is False:
            parts[0] = f"DOES NOT FIT, needs {parts[0]}"
        seconds = self.plan.run_seconds
        parts.append("time unknown" if seconds is None else _about(seconds))
        if any(key.startswith("quantize.denoiser") for key in self.changes):
            parts.append("base weights in fewer bits")
        return ", ".join(parts)


def _about(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    if not hours:
        return f"about {minutes} min" if minutes else "less than a minute"
    return f"about {hours} h {minutes} min"


def find_ways(
    document: Callable[[Pace], Mapping[str, Any]], card: Card, catalog: Catalog, *, base: FilePath, scratch: FilePath
) -> list[Way]:
    """Two to four ways. document: the configuration at a pace, its paths relative to ``base``. scratch: a folder for
    what is learned about pictures."""
    found: list[Way] = []
    for pace in PACES:
        found.extend(_ways(document(pace), pace, card, catalog, base=base, scratch=scratch))
    return found


def _ways(
    document: Mapping[str, Any], pace: Pace, card: Card, catalog: Catalog, *, base: FilePath, scratch: FilePath
) -> list[Way]:
    cache = document.get("cache")
    plain = {**document, "cache": {**(cache if isinstance(cache, Mapping) else {}), "dir": str(scratch)}}
    try:
        config, facts, work = prepare(load_config(plain, env={}, base_dir=base), catalog=catalog)
        if card.memory is None:
            plan = predict(config, facts, work, card.device)
            return [Way(name=pace, pace=pace, changes={}, reasons={}, plan=plan, fits=None)]
        choice = fit(config, facts, work, card.device, card.memory)
    except UsageError as problem:
        return [Way(name=pace, pace=pace, changes={}, reasons={}, plan=None, fits=None, unknown=problem.what)]
    ways = [_way(pace, pace, choice.best, choice.why, fits=choice.fits)]
    if pace == "balanced" and choice.faster is not None:
        ways.append(_way(FASTER, pace, choice.faster, {"quantize.denoiser": FEWER_BITS}, fits=True))
    return ways


def _way(name: str, pace: Pace, candidate: Candidate, reasons: Mapping[str, str], *, fits: bool) -> Way:
    changes = dict(candidate.changes)
    return Way(name=name, pace=pace, changes=changes, reasons=reasons, plan=candidate.plan, fits=fits)
