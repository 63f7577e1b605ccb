"""Bytes of frozen weights: as loaded, quantized, and spread over the device and the host where blocks are streamed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tuner.core.plan.trained import component_layers, component_values

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.costs import CostRules, Layer
    from tuner.core.types import ModelFacts

BYTES = {"bf16": 2, "fp32": 4, "bfloat16": 2, "float32": 4, "int64": 8, "bool": 1}
QUANTIZED = {"int8": 1.0, "fp8": 1.0, "fp8_unscaled": 1.0, "int4": 0.5 + 4 / 64, "nf4": 0.5 + 2 / 64}
"""Bytes per value, scales of groups of 64 included; see `tuner.core.compute.low_bits`."""
SLOTS = 3
"""Places on the device that streamed blocks take turns in; as in `tuner.core.memory.streaming`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Bytes of the denoiser. device, slots: on the device, resident and for streamed blocks in turn. host: of streamed
    blocks. read_back: of the largest quantized matrix in the compute dtype, 0 without any. blocks: by block in order,
    what can be streamed. quantized: values that are read back in every product."""

    device: float
    slots: float
    host: float
    read_back: float
    blocks: tuple[float, ...]
    quantized: float


def dtype_of(config: RunConfig, facts: ModelFacts, component: str) -> str:
    """The dtype that a component is loaded in."""
    if component == "denoiser":
        return config.precision.compute
    if component == "vae":
        return config.precision.vae or facts.dtypes.vae
    return config.precision.text_encoder.get(component, facts.dtypes.text)


def part_bytes(config: RunConfig, facts: ModelFacts, costs: CostRules, component: str, *, stored: bool = True) -> float:
    """Bytes of a component beside the denoiser. stored: quantized where that is asked for, else as loaded."""
    item = BYTES[dtype_of(config, facts, component)]
    total = component_values(costs, component) * item
    method = config.quantize.methods().get(component) if stored else None
    if method is None:
        return total
    inside = component_layers(costs, component)
    saved = sum(inside[path].size for path in quantized_paths(inside, config, facts))
    return total - saved * (item - QUANTIZED[method])


def quantized_paths(paths: Iterable[str], config: RunConfig, facts: ModelFacts) -> list[str]:
    """The linears that quantization of their component touches."""
    kept = re.compile("|".join(f"(?:{each})" for each in (*facts.no_quantize, *config.quantize.exclude)))
    return [path for path in paths if not kept.fullmatch(path)]


def denoiser_weights(config: RunConfig, facts: ModelFacts, costs: CostRules) -> Weights:
    """Where the denoiser's weights are during the steps."""
    item, method = BYTES[config.precision.compute], config.quantize.denoiser
    layers = costs.layers()
    chosen = set(quantized_paths(layers, config, facts)) if method is not None else set[str]()
    stays = {each.path: re.compile("|".join(f"(?:{name})" for name in each.outside)) for each in facts.block_lists}
    movable: list[float] = []
    device = float(item * (sum(layer.size for layer in costs.outer.values()) + costs.outer_other))
    device -= sum((item - QUANTIZED[str(method)]) * layers[path].size for path in costs.outer if path in chosen)
    for block in costs.blocks:
        pattern = stays.get(block.path)
        for number in range(block.first, block.first + block.count):
            inside, outside = float(block.other * item), 0.0
            for name, layer in block.layers.items():
                size = layer.size * (QUANTIZED[str(method)] if f"{block.path}.{number}.{name}" in chosen else item)
                if pattern is not None and pattern.pattern and pattern.fullmatch(f"{name}.weight"):
                    outside += size
                else:
                    inside += size
            movable.append(inside)
            device += outside
    streamed = streamed_blocks(len(movable), config.memory.swap_blocks)
    largest = max((movable[index] for index in streamed), default=0.0)
    host = sum(movable[index] for index in streamed)
    return Weights(
        device=device + sum(movable) - host,
        slots=largest * min(SLOTS, max(len(streamed) - 1, 0)),
        host=host,
        read_back=item * max((layers[path].size for path in chosen), default=0),
        blocks=tuple(movable),
        quantized=sum(layers[path].size for path in chosen),
    )


def streamed_blocks(blocks: int, count: int) -> tuple[int, ...]:
    """Which of all blocks are streamed: evenly spread."""
    return tuple((2 * index + 1) * blocks // (2 * count) for index in range(count))


def largest_layer(layers: Mapping[str, Layer]) -> int:
    """Values of the largest matrix."""
    return max((layer.size for layer in layers.values()), default=0)
