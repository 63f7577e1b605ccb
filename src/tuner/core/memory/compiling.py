"""Blocks compiled one by one, with one graph for every picture size of a run.

A block of a transformer is the same code many times over, so compiling the block costs a few seconds where compiling
the model costs minutes, and everything around it (recomputation, streaming, modulations computed ahead) stays plain
Python. What is compiled is the innermost ``forward`` of a block, with its adapters.

Two axes differ between calls: tokens of the picture and rows of text. Both are marked dynamic before the first graph is
made, the first one with the smallest and the largest size that the run will see; everything else is static. No graph is
made from sizes that happened to come first, so of two graphs only one ever fits, and a recomputed block runs in the
graph of its forward pass.
"""

from __future__ import annotations

import inspect
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from tuner.core.errors import UsageError
from tuner.core.types import Blocks

GRAPHS = 64
"""Graphs of one kind of block at most: with and without gradients, by size of batch, by strength of the adapter."""
COMPILERS = {"win32": ("cl",), "darwin": ("clang++",)}
"""What turns generated C++ into code, by platform; g++ or clang++ elsewhere."""


@dataclass(frozen=True, slots=True)
class Band:
    """Tokens of the smallest and the largest picture."""

    low: int
    high: int

    @staticmethod
    def of(sizes: Sequence[int]) -> Band | None:
        """The band of these token counts; None for fewer than two different ones, which need no dynamic axis."""
        low, high = min(sizes, default=0), max(sizes, default=0)
        return Band(low, high) if low < high else None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileSettings:
    """How blocks are compiled. band: None for one graph per picture size. graphs: limit by kind of block."""

    backend: str = "inductor"
    mode: str = "default"
    band: Band | None = None
    graphs: int = GRAPHS
    dynamo: Mapping[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        values = {
            "recompile_limit": self.graphs,
            "accumulated_recompile_limit": max(4 * self.graphs, 256),
            "fail_on_recompile_limit_hit": True,
            "automatic_dynamic_shapes": False,
        }
        object.__setattr__(self, "dynamo", values)

    def compile(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """``forward`` compiled as one graph; a part of it that cannot be is an error."""
        options = dict(inductor_options(self.mode, dynamic=self.band is not None)) or None
        # As options and not as global settings: the graph of the backward pass is made in autograd's thread, which
        # does not see what was set in this one.
        return torch.compile(
            forward,
            backend=self.backend,
            fullgraph=True,
            options=options if self.backend == "inductor" else None,
        )

    def in_force(self) -> AbstractContextManager[Any]:
        """Dynamo's settings for a call in this thread; nothing to do where they hold already.

        Since torch 2.12 they belong to a thread, and recomputation on a GPU happens in another one.
        """
        config: Any = torch._dynamo.config
        if all(getattr(config, name) == value for name, value in self.dynamo.items()):
            return nullcontext()
        patch: AbstractContextManager[Any] = config.patch(**self.dynamo)
        return patch


class Compiled:
    """``forward`` of a block that runs as a graph.

    Marks belong in here: whoever recomputes a block hands in other tensors than those of the first time.
    """

    def __init__(self, inner: Callable[..., Any], settings: CompileSettings, axes: Blocks) -> None:
        self.inner, self.settings = inner, settings
        self.graph = settings.compile(inner)
        self.marks = _marks(inner, axes)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for position, path, axis, kind in self.marks:
            tensor = _find(args, kwargs, position, path)
            if tensor is not None:
                self._mark(tensor, axis, kind)
        with self.settings.in_force(), _as_usage_errors(self.settings.graphs):
            return self.graph(*args, **kwargs)

    def _mark(self, tensor: Tensor, axis: int, kind: str) -> None:
        axis %= tensor.dim()
        size, band = tensor.shape[axis], self.settings.band
        if kind == "text":
            if size > 1:
                torch._dynamo.mark_dynamic(tensor, axis)
            return
        if band is None:
            return
        if kind == "joint":
            torch._dynamo.mark_dynamic(tensor, axis)
            return
        if not band.low <= size <= band.high:
            raise UsageError(
                f"a picture of {size} tokens is outside what the blocks are compiled for, {band.low} to {band.high}",
                where="compile.dynamic",
                why="the range comes from the data and the prompts that were known at the start",
                fix="set compile.dynamic to 'off'",
            )
        torch._dynamo.mark_dynamic(tensor, axis, min=band.low, max=band.high)


class Compilation:
    """The compiled blocks; ``remove`` gives each its former ``forward`` back."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.blocks = blocks

    def remove(self) -> None:
        """What was put around the compiled ``forward`` later goes first."""
        for block in self.blocks:
            compiled = block.__dict__.pop("forward")
            if compiled.inner != block.forward:
                block.forward = compiled.inner
        self.blocks = []


def compile_blocks(model: nn.Module, lists: Sequence[Blocks], settings: CompileSettings) -> Compilation:
    """Compile ``forward`` of every block in place, so that no name changes. Compiling happens at the first calls.

    Call it when adapters are attached and before blocks are streamed or recomputed. Blocks of one list share their
    graphs. UsageError, from a call: a block is not one graph, needs more graphs than allowed, or gets a size outside of
    the band.
    """
    blocks: list[nn.Module] = []
    for each in lists:
        for block in model.get_submodule(each.path).children():
            block.forward = Compiled(block.forward, settings, each)
            blocks.append(block)
    return Compilation(blocks)


def inductor_options(mode: str, *, dynamic: bool) -> dict[str, Any]:
    """Options of torch's own compiler for a mode.

    With a dynamic axis two of its steps are switched off that would tie a graph to a part of the range: padding of
    shapes, and mixed orders of reduction, which choose by whether there are 4096 rows.
    """
    from torch._inductor import config, list_mode_options

    options = dict(list_mode_options(mode)) if mode != "default" else {}
    if dynamic:
        options["shape_padding"] = False
        if "triton.mix_order_reduction" in config.get_config_copy():
            options["triton.mix_order_reduction"] = False
    return options


def check_backend(backend: str, device: torch.device) -> None:
    """UsageError when torch has no such backend, or when what it needs on this machine is missing."""
    where = "compile.backend"
    known = torch._dynamo.list_backends(exclude_tags=("debug", "experimental"))
    if backend not in (*known, "eager", "aot_eager"):
        listed = ", ".join(dict.fromkeys((*known, "aot_eager", "eager")))
        raise UsageError(f"torch has no compiler {backend!r}", where=where, fix=f"use one of: {listed}")
    if backend == "cudagraphs":
        why = "a recorded graph holds addresses, and each block of a list would need a recording of its own"
        raise UsageError("'cudagraphs' cannot compile single blocks", where=where, why=why, fix="use 'inductor'")
    if backend != "inductor":
        return
    if device.type == "cuda" and find_spec("triton") is None:
        raise UsageError("inductor needs triton on this device", where=where, fix="pip install triton")
    names = _compilers(device)
    if not any(map(shutil.which, names)):
        raise UsageError(
            f"inductor needs a {'C' if device.type == 'cuda' else 'C++'} compiler, and there is none",
            where=where,
            why=f"none of these was found: {', '.join(names)}",
            fix="install one (Debian and Ubuntu: apt install g++), or set compile.enabled to false",
        )


def _compilers(device: torch.device) -> tuple[str, ...]:
    """Commands of which inductor needs one."""
    variable, default = ("CC", ("gcc", "clang", "cc")) if device.type == "cuda" else ("CXX", ("g++", "clang++"))
    named = os.environ.get(variable)
    return (named,) if named else COMPILERS.get(sys.platform, default)


# --- arguments --------------------------------------------------------------------------------------------------------


Mark = tuple[int, tuple[str, ...], int, str]
"""Position of an argument, its name with the keys below it, axis, what the axis counts."""


def _marks(forward: Callable[..., Any], axes: Blocks) -> list[Mark]:
    """Where the axes of ``axes`` are found among the arguments of ``forward``."""
    names = list(inspect.signature(forward).parameters)
    found: list[Mark] = []
    for argument, (axis, kind) in axes.axes.items():
        name, *keys = argument.split(".")
        if name not in names:
            raise ValueError(f"the blocks at {axes.path} have no argument {name!r}")
        found.append((names.index(name), (name, *keys), axis, kind))
    return found


def _find(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, path: tuple[str, ...]) -> Tensor | None:
    value = args[position] if position < len(args) else kwargs.get(path[0])
    for key in path[1:]:
        value = None if value is None else value.get(key)
    return value if isinstance(value, Tensor) else None


# --- errors -----------------------------------------------------------------------------------------------------------


@contextmanager
def _as_usage_errors(graphs: int) -> Iterator[None]:
    """Say what a compiler's refusal means here. Errors of the computation itself pass through."""
    from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, TorchDynamoException

    try:
        yield
    except FailOnRecompileLimitHit as error:
        raise UsageError(
            f"a block was compiled too often, more than {graphs} times",
            where="compile",
            why="torch's warning above names what differed the last time",
            fix="blocks that differ (network.rules) and batches of other sizes need a graph each; "
            "set compile.enabled to false",
        ) from error
    except BackendCompilerFailed as error:
        raise UsageError(
            "a block could not be compiled",
            where="compile.backend",
            why=_short(error),
            fix="try compile.backend 'aot_eager' to see whether the compiler is the cause",
        ) from error
    except TorchDynamoException as error:
        raise UsageError(
            "a block is not one graph",
            where="compile",
            why=_short(error),
            fix="report this with the whole message; until then set compile.enabled to false",
        ) from error


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:6])[:600]
