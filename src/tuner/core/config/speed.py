"""``compile``: what becomes a graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from tuner.core.config.base import Section, changed_keys
from tuner.core.config.data_checks import Problem, Unused

if TYPE_CHECKING:
    from tuner.core.config.run import RunConfig


class CompileConfig(Section):
    """Compiled blocks: each block of the denoiser becomes one graph that all blocks of its kind share, with its
    adapters. Samples and validation run through the same graphs. Compiled code is kept in ``cache.dir``."""

    enabled: bool = False
    """Compile the blocks."""
    backend: str = "inductor"
    """One of torch's compilers. ``inductor`` is the fast one; ``aot_eager`` and ``eager`` only take the graphs apart,
    to find out where an error comes from."""
    mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"
    """How long inductor looks for fast kernels."""
    dynamic: Literal["auto", "off"] = "auto"
    """``auto``: one graph for all picture sizes, bounded by the smallest and the largest of data and prompts. ``off``:
    a graph for each size, which takes longer to compile and less memory to run."""


def compile_problems(config: RunConfig) -> Iterator[Problem]:
    """Combinations that cannot work, and keys without effect."""
    section = config.compile
    if not section.enabled:
        for key in sorted(changed_keys(section)):
            yield Unused(("compile", key), "has no effect while compile.enabled is off", "take it out")
        return
    if section.mode != "default" and section.backend != "inductor":
        yield ("compile", "mode"), f"has no effect with backend {section.backend!r}", "take it out"
    level = config.memory.checkpointing
    if level in ("keep_attention", "selective"):
        why = (
            f"{level!r} does not work with compile.enabled: it watches single operations, and a graph is one. "
            "A compiled block already recomputes cheap operations by itself"
        )
        yield ("memory", "checkpointing"), why, "use 'block' or 'off'"
