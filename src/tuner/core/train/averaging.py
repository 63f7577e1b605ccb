"""The average of the weights in a run: what it goes together with, where it starts, and its file names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tuner.core.adapters.checkpoints import read_weights
from tuner.core.adapters.files import read_adapter
from tuner.core.adapters.formats import key_maps
from tuner.core.adapters.lora import with_own_alphas
from tuner.core.adapters.network import load_network_tensors, network_tensors
from tuner.core.adapters.weights import WEIGHTS
from tuner.core.errors import UsageError
from tuner.core.files import safetensors_header
from tuner.core.optim import is_schedule_free
from tuner.core.optim.registry import find_factory

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.optim import Ema
    from tuner.core.types import ModelFacts, Network


def check_ema(config: RunConfig) -> None:
    """Raise a UsageError for an optimizer that averages by itself and for a start file that is no weight file."""
    if not config.ema.enabled:
        return
    if is_schedule_free(find_factory(config.optimizer.name)):
        raise UsageError(
            f"the optimizer {config.optimizer.name!r} cannot be averaged",
            where="ema.enabled",
            why="it is schedule-free: what it saves and samples with is an average already",
            fix="take ema out, or choose another optimizer",
        )
    if config.ema.init_from is not None:
        safetensors_header(config.ema.init_from)


def ema_path(path: Path) -> Path:
    """The file of the average beside ``path``."""
    return path.with_name(f"ema_{path.name}")


def start_average(ema: Ema, network: Network, config: RunConfig, facts: ModelFacts, path: Path) -> None:
    """Set the average to the adapter, or the model's weights, in ``path``. UsageError when they have another shape."""
    kept = {name: parameter.detach().clone() for name, parameter in ema.params.items()}
    try:
        if network.kind == WEIGHTS:
            shapes = {name: value.shape for name, value in network_tensors(network).items()}
            tensors = dict(read_weights(config, facts, path, shapes))
        else:
            tensors = with_own_alphas(network, read_adapter(path, key_maps(facts)).tensors)
        load_network_tensors(network, tensors)
        ema.take()
    except UsageError as error:
        raise UsageError(
            "this file does not hold an average of the adapter that trains",
            where=f"{path}, ema.init_from",
            why=f"{error.what}{f': {error.why}' if error.why else ''}",
        ) from error
    finally:
        with torch.no_grad():
            for name, parameter in ema.params.items():
                parameter.copy_(kept[name])
