"""What ``compile`` asks for, turned into settings of the blocks: sizes of the run, the compiler, its store."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tuner.core.memory.compiling import GRAPHS, Band, CompileSettings, check_backend

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.data.plan import DataPlan
    from tuner.core.train.prompts import Prompt
    from tuner.core.types import ModelFacts

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
FOLDER = "compiled"
"""Below ``cache.dir``: generated code, found again by the next run."""


def check_compile(config: RunConfig, device: torch.device) -> None:
    """UsageError when blocks are to be compiled and this machine cannot."""
    if config.compile.enabled:
        check_backend(config.compile.backend, device)


def token_counts(plan: DataPlan, prompts: Iterable[Prompt], facts: ModelFacts) -> list[int]:
    """Tokens of every picture size that the run will see: training, validation and samples."""
    sizes = {group.bucket for group in (*plan.groups, *plan.validation_groups)}
    return tokens_of({*sizes, *((prompt.width, prompt.height) for prompt in prompts)}, facts)


def tokens_of(sizes: Iterable[tuple[int, int]], facts: ModelFacts) -> list[int]:
    """The different numbers of tokens of pictures of these sizes (width, height)."""
    side = facts.costs.token if facts.costs is not None else facts.resolution_multiple
    return sorted({(width // side) * (height // side) for width, height in sizes})


def compile_settings(config: RunConfig, facts: ModelFacts, tokens: Sequence[int]) -> CompileSettings:
    """Settings for pictures of these token counts. A model that does not say where they are gets a graph per size."""
    section = config.compile
    declared = all(each.axes for each in facts.block_lists)
    band = Band.of(tokens) if section.dynamic == "auto" and declared else None
    sizes = 1 if band is not None else len(set(tokens))
    return CompileSettings(backend=section.backend, mode=section.mode, band=band, graphs=max(GRAPHS, 8 * sizes))


@contextmanager
def compiler(config: RunConfig) -> Iterator[None]:
    """Open around everything that runs compiled blocks: compiled code goes below ``cache.dir`` unless the environment
    names another place. What it sets is put back."""
    if not config.compile.enabled:
        yield
        return
    named = os.environ.get(CACHE_VARIABLE)
    if named is None:
        os.environ[CACHE_VARIABLE] = str(Path(config.cache.dir).absolute() / FOLDER)
    try:
        with warnings.catch_warnings():
            # The compiler looks at all attributes of its inputs, and says that this one was looked at.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
            yield
    finally:
        if named is None:
            os.environ.pop(CACHE_VARIABLE, None)
