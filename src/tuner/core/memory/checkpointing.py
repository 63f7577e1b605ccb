"""Recompute levels: what autograd keeps of a block, and what it computes a second time in backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from tuner.core.compute.modulation_cache import bound
from tuner.core.errors import UsageError
from tuner.core.memory.offload import ActivationOffload

LEVELS = ("off", "block", "keep_attention", "selective")

_ATEN = torch.ops.aten
ATTENTION = (
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
)
"""Fused attention kernels. The plain formula, which torch takes when none of them fits, is computed again."""
PRODUCTS = (
    _ATEN.mm.default,
    _ATEN.addmm.default,
    # An adapter adds to its linear's result in place. Both calls return the same memory; when that is kept with the sum
    # in it, neither may run again.
    _ATEN.addmm_.default,
    _ATEN.bmm.default,
    _ATEN.baddbmm.default,
    _ATEN._scaled_mm.default,
    _ATEN.convolution.default,
)
KEPT: dict[str, list[Any]] = {"keep_attention": [*ATTENTION], "selective": [*ATTENTION, *PRODUCTS]}
"""Operations by level whose results are kept."""


class Recomputed:
    """``forward`` of a block that keeps only the block's inputs, and what ``level`` says, and runs again in backward.

    Calls whatever ``forward`` was before, so that compiled or streamed blocks are recomputed as such.
    """

    def __init__(
        self, inner: Callable[..., Any], level: str, *, preserve_rng: bool, offload: ActivationOffload | None
    ) -> None:
        self.inner, self.preserve_rng, self.offload = inner, preserve_rng, offload
        self.contexts = noop_context_fn if level == "block" else partial(_keeping, KEPT[level])
        _tell(inner, recomputed=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.inner(*args, **kwargs)
        inputs: AbstractContextManager[Any] = nullcontext()
        if self.offload is not None:
            inputs = self.offload.saving((*args, *kwargs.values()))
        with inputs:
            return checkpoint(
                bound(self.inner),
                *args,
                use_reentrant=False,
                preserve_rng_state=self.preserve_rng,
                context_fn=self.contexts,
                **kwargs,
            )


class Checkpointing:
    """The blocks that recompute; ``remove`` gives each its former ``forward`` back."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.blocks = blocks

    def remove(self) -> None:
        for block in self.blocks:
            _restore(block)
        self.blocks = []


def apply_checkpointing(
    blocks: Iterable[nn.Module], level: str, every: int = 1, *, offload: ActivationOffload | None = None
) -> Checkpointing:
    """Make every ``every``-th block, from the first on, recompute its activations in backward.

    level: ``off`` keeps everything, ``block`` a block's inputs, ``keep_attention`` also what attention gives,
    ``selective`` also every matrix product, so that only norms, rotations, activations and the like run again.
    offload: takes the kept inputs to host memory. Replaces ``forward`` on the instances, so module names do not change;
    applying it again replaces what the last call set. Gradients are those of the plain blocks, bit for bit: adapters
    draw their dropout from counters, and the state of torch's generators is kept for blocks that hold dropout modules
    of torch. UsageError for an unknown level or ``every`` below 1.
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
        if level != "off" and index % every == 0:
            block.forward = Recomputed(block.forward, level, preserve_rng=_draws(block), offload=offload)
            wrapped.append(block)
    return Checkpointing(wrapped)


def _keeping(operations: list[Any]) -> Any:
    # Results that are changed in place are kept as they are in the end; see PRODUCTS.
    return create_selective_checkpoint_contexts(operations, allow_cache_entry_mutation=True)  # type: ignore[no-untyped-call]


def _draws(block: nn.Module) -> bool:
    return any(isinstance(module, _DropoutNd) and module.p > 0 for module in block.modules())


def _tell(inner: Callable[..., Any], *, recomputed: bool) -> None:
    if hasattr(inner, "recomputed"):
        inner.recomputed = recomputed


def _restore(block: nn.Module) -> None:
    current = block.__dict__.get("forward")
    if not isinstance(current, Recomputed):
        return
    _tell(current.inner, recomputed=False)
    del block.__dict__["forward"]
    if current.inner != block.forward:
        block.forward = current.inner
