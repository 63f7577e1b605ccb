"""Modulation vectors of all blocks, computed once per forward of the denoiser and not again when a block recomputes.

In a transformer with adaptive norms, some linears read one vector per sample (time, pooled text) that is known before
the first block. They hold a good part of the weights for hardly any arithmetic, so what they cost is reading them.

`cache_modulations` takes such linears over in place: names, parameters and the state dict stay as they are. The
denoiser's forward then opens `modulations` around its blocks. A block is handed its rows at its entry and loses them at
its exit, so nothing is left between two forwards; whoever runs a block twice calls `bound` first, and both runs see the
rows of the same forward.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, cast

from torch import Tensor, nn

Rows = tuple[Tensor | None, ...]
"""One [B, out_features] per linear of a block; None where the linear computes as usual."""


@contextmanager
def modulations(denoiser: nn.Module, features: Tensor) -> Iterator[None]:
    """Open around the blocks in a denoiser's forward. features [B, D]: what the modulation linears read.

    Does nothing for a denoiser without `cache_modulations`.
    """
    cache = cast("ModulationCache | None", denoiser.__dict__.get("modulation_cache"))
    if cache is None:
        yield
        return
    before = cache.rows
    cache.rows = cache.compute(features)
    try:
        yield
    finally:
        cache.rows = before


def cache_modulations(
    denoiser: nn.Module, patterns: Sequence[str], block_paths: Iterable[str]
) -> ModulationCache | None:
    """Compute the linears that match before the first block of each forward; None when there are none to take over.

    patterns: full-match regular expressions on module paths of the denoiser. block_paths: those of its lists of blocks.
    Call it after adapters and before recomputation. A linear with an adapter or trainable weights is left alone, also
    when it gets them later. Outputs are bit-equal to the plain path, and so are gradients, unless one reaches
    ``features``, where the sums have another order.
    """
    cache = ModulationCache(denoiser)
    names = {module: path for path, module in denoiser.named_modules()}
    for block_path in block_paths:
        for block in denoiser.get_submodule(block_path).children():
            linears = [
                module
                for module in block.modules()
                if isinstance(module, nn.Linear)
                and any(re.fullmatch(pattern, names[module]) for pattern in patterns)
                and _plain(module)
            ]
            if linears:
                cache.take(block, linears)
    if not cache.blocks:
        return None
    denoiser.__dict__["modulation_cache"] = cache
    return cache


def bound(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` with the rows of the present forward of the denoiser fixed, for a call that is repeated later."""
    return forward.bind() if isinstance(forward, ModulatedBlock) else forward


class ModulationCache:
    """The linears taken over in one denoiser, and while its forward runs, their rows. ``remove`` undoes it all.

    forwards: how often the rows were computed; 0 after a forward means that the denoiser does not open `modulations`.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self.denoiser = denoiser
        self.blocks: list[nn.Module] = []
        self.linears: list[list[nn.Linear]] = []
        self.rows: list[Rows] | None = None
        self.forwards = 0

    def take(self, block: nn.Module, linears: list[nn.Linear]) -> None:
        """Put stand-ins for ``linears``, which lie inside ``block``."""
        for linear in linears:
            linear.__dict__["own_forward"] = linear.forward
            linear.__dict__["modulation_row"] = None
            linear.__dict__["forward"] = MethodType(_row_or_forward, linear)
        block.forward = ModulatedBlock(self, len(self.blocks), block.forward)
        self.blocks.append(block)
        self.linears.append(linears)

    def compute(self, features: Tensor) -> list[Rows]:
        """The rows of every block for features [B, D]."""
        self.forwards += 1
        return [
            tuple(linear.__dict__["own_forward"](features) if _plain(linear) else None for linear in linears)
            for linears in self.linears
        ]

    def remove(self) -> None:
        """Give blocks and linears their former forward back."""
        for block, linears in zip(self.blocks, self.linears, strict=True):
            current = block.__dict__.get("forward")
            if isinstance(current, ModulatedBlock):
                _give_back(block, current.inner)
            for linear in linears:
                if getattr(linear.__dict__.get("forward"), "__func__", None) is _row_or_forward:
                    _give_back(linear, linear.__dict__["own_forward"])
                del linear.__dict__["own_forward"], linear.__dict__["modulation_row"]
        self.blocks, self.linears, self.rows = [], [], None
        self.denoiser.__dict__.pop("modulation_cache", None)


class ModulatedBlock:
    """``forward`` of a block whose modulation linears answer with the rows of the present forward."""

    def __init__(self, cache: ModulationCache, index: int, inner: Callable[..., Any]) -> None:
        self.cache, self.index, self.inner = cache, index, inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.bind()(*args, **kwargs)

    def bind(self) -> Callable[..., Any]:
        rows = self.cache.rows
        return self.inner if rows is None else partial(self._run, rows[self.index])

    def _run(self, rows: Rows, *args: Any, **kwargs: Any) -> Any:
        linears = self.cache.linears[self.index]
        for linear, row in zip(linears, rows, strict=True):
            linear.__dict__["modulation_row"] = row
        try:
            return self.inner(*args, **kwargs)
        finally:
            for linear in linears:
                linear.__dict__["modulation_row"] = None


def _row_or_forward(linear: Any, x: Tensor) -> Tensor:
    row: Tensor | None = linear.modulation_row
    return linear.own_forward(x) if row is None else row


def _plain(linear: nn.Linear) -> bool:
    trains = any(parameter.requires_grad for parameter in linear.parameters())
    return not trains and getattr(linear, "adapter", None) is None


def _give_back(module: nn.Module, forward: Callable[..., Any]) -> None:
    del module.__dict__["forward"]
    if module.forward != forward:
        module.forward = forward
