"""What is to be learned, in a user's words, as settings: sizes, lengths and rates, each with its reason.

The numbers are starting points that many published recipes for adapters share, not measurements of this program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tuner.core.config.jsonc import Path
from tuner.core.wizard.document import GONE
from tuner.core.wizard.questions import Option

if TYPE_CHECKING:
    from tuner.core.types import ModelFacts

Pace = Literal["quick", "balanced", "thorough"]
FULL = "full"
NATIVE = 1024
"""Edge that a model is used at when its facts are not known."""
SMALL = 512
"""Below this edge the defaults for buckets and samples are too coarse."""
AS_PRESET = "as the model's own preset has it"
ROUND = 50
"""Steps are multiples of this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """per_picture: updates for each picture, within the limits. why: for the comment."""

    title: str
    rank: int
    per_picture: int
    least: int
    most: int
    why: str


GOALS: Mapping[str, Goal] = {
    "character": Goal(title="a character or a person", rank=16, per_picture=80, least=600, most=3000,
                      why="one subject needs few numbers, and each picture some 80 looks"),
    "style": Goal(title="a style", rank=32, per_picture=60, least=1000, most=5000,
                  why="a style touches the whole picture and takes more numbers than a subject"),
    "concept": Goal(title="a concept: a thing, a pose, clothes", rank=16, per_picture=60, least=600, most=3000,
                    why="one idea needs few numbers, and each picture some 60 looks"),
    FULL: Goal(title="the whole model, with many pictures", rank=0, per_picture=40, least=2000, most=20000,
               why="all weights train: slow, large, and made for hundreds of pictures"),
}  # fmt: skip
PACES: Mapping[Pace, tuple[float, float, float]] = {
    "quick": (0.5, 0.5, 0.75),
    "balanced": (1.0, 1.0, 1.0),
    "thorough": (1.75, 2.0, 1.0),
}
"""Factors on updates, rank and edge."""


def goal_options(facts: ModelFacts | None) -> tuple[Option, ...]:
    """What this model can be taught."""
    whole = facts is None or (bool(facts.stored) and "full.denoiser" not in facts.capabilities)
    return tuple(Option(value=name, title=goal.title) for name, goal in GOALS.items() if whole or name != FULL)


@dataclass(slots=True)
class Settings:
    """values: by path of the configuration, `GONE` for a key that must not be there. comments: why, by path."""

    values: dict[Path, Any] = field(default_factory=dict)
    comments: dict[Path, str] = field(default_factory=dict)

    def put(self, path: str, value: Any, why: str = "") -> None:
        place = tuple(path.split("."))
        self.values[place] = value
        if why:
            self.comments[place] = why


def best_edge(size: int, facts: ModelFacts | None) -> int:
    """The edge to train at: the model's own, unless the pictures are smaller. size: edge of the median picture."""
    native = NATIVE if facts is None else round((facts.sample.size[0] * facts.sample.size[1]) ** 0.5)
    multiple = granularity(facts)
    below = size // 64 * 64 or size // multiple * multiple or multiple
    return min(native, below)


def granularity(facts: ModelFacts | None) -> int:
    """Pixels that the edges of pictures are multiples of; at least 16."""
    return 16 if facts is None else max(facts.resolution_multiple, 16)


def edge_of(edge: int, pace: Pace, facts: ModelFacts | None) -> int:
    """The edge at a pace, a multiple of what the model takes."""
    multiple = granularity(facts)
    return max(multiple, round(edge * PACES[pace][2]) // multiple * multiple)


def steps_of(goal: str, pace: Pace, images: int) -> int:
    """Updates for a goal at a pace with so many pictures, a multiple of `ROUND`."""
    chosen = GOALS[goal]
    steps = min(max(images * chosen.per_picture, chosen.least), chosen.most) * PACES[pace][0]
    return max(ROUND, round(steps / ROUND) * ROUND)


def settings_of(
    goal: str, pace: Pace, images: int, preset: Mapping[str, Any], *, cpu: bool, was_full: bool = False
) -> Settings:
    """The settings of a goal. preset: what the model's author advises for adapters. cpu: there is no card.

    was_full: the configuration trained the whole model before, so that what belongs to that goes.
    """
    chosen, found = GOALS[goal], Settings()
    steps = steps_of(goal, pace, images)
    if goal == FULL:
        found.put("network", GONE)
        found.put("train.mode", "full", chosen.why)
        found.put("train.clip_grad", None)
        found.put("optimizer.name", "adafactor", "keeps little state beside weights that all train")
        found.put("optimizer.lr", 1e-5, "a tenth of what an adapter takes")
        found.put("optimizer.fuse", "block", "gradients go as soon as they are used; this leaves no clipping")
        if not cpu:
            found.put("optimizer.rounding", "stochastic", "small updates are not lost in bfloat16")
    else:
        rank = max(4, round(chosen.rank * PACES[pace][1]))
        if was_full:
            for key in ("train.mode", "train.clip_grad", "optimizer.name", "optimizer.fuse", "optimizer.rounding"):
                found.put(key, GONE)
        found.put("network.rank", rank, chosen.why)
        found.put("network.alpha", rank, "as the rank, so that the learning rate means the same at every rank")
        for key, value in preset.get("network", {}).items():
            if key not in ("rank", "alpha"):
                found.put(f"network.{key}", value, AS_PRESET)
        rate = preset.get("optimizer", {}).get("lr", 1e-4)
        found.put(
            "optimizer.lr", rate, "the usual start; halve it when pictures burn out, double it when nothing happens"
        )
    found.put("train.steps", steps, f"{images} pictures; look at the samples, the best may come earlier")
    found.put("train.epochs", GONE)
    if cpu:
        found.put("precision.compute", "fp32", "there is no card; bfloat16 is slow on processors")
    every = max(ROUND, round(steps / 8 / ROUND) * ROUND)
    found.put("checkpoint.every", every, "kept to choose from")
    return found


def buckets_of(edge: int, facts: ModelFacts | None) -> dict[str, int] | None:
    """Settings of the buckets for edges below the usual: sides in finer steps. None where the defaults serve."""
    if edge >= SMALL:
        return None
    step = granularity(facts)
    return {"step": step, "min": max(step, edge // 2 // step * step)}
