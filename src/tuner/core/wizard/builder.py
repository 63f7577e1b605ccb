"""What the answers mean for the configuration, whether it is new or being changed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from tuner.core.config.document import value_at
from tuner.core.config.jsonc import Path
from tuner.core.errors import UsageError
from tuner.core.plan.plan import Plan
from tuner.core.registry import Catalog, preset_names, read_preset
from tuner.core.track.progress import byte_size
from tuner.core.types import ModelFacts
from tuner.core.wizard import reasons
from tuner.core.wizard.card import Card, choose_card
from tuner.core.wizard.document import GONE, shortened, with_values
from tuner.core.wizard.goals import (
    FULL,
    SMALL,
    Pace,
    Settings,
    buckets_of,
    edge_of,
    goal_options,
    granularity,
    settings_of,
)
from tuner.core.wizard.pictures import ChosenPictures
from tuner.core.wizard.questions import NOTHING, Interview, Option, Question, text_or_nothing
from tuner.core.wizard.ways import Way, find_ways

PLANNED_FIRST = "balanced"
KEEP = "="
"""What is typed to leave several prompts, or those of a file, as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """path: where ``text`` belongs. before: what the file holds now, None for a new one. plan: of the chosen preset.
    names_model: whether it says which model it is for, so that the command line need not."""

    path: FilePath
    text: str
    before: str | None
    plan: Plan | None
    names_model: bool = True


@dataclass(slots=True, kw_only=True)
class Builder:
    """Collects what the answers mean. target: the file; paths in it start at its folder. scratch: a folder that is
    thrown away, for what is learned about pictures. draws: whether it is to say how often and how large is drawn."""

    interview: Interview
    catalog: Catalog
    target: FilePath
    scratch: FilePath
    document: dict[str, Any] = field(default_factory=dict)
    comments: dict[Path, str] = field(default_factory=dict)
    draws: bool = False

    @property
    def base(self) -> FilePath:
        return self.target.parent

    def put(self, path: Path, value: Any, why: str = "") -> None:
        self.document = with_values(self.document, {path: shortened(value, self.base)})
        if why:
            self.comments[path] = why

    def apply(self, settings: Settings) -> None:
        self.document = with_values(self.document, settings.values)
        self.comments |= settings.comments

    # --- the pictures -------------------------------------------------------------------------------------------------

    def put_pictures(self, chosen: ChosenPictures, path: Path, identifier: str) -> None:
        """The source at ``path``: what the answers say, and what it had besides."""
        before = value_at(self.document, path) or {}
        kept = {key: value for key, value in before.items() if key not in ("path", "recursive", "captions")}
        self.put(path, {"id": identifier, **kept, **chosen.source})
        for key, value in chosen.data.items():
            self.put(("data", key), value)
        for key, why in chosen.comments.items():
            place = ("data", key.removeprefix("data.")) if key.startswith("data.") else (*path, key)
            self.comments[place] = why

    # --- goal, card, preset -------------------------------------------------------------------------------------------

    def choose_way(self, facts: ModelFacts | None, images: int, edge: int, size_at: Path | None) -> Way:
        """Ask for goal, size and card, then offer what can be done with them. size_at: where the edge is written."""
        goal = self.interview.choose("goal", "What is it to learn?", goal_options(facts))
        if size_at is not None:
            edge = self._ask_edge(edge, facts)
        card = choose_card(self.interview)
        preset = self._preset()
        was_full = value_at(self.document, ("train", "mode")) == FULL

        def settings(pace: Pace) -> Settings:
            cpu = card.memory is None
            found = settings_of(goal, pace, images, preset, cpu=cpu, was_full=was_full and goal != FULL)
            if size_at is not None:
                self._put_edge(found, edge_of(edge, pace, facts), size_at, facts)
            if self.draws and value_at(self.document, ("sample", "prompts")):
                self._put_samples(found, None if size_at is None else found.values[size_at])
            return found

        ways = find_ways(
            lambda pace: with_values(self.document, settings(pace).values),
            card,
            self.catalog,
            base=self.base,
            scratch=self.scratch,
        )
        way = self._offer(ways, {way.name: settings(way.pace) for way in ways}, size_at, card)
        chosen = settings(way.pace)
        for key, value in way.changes.items():
            chosen.put(key, value, _reason(way.reasons.get(key, "")))
        self.apply(chosen)
        return way

    def _ask_edge(self, edge: int, facts: ModelFacts | None) -> int:
        multiple = granularity(facts)

        def read(raw: Any) -> int:
            text = str(raw).strip()
            if not text.isdigit() or not multiple <= int(text) <= 4096:
                raise UsageError("a number of pixels is needed", fix=f"from {multiple} to 4096, such as 1024")
            return int(text) // multiple * multiple

        return self.interview.ask(
            Question(
                id="size",
                text="At which size shall it train?",
                help="Edge in pixels of a square with the area of the pictures; other shapes get the same area.",
                read=read,
                default=str(edge),
            )
        )

    def _put_edge(self, settings: Settings, edge: int, path: Path, facts: ModelFacts | None) -> None:
        settings.values[path] = edge
        settings.comments[path] = reasons.EDGE
        buckets = buckets_of(edge, facts)
        place = (*path[:-1], "buckets")
        if buckets is not None and value_at(self.document, place) is None:
            settings.values[place] = buckets
            settings.comments[place] = reasons.BUCKETS

    def _preset(self) -> dict[str, Any]:
        """What the model's author advises for adapters."""
        family = str(value_at(self.document, ("model", "family")))
        names = preset_names(self.catalog, family)
        return read_preset(self.catalog, f"{family}/lora") if "lora" in names else {}

    def _offer(self, ways: list[Way], settings: Mapping[str, Settings], size_at: Path | None, card: Card) -> Way:
        by_name = {way.name: way for way in ways}
        options = tuple(
            Option(value=way.name, title=f"{way.name}: {_summary(settings[way.name], size_at)}; {way.cost()}")
            for way in ways
        )
        fitting = [way.name for way in ways if way.fits is not False]
        default = PLANNED_FIRST if PLANNED_FIRST in fitting or not fitting else fitting[0]
        name = self.interview.choose(
            "preset",
            "Which of them?",
            options,
            default=default,
            help="Quality against time and memory; the longer ones look at each picture more often.",
        )
        way = by_name[name]
        if way.plan is not None:
            self.interview.tell(*_plan_lines(way.plan, card))
        if fewer := [key for key, value in way.changes.items() if key.startswith("quantize.") and value]:
            self.interview.tell(f"weights in fewer bits change results a little: {', '.join(fewer)}")
        return way

    # --- samples ------------------------------------------------------------------------------------------------------

    def choose_prompt(self, suggestion: str) -> None:
        """Comes before the preset, because drawing takes memory too."""
        now = value_at(self.document, ("sample", "prompts"))
        several = "" if not isinstance(now, str) else f"those of {now}"
        if isinstance(now, list) and len(now) == 1:
            suggestion = str(now[0])
        elif isinstance(now, list) and now:
            several = f"the {len(now)} prompts"
        keep = f" {KEEP} keeps {several} that there are." if several else ""
        prompt = self.interview.ask(
            Question(
                id="prompt",
                text="Which prompt shall be drawn now and then, to see how it goes?",
                help=f"{NOTHING} for no pictures, which saves their time.{keep}",
                read=text_or_nothing,
                default=KEEP if several else suggestion or NOTHING,
            )
        )
        if several and prompt == KEEP:
            return
        self.draws = bool(prompt)
        if prompt:
            every = value_at(self.document, ("checkpoint", "every"))
            self.put(("sample", "prompts"), [prompt], reasons.PROMPTS)
            if value_at(self.document, ("sample", "every")) is None and every is not None:
                self.put(("sample", "every"), every)
        else:
            # None of these has an effect without a prompt, which is an error in a configuration.
            self.put(("sample",), GONE)
            self.put(("attention", "sample_backend"), GONE)

    def _put_samples(self, settings: Settings, edge: int | None) -> None:
        """How often and how large the prompt is drawn, where nothing is said about it yet."""
        if value_at(self.document, ("sample", "every")) is None:
            settings.put("sample.every", settings.values["checkpoint", "every"])
        if edge is not None and edge < SMALL and value_at(self.document, ("sample", "size")) is None:
            settings.put("sample.size", edge, reasons.SAMPLE_SIZE)

    def _is_taken(self, folder: str) -> bool:
        """Whether there is something in a folder that is named from the configuration's."""
        place = FilePath(self.base, folder)
        return place.exists() and (not place.is_dir() or any(place.iterdir()))

    def choose_folder(self, suggestion: str) -> None:
        """The name of the run, which is its folder's."""
        written = value_at(self.document, ("checkpoint", "dir"))
        before = written if isinstance(written, str) and written else None

        def read(raw: Any) -> str:
            name = str(raw).strip()
            if not re.fullmatch(r"[\w. -]+", name) or name.startswith("."):
                raise UsageError("this cannot be the name of a folder", fix="letters, digits, - and _")
            folder = f"out/{name}" if before is None else str(FilePath(before).with_name(name).as_posix())
            if folder != before and self._is_taken(folder):
                raise UsageError("there is such a run already", where=folder, fix="choose another name")
            return folder

        default = suggestion if before is None else FilePath(before).name
        if before is None and self._is_taken(f"out/{suggestion}"):
            numbered = (f"{suggestion}-{number}" for number in itertools.count(2))
            default = next(name for name in numbered if not self._is_taken(f"out/{name}"))
        folder = self.interview.ask(
            Question(id="name", text="What is the training to be called?", read=read, default=default)
        )
        self.put(("checkpoint", "dir"), folder, reasons.FOLDER)


def _reason(text: str) -> str:
    return text or reasons.PLANNED


def _summary(settings: Settings, size_at: Path | None) -> str:
    rank, steps = settings.values.get(("network", "rank")), settings.values[("train", "steps")]
    parts = [f"rank {rank}"] if rank is not None and rank is not GONE else ["all weights"]
    if size_at is not None:
        parts.append(f"{settings.values[size_at]} px")
    return ", ".join([*parts, f"{steps} steps"])


def _plan_lines(plan: Plan, card: Card) -> list[str]:
    lines = [f"plan for {plan.device}: {plan.line()}"]
    for each in plan.phases:
        needed = byte_size(plan.needed(each)) if each.device else f"{byte_size(each.host)} of host memory"
        lines.append(f"  {each.name}: {needed}")
    if card.memory is not None and plan.needed() > card.memory:
        lines.append(f"  this does not fit into {byte_size(card.memory)}")
    return lines + [f"  note: {note}" for note in plan.notes]
