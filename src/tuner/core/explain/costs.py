"""What settings cost, as it was measured: the numbers of the page "Performance" of the documentation.

Only measurements are here; `tuner plan` predicts the cost of a whole configuration, `tuner verify` measures it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tuner.core.config.describe import as_json

WHERE = (
    "one thread of a CPU, bfloat16, a model of six blocks 512 wide; nothing has been measured on a GPU yet, and"
    " tuner verify CONFIG measures on this machine"
)
KEPT_WHERE = "counted for 28 blocks 2048 wide at 1024 x 1024 pixels"
FULL = "the whole model trained with AdamW rounded to nearest"
OFF = "everything kept"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """One measurement. value: of the key, None for any that is not the default. step: time of a training step, as a
    multiple of the same ``against`` what is named there. kept: GiB kept for the backward pass, and GiB ``against``."""

    value: Any
    step: float
    against: str
    what: str = ""
    kept: tuple[float, float] | None = None

    def __str__(self) -> str:
        given = f"{as_json(self.value)}: " if self.value is not None else ""
        what = f"{self.what}: " if self.what else ""
        kept = "" if self.kept is None else f"; {self.kept[0]:g} instead of {self.kept[1]:g} GiB kept ({KEPT_WHERE})"
        return f"{given}{what}a step takes {self.step:.2f} times as long as with {self.against}{kept}"


COSTS: Mapping[str, tuple[Cost, ...]] = {
    "memory.checkpointing": (
        Cost(value="selective", step=1.13, against=OFF, kept=(6.30, 10.3)),
        Cost(value="keep_attention", step=1.26, against=OFF, kept=(1.35, 10.3)),
        Cost(value="block", step=1.30, against=OFF, kept=(0.46, 10.3)),
    ),
    "memory.swap_blocks": (
        Cost(value=None, step=1.03, against="blocks recomputed and none streamed", what="half of the blocks"),
        Cost(value=None, step=1.03, against="blocks recomputed and none streamed", what="all but two"),
    ),
    "quantize.denoiser": tuple(
        Cost(value=method, step=step, against="bfloat16 weights")
        for method, step in (("int8", 1.09), ("nf4", 1.26), ("int4", 1.56), ("fp8", 1.74))
    ),
    "quantize.activations": (Cost(value="int8", step=0.96, against="bfloat16 weights"),),
    "optimizer.name": (Cost(value="adafactor", step=1.00, against=FULL),),
    "optimizer.rounding": (
        Cost(value="stochastic", step=1.35, against=FULL, what="with optimizer.fuse by block"),
        Cost(value="kahan", step=1.60, against=FULL),
    ),
}


def costs_of_key(path: str) -> tuple[Cost, ...]:
    """Every measurement of a key."""
    return COSTS.get(path, ())


def costs_of_value(path: str, value: Any, default: Any) -> tuple[Cost, ...]:
    """Those that are about this value."""
    return tuple(
        each for each in costs_of_key(path) if each.value == value or (each.value is None and value != default)
    )
