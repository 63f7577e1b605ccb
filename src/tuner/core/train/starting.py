"""Starts of adapters that change the base model: between loading and quantization."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from tuner.core.adapters.lora import split_bases
from tuner.core.config.network import SPLITTING
from tuner.core.memory.quantize import quantizable
from tuner.core.types import Models

if TYPE_CHECKING:
    from tuner.core.registry import Run


def starter(run: Run, stored: Mapping[str, Tensor] | None) -> Callable[[Models], None] | None:
    """What ``network.init`` does to the models of a step, or None. stored: tensors of a network to go on with."""
    config, facts = run.config, run.facts
    if config.train.mode != "lora" or config.network.init not in SPLITTING:
        return None

    def start(models: Models) -> None:
        methods = {}
        for name, method in config.quantize.methods().items():
            module = models.component(name)
            if module is not None:
                _, chosen = quantizable(
                    module, method, component=name, no_quantize=facts.no_quantize, exclude=config.quantize.exclude
                )
                methods[name] = dict.fromkeys(chosen, method)
        split_bases(models, config, facts, methods=methods, stored=stored)

    return start
