"""What ``memory`` does to the denoiser's blocks, put together in its fixed order."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from tuner.core.compute.linear import separate_projections
from tuner.core.compute.modulation_cache import cache_modulations
from tuner.core.config.base import changed_keys
from tuner.core.memory.checkpointing import apply_checkpointing
from tuner.core.memory.compiling import compile_blocks
from tuner.core.memory.offload import open_offload
from tuner.core.memory.streaming import Streaming, stream_blocks
from tuner.core.train.compiling import compile_settings
from tuner.core.types import Models

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.types import ModelFacts

WITHOUT_EFFECT = {
    "cpu": {"empty_cache_every", "offload_activations", "swap_blocks"},
    "mps": {"offload_activations", "swap_blocks"},
}
"""Keys about memory that is not the host's, by kinds of device whose memory is."""

log = logging.getLogger(__name__)


def prepare_blocks(
    models: Models,
    adapters: nn.Module | None,
    config: RunConfig,
    facts: ModelFacts,
    device: torch.device,
    tokens: Sequence[int] = (),
) -> Streaming | None:
    """Compile, stream and recompute blocks as ``compile`` and ``memory`` say, with the adapters that are in them.

    adapters: the layers that act in the blocks, made beside weights that were still in host memory; None when whole
    weights train. tokens: of every picture size to come, for ``compile``.
    Compilation is inside, so that whoever calls a block may change where its weights are and which tensors it gets.
    Recomputation is outside, so that it fetches the weights of a streamed block again. Modulations are computed ahead
    of the blocks unless blocks are streamed: then their weights travel with the block that needs them.
    """
    memory, denoiser = config.memory, models.denoiser
    assert denoiser is not None
    for key in sorted(changed_keys(memory) & WITHOUT_EFFECT.get(device.type, set())):
        log.warning("memory.%s saves nothing on a device of type %s", key, device.type)
    sequence = [block for each in facts.block_lists for block in denoiser.get_submodule(each.path).children()]
    if not config.attention.fuse_qkv and not sum(map(separate_projections, sequence)):
        log.warning("attention.fuse_qkv has no effect: this model has no joint projections")
    if config.compile.enabled:
        settings = compile_settings(config, facts, tokens)
        compile_blocks(denoiser, facts.block_lists, settings)
        band = settings.band
        found = "a graph for each picture size" if band is None else f"one graph for {band.low} to {band.high} tokens"
        log.info("blocks are compiled by %s: %s", settings.backend, found)
    streaming = None
    if memory.swap_blocks:
        streaming = stream_blocks(denoiser, facts.block_lists, memory.swap_blocks, device)
        if adapters is not None:
            adapters.to(device)
        _tell(streaming)
    else:
        cache_modulations(denoiser, facts.modulation, [each.path for each in facts.block_lists])
    offload = None if memory.offload_activations == "off" else open_offload(memory.offload_activations, device)
    apply_checkpointing(sequence, memory.checkpointing, memory.checkpoint_every, offload=offload)
    return streaming


def _tell(streaming: Streaming) -> None:
    host, device = (sum(flat.numel() for flat in flats) for flats in (streaming.host, _slots(streaming)))
    log.info(
        "%d blocks are streamed: %.2f GB in host memory, %.2f GB of slots on the device",
        len(streaming.blocks), host / 1e9, device / 1e9,
    )  # fmt: skip


def _slots(streaming: Streaming) -> list[torch.Tensor]:
    return [slot.flat for slot in streaming.slots]
