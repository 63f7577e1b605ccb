"""Plans against memory that others have published, and against the goals of this program, at public sizes.

A row is comparable when it states model, resolution, batch and the levers, and when what it holds is what we hold. Rows
without recomputation of other trainers are not: they keep other activations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.core.plan.plans import planned, prepared
from tuner.core.plan.devices import device_named
from tuner.core.plan.plan import predict
from tuner.core.plan.search import Choice, changed_config, fit

GIB = 2**30
PAGE = Path(__file__).parents[3] / "docs/explanation/memory.md"
ATTENTION = [r".*attn2?\.(to_[qkv]|to_out\.0)"]


@dataclass(frozen=True)
class Row:
    """published: bytes. of: ``step`` compares tensors of a step, ``card`` what a card must have free for it."""

    model: str
    published: float
    source: str
    of: str = "step"
    sections: dict[str, Any] = field(default_factory=dict)


BLOCK = {"memory": {"checkpointing": "block"}}
ROWS = {
    "anima recomputed": Row("anima", 5.20e9, "WalkingMeatAxolotl/AnimaLoraStudio, pull request 490", sections=BLOCK),
    "anima rank 64": Row(
        "anima", 17.26 * GIB, "bghira/SimpleTuner, SEGMENTED_CHECKPOINTING.md, H100", sections={"network": {"rank": 64}}
    ),
    "anima rank 64 recomputed": Row(
        "anima", 5.60 * GIB, "bghira/SimpleTuner, SEGMENTED_CHECKPOINTING.md, H100",
        sections={"network": {"rank": 64}, **BLOCK},
    ),
    "sd35-medium batch 3 recomputed": Row(
        "sd35-medium", 7.67 * GIB, "bghira/SimpleTuner, SEGMENTED_CHECKPOINTING.md, H100",
        sections={"network": {"rank": 128, "targets": ATTENTION}, "train": {"batch_size": 3}, **BLOCK},
    ),
    "flux bf16": Row("flux", 26e9, "huggingface.co/blog/flux-qlora", sections=BLOCK),
    "flux nf4 512 px": Row(
        "flux", 9.09e9, "bghira/SimpleTuner, quickstart/FLUX.md, RTX 4090", of="card",
        sections={"resolution": 512, "quantize": {"denoiser": "nf4"}, "optimizer": {"name": "paged_lion8bit"}, **BLOCK},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_plan_is_within_15_percent_of_what_was_published(name: str) -> None:
    row = ROWS[name]
    plan = planned(row.model, **row.sections)
    step = plan.phase("step")
    found = step.device if row.of == "step" else plan.needed(step)
    assert found == pytest.approx(row.published, rel=0.15)
    assert f"| {found / 1e9:.2f} GB |" in PAGE.read_text(encoding="utf-8")


def levers(level: str, method: str | None = None, streamed: int = 0) -> dict[str, Any]:
    return {"memory": {"checkpointing": level, "swap_blocks": streamed}, "quantize": {"denoiser": method}}


GOALS = {
    "24 GB": ("anima", 17.0, levers("off")),
    "16 GB": ("anima", 12.5, levers("selective")),
    "12 GB, int8": ("anima", 10.5, levers("selective", "int8")),
    "8 GB": ("anima", 7.2, levers("keep_attention")),
    "6 GB, int8": ("anima", 4.8, levers("block", "int8")),
    "4 GB, streamed": ("anima", 3.2, levers("block", streamed=26)),
    "flux int8 on 16 GiB": ("flux", 16 * 2**30 / 1e9, levers("block", "int8")),
    "flux int8 streamed on 8 GB": ("flux", 8.0, levers("block", "int8", 52)),
}
"""Goals in GB for what a card must have free in a step, at 1024 x 1024 pixels and batch 1."""


@pytest.mark.parametrize("name", GOALS)
def test_a_plan_meets_its_memory_goal(name: str) -> None:
    model, goal, sections = GOALS[name]
    plan = planned(model, **sections)
    assert 0.7 * goal <= plan.needed(plan.phase("step")) / 1e9 <= goal


@pytest.mark.parametrize(("offload", "goal"), [(False, 10.5), (True, 7.0)])
def test_full_fine_tuning_meets_its_memory_goal(offload: bool, goal: float) -> None:
    """bf16 weights rounded stochastically, state in 8 bits, updates inside the backward pass."""
    config, facts, work = prepared("anima", memory={"checkpointing": "block"})
    changes = {"train.mode": "full", "optimizer.name": "adamw8bit", "optimizer.rounding": "stochastic",
               "optimizer.fuse": "block", "optimizer.offload": offload}  # fmt: skip
    plan = predict(changed_config(config, changes), facts, work, device_named("4090"))
    assert 0.7 * goal <= plan.needed(plan.phase("step")) / 1e9 <= goal


CARDS = (6, 8, 12, 16, 24, 80)
CHOSEN: dict[str, tuple[tuple[str, int, str | None], ...]] = {
    "anima": (
        ("keep_attention", 10, None), ("keep_attention", 0, None), ("selective", 3, None), ("off", 6, None),
        ("off", 0, None), ("off", 0, None),
    ),
    "flux": (
        ("block", 55, "int8"), ("block", 55, None), ("keep_attention", 48, None), ("keep_attention", 41, None),
        ("selective", 55, None), ("off", 0, None),
    ),
    "sd35-medium": (
        ("keep_attention", 11, None), ("selective", 19, None), ("off", 14, None), ("off", 0, None),
        ("off", 0, None), ("off", 0, None),
    ),
    "sd35-large": (
        ("block", 36, None), ("keep_attention", 32, None), ("block", 22, None), ("keep_attention", 14, None),
        ("selective", 14, None), ("off", 0, None),
    ),
}  # fmt: skip
"""(recompute level, streamed blocks, quantized weights) that are chosen for each card at 1024 px, batch 1; the table of
the page on memory is this one."""


TITLES = {"anima": "Anima", "flux": "FLUX.1 dev", "sd35-medium": "SD3.5 medium", "sd35-large": "SD3.5 large"}


def page_row(model: str, card: int, choice: Choice) -> str:
    """The row of the page for a card."""
    chosen = dict(choice.best.changes)
    keys = [f"`{key.removeprefix('memory.')}` {value}" for key, value in chosen.items()]
    plan = choice.best.plan
    cells = (TITLES[model], f"{card} GB", ", ".join(keys) or "nothing", f"{plan.needed() / 1e9:.1f} GB")
    return f"| {' | '.join(cells)} | {choice.best.seconds:.2f} s |"


@pytest.mark.parametrize("model", CHOSEN)
def test_every_card_gets_a_plan_that_fits_and_is_as_the_page_says(model: str) -> None:
    config, facts, work = prepared(model)
    page = PAGE.read_text(encoding="utf-8").splitlines()
    seconds = []
    for card, expected in zip(CARDS, CHOSEN[model], strict=True):
        choice = fit(config, facts, work, device_named("4090"), card * 1e9)
        chosen = dict(choice.best.changes)
        levers = ("memory.checkpointing", "off"), ("memory.swap_blocks", 0), ("quantize.denoiser", None)
        assert tuple(chosen.get(key, default) for key, default in levers) == expected
        assert choice.fits and choice.best.plan.needed() <= card * 1e9
        assert page_row(model, card, choice) in page
        seconds.append(choice.best.seconds)
    assert seconds == sorted(seconds, reverse=True)
