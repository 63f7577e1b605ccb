"""Recompute levels: what autograd keeps of a block, and what it computes a second time in backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from tuner.core.compute.modulation_cache import bound
from tuner.core.errors import UsageError

LEVELS = ("off", "block")


class Recomputed:
    """``forward`` of a block that keeps only the block's inputs and runs again in backward.

    Calls whatever ``forward`` was before, so that compiled or streamed blocks are recomputed as such.
    """

    def __init__(self, inner: Callable[..., Any], *, preserve_rng: bool) -> None:
        self.inner = inner
        self.preserve_rng = preserve_rng

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.inner(*args, **kwargs)
        return checkpoint(
            bound(self.inner), *args, use_reentrant=False, preserve_rng_state=self.preserve_rng, **kwargs
        )  # fmt: skip


class Checkpointing:
    """The blocks that recompute; ``remove`` gives each its former ``forward`` back."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.blocks = blocks

    def remove(self) -> None:
        for block in self.blocks:
            _restore(block)
        self.blocks = []


def apply_checkpointing(blocks: Iterable[nn.Module], level: str, every: int = 1) -> Checkpointing:
    """Make every ``every``-th block, from the first on, recompute its activations in backward.

    level: ``off`` keeps everything, ``block`` keeps a block's inputs. Replaces ``forward`` on the instances, so module
    names do not change; applying it again replaces what the last call set. Gradients are those of the plain blocks,
    bit for bit: adapters draw their dropout from counters, and the state of torch's generators is kept for blocks that
    hold dropout modules of torch. UsageError for an unknown level or ``every`` below 1.
    """
    if level not in LEVELS:
        raise UsageError(
            f"Unknown recompute level {level!r}.", where="memory.checkpointing", fix=f"Use one of: {', '.join(LEVELS)}."
        )
    if every < 1:
        raise UsageError(
            f"Cannot recompute every {every} blocks.", where="memory.checkpoint_every", fix="Use 1 or more."
        )
    wrapped: list[nn.Module] = []
    for index, block in enumerate(blocks):
        _restore(block)
        if level == "block" and index % every == 0:
            block.forward = Recomputed(block.forward, preserve_rng=_draws(block))
            wrapped.append(block)
    return Checkpointing(wrapped)


def _draws(block: nn.Module) -> bool:
    return any(isinstance(module, _DropoutNd) and module.p > 0 for module in block.modules())


def _restore(block: nn.Module) -> None:
    current = block.__dict__.get("forward")
    if not isinstance(current, Recomputed):
        return
    del block.__dict__["forward"]
    if current.inner != block.forward:
        block.forward = current.inner
