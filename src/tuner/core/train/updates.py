"""How the optimizer of a run is applied, from its configuration and the facts of the model."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from tuner.core.config import steps_of
from tuner.core.errors import UsageError
from tuner.core.optim import FusedUpdate, Update, add_up_in_float32, is_schedule_free

if TYPE_CHECKING:
    from torch import nn

    from tuner.core.config import RunConfig
    from tuner.core.memory.streaming import Streaming
    from tuner.core.types import ModelFacts, Network, ParamGroup

log = logging.getLogger(__name__)


class Stops:
    """Components that train only up to an update, ``train.stop_component_at``."""

    def __init__(self, stops: Mapping[str, int | str], groups: Sequence[ParamGroup], total: int) -> None:
        self._waiting = {name: steps_of(count, total) for name, count in stops.items()}
        self._groups = groups

    def apply(self, step: int) -> None:
        """Before update ``step`` (from 0): parameters that are to stop get no gradient any more."""
        for name in [name for name, stop in self._waiting.items() if step >= stop]:
            del self._waiting[name]
            log.info("%s stops training at step %d", name, step)
            for group in self._groups:
                if group.component == name:
                    for parameter in group.params.values():
                        parameter.requires_grad_(False)
                        parameter.grad = None


def rate_scale(config: RunConfig) -> float:
    """Factor of ``optimizer.lr_scale`` on every rate."""
    samples = config.train.batch_size * config.train.accumulate
    return {"none": 1.0, "linear": float(samples), "sqrt": math.sqrt(samples)}[config.optimizer.lr_scale]


def build_update(
    config: RunConfig,
    optimizer: torch.optim.Optimizer,
    network: Network,
    facts: ModelFacts,
    device: torch.device,
    streaming: Streaming | None = None,
) -> Update | FusedUpdate:
    """What moves the weights in every step, on ``device``. UsageError for what cannot work with the optimizer or has no
    effect.
    """
    groups = network.param_groups
    names = {name: parameter for group in groups for name, parameter in group.params.items()}
    if config.network.max_norm is not None and is_schedule_free(optimizer):
        raise UsageError(
            f"network.max_norm does not work with the schedule-free optimizer {config.optimizer.name!r}",
            where="network.max_norm",
            why="it keeps a second copy of what trains, which the limit does not reach",
            fix="choose another optimizer, or take the limit out",
        )
    # With its number, as tensors on it have it.
    update = Update(config.optimizer, optimizer, names, config.train.seed, torch.empty(0, device=device).device)
    streamed = config.memory.swap_blocks and config.train.mode == "full" and "denoiser" in config.train.components
    if streamed and not update.separate:
        raise UsageError(
            f"the optimizer {config.optimizer.name!r} cannot train streamed blocks",
            where="memory.swap_blocks",
            why="weights come from host memory a few at a time, and it is not known to update every one by itself",
            fix="choose another optimizer, such as adamw, adamw_bf16, adafactor or lion, or take swap_blocks out",
        )
    if config.precision.gradients == "fp32":
        add_up_in_float32(update.group_of)
    if config.optimizer.fuse == "off":
        return update
    clip = config.train.clip_grad
    units = _blocks(network, facts, update.group_of) if config.optimizer.fuse == "block" else []
    lent = set() if streaming is None else {each for loans in streaming.loans.values() for each in loans.parameters}
    # What is lent is updated with its block anyway.
    units = [[each for each in unit if each not in lent] for unit in units]
    fused = FusedUpdate(update, units, clip_value=clip.value if clip else None)
    if streaming is not None and streaming.loans:
        streaming.update_in_slots(fused.take)
        fused.finish = partial(_finish, streaming, update)
    return fused


def _finish(streaming: Streaming, update: Update) -> None:
    streaming.finish()
    update.settle()


def _blocks(network: Network, facts: ModelFacts, trained: object) -> list[list[nn.Parameter]]:
    """The trained parameters of each block of the denoiser, but for those that are used outside of it: their gradients
    come last, and all of a block would wait for them."""
    assert isinstance(trained, dict)
    units: dict[str, list[nn.Parameter]] = {}
    for group in network.param_groups:
        if group.component != "denoiser":
            continue
        for name, parameter in group.params.items():
            block = _block_of(name.rpartition(":")[2], facts)
            if block is not None and parameter in trained:
                units.setdefault(block, []).append(parameter)
    return list(units.values())


def _block_of(path: str, facts: ModelFacts) -> str | None:
    for blocks in facts.block_lists:
        if path.startswith(f"{blocks.path}."):
            number, _, name = path.removeprefix(f"{blocks.path}.").partition(".")
            outside = any(re.fullmatch(pattern, name) for pattern in blocks.outside)
            return None if outside else f"{blocks.path}.{number}"
    return None
