"""How many blocks have to be streamed so that pictures can be made in the memory that is free."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tuner.core.memory.streaming import stream_limit
from tuner.core.plan.memory import picture_bytes
from tuner.core.plan.plan import SLACK
from tuner.core.plan.search import changed_config
from tuner.core.plan.weights import denoiser_weights

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.types import ModelFacts

log = logging.getLogger(__name__)


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a GPU; None for other devices, whose memory is the host's."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def blocks_to_stream(
    config: RunConfig,
    facts: ModelFacts,
    sizes: Sequence[tuple[int, int]],
    free: float | None,
    *,
    adapters: int = 0,
) -> int:
    """The value of ``memory.swap_blocks`` to make pictures of these sizes (width, height) with ``free`` bytes.

    adapters: bytes of the adapters beside the weights. The configuration's own when it has one, when everything fits,
    and where nothing is known about the model. As many as possible when nothing is enough.
    """
    own: int = config.memory.swap_blocks
    costs = facts.costs
    limit = stream_limit(facts.block_lists)
    if own or free is None or costs is None or limit < 2:
        return own
    pictures = max(picture_bytes(config, facts, costs, size) for size in sizes)

    def needed(count: int) -> float:
        weights = denoiser_weights(changed_config(config, {"memory.swap_blocks": count}), facts, costs)
        return (weights.device + weights.slots + weights.read_back + pictures + adapters) * (1 + SLACK)

    choices = [0, *range(2, limit + 1)]
    count = next((each for each in choices if needed(each) <= free), limit)
    if count:
        log.info(
            "%.1f GB are free on the device and %.1f GB would be needed: %d blocks are streamed from host memory",
            free / 1e9, needed(0) / 1e9, count,
        )  # fmt: skip
    return count
