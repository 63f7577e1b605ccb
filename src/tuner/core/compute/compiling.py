"""Blocks compiled one by one, in place: names of modules and parameters do not change.

All blocks of a kind share their graphs, since weights are inputs of a graph. With ``dynamic`` sizes the first size of
an axis gets a graph of its own and the second one a graph for every size; without, every size has its own.
"""

from __future__ import annotations

import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.config.train import CompileConfig

GRAPHS = 64
"""Graphs of one kind of block: sizes, with and without gradient, with and without adapter, on both sides of a stop."""
INDUCTOR = {
    # Fixed strides of reductions contradict a token count that varies.
    "triton.mix_order_reduction": False,
    # Padded shapes would be chosen for one size and used for all.
    "shape_padding": False,
}
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

_configured = threading.local()


class CompiledForward:
    """A compiled ``forward`` that runs in any thread and never falls back to plain execution unnoticed.

    torch keeps the settings of its compiler per thread, and recomputation runs in threads of the backward pass.
    """

    def __init__(self, inner: Callable[..., Any], compiled: Callable[..., Any]) -> None:
        self.inner, self.compiled = inner, compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _configure_thread()
        try:
            return self.compiled(*args, **kwargs)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise UsageError(
                f"a block was compiled {GRAPHS} times and would be again",
                where="compile",
                why=str(error).strip().splitlines()[0],
                fix="set compile.dynamic to 'auto', use fewer sizes of pictures, or turn compile off",
            ) from error


def compile_blocks(blocks: Iterable[nn.Module], config: CompileConfig) -> None:
    """Compile what ``forward`` is now, so after adapters and before everything that wraps a block.

    A block that cannot be compiled as one graph raises an error of torch at its first call.
    """
    chosen: dict[str, Any] = {"options": INDUCTOR} if config.backend == "inductor" and config.mode == "default" else {}
    if config.mode != "default":
        chosen["mode"] = config.mode
    # The tracer looks at the gradient of every input, also where there can be none.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    dynamic = None if config.dynamic == "auto" else False
    for block in blocks:
        compiled = torch.compile(block.forward, backend=config.backend, fullgraph=True, dynamic=dynamic, **chosen)
        block.forward = CompiledForward(block.forward, compiled)


def check_compile(config: CompileConfig, device: torch.device) -> None:
    """Raise a UsageError when this machine cannot compile: unknown backend, or no compiler for the device."""
    if not config.enabled:
        return
    known = sorted(torch.compiler.list_backends(exclude_tags=()))
    if config.backend not in known:
        raise UsageError(
            f"there is no compiler {config.backend!r}", where="compile.backend", fix=f"use one of: {', '.join(known)}"
        )
    if config.backend != "inductor":
        return
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None:
        raise UsageError(
            "blocks cannot be compiled here",
            where="compile.enabled",
            why="code for a CPU needs a C++ compiler, and there is neither g++ nor clang++",
            fix="install one, or turn compile off",
        )
    if device.type == "cuda" and not torch.utils._triton.has_triton_package():
        raise UsageError(
            "blocks cannot be compiled here",
            where="compile.enabled",
            why="code for this device needs the package triton, which is not installed",
            fix="pip install triton (on Windows triton-windows), or turn compile off",
        )


def keep_compiled(folder: Path) -> None:
    """Keep compiled code in ``folder`` for later runs, unless the environment says where."""
    os.environ.setdefault(CACHE_VARIABLE, str(folder))


def _configure_thread() -> None:
    if getattr(_configured, "done", False):
        return
    torch._dynamo.config.recompile_limit = GRAPHS
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    _configured.done = True
