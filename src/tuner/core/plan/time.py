"""Seconds of an update on a device, from counted operations and bytes.

``products / rate + attention / rate + moved bytes / bandwidth``, no overlap and no gaps between kernels, plus what
loading streamed blocks takes longer than computing does. It is an estimate: the first steps of a run correct it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tuner.core.plan.devices import Device
from tuner.core.plan.trained import FULL, streamed_count
from tuner.core.plan.weights import BYTES, SLOTS, Weights

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.costs import BlockCost, CostRules
    from tuner.core.plan.work import Shape, Work

READ_BACK = {"int8": 15, "fp8": 15, "fp8_unscaled": 15, "int4": 24, "nf4": 24}
"""Bytes that reading one quantized value back moves."""
LOW_BITS_GAIN = 1.5
"""How much faster products in int8 or fp8 are than in bfloat16, quantizing inputs included. Assumed."""
RECOMPUTED = {"off": (0.0, 0.0), "selective": (0.0, 0.0), "keep_attention": (1.0, 0.0), "block": (1.0, 1.0)}
"""By level, how often (products, attention) of the forward pass run again."""
PASSES = {"off": 2, "selective": 2, "keep_attention": 3, "block": 3}
"""How often a step goes through the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one micro-batch: operations in products and attention, forward and backward; bytes moved."""

    products_forward: float = 0
    products_backward: float = 0
    attention_forward: float = 0
    attention_backward: float = 0
    moved: float = 0


def update_seconds(
    config: RunConfig,
    costs: CostRules,
    work: Work,
    device: Device,
    weights: Weights,
    trained: int,
    state: float,
    streamed: float = 0,
) -> float | None:
    """Mean over the run's sizes. None for a device without rates. trained: values; state: bytes of each; streamed:
    those of the values that come from host memory and go there again."""
    if not device.is_timed:
        return None
    batches = sum(shape.batches for shape in work.shapes)
    mean = sum(shape.batches * batch_seconds(config, costs, shape, device, weights) for shape in work.shapes) / batches
    assert device.bandwidth is not None and device.link is not None
    update = trained * (12 + 2 * state) / device.bandwidth
    away = trained if config.optimizer.offload else streamed
    update += 2 * away * state / device.link
    if config.optimizer.fuse == "off":
        # Weights there and back, gradients there; else weights change where they are, and go back in the backward pass.
        item = BYTES[config.precision.compute]
        update += streamed * (2 * item + (4 if config.precision.gradients == "fp32" else item)) / device.link
    return config.train.accumulate * mean + update


def batch_seconds(config: RunConfig, costs: CostRules, shape: Shape, device: Device, weights: Weights) -> float:
    """One forward and backward pass."""
    cost = step_cost(config, costs, shape)
    assert device.products is not None and device.attention is not None and device.link is not None
    assert device.attention_backward is not None and device.bandwidth is not None
    rate = device.products * (LOW_BITS_GAIN if config.quantize.activations else 1.0)
    if config.precision.compute == "fp32":
        rate /= 4
    level, method = config.memory.checkpointing, config.quantize.denoiser
    passes = PASSES[level]
    moved = cost.moved / device.bandwidth
    if method is not None and config.quantize.activations is None:
        moved += passes * weights.quantized * READ_BACK[method] / device.bandwidth
    forward = cost.products_forward / rate + cost.attention_forward / device.attention + moved / passes
    backward = (
        cost.products_backward / rate
        + cost.attention_backward / device.attention_backward
        + moved * (passes - 1) / passes
    )
    streamed = config.memory.swap_blocks
    loads = max(streamed - SLOTS, 0) * (weights.host / streamed if streamed else 0) / device.link
    # Copies of what trains are good for one step; gradients, or weights, go back while the next blocks come.
    whole = weights.host / device.link if streamed_count(config) else 0.0
    offload = 0.0
    if config.memory.offload_activations == "sync":
        kept = sum(
            each.count * each.levels[level].kept.of(shape.tokens(costs.token), costs.text_rows) for each in costs.blocks
        )
        offload = 2 * kept * BYTES[config.precision.compute] * shape.batch / device.link
    return max(forward, loads, whole) + max(backward, loads, whole) + offload


def step_cost(config: RunConfig, costs: CostRules, shape: Shape) -> Cost:
    """Operations and bytes of one micro-batch."""
    image, text = shape.tokens(costs.token), costs.text_rows
    found = Cost()
    for block in costs.blocks:
        one = _block(config, block, image, text)
        times = block.count * shape.batch
        found = Cost(
            products_forward=found.products_forward + times * one.products_forward,
            products_backward=found.products_backward + times * one.products_backward,
            attention_forward=found.attention_forward + times * one.attention_forward,
            attention_backward=found.attention_backward + times * one.attention_backward,
            moved=found.moved + times * one.moved,
        )
    return found


def _block(config: RunConfig, block: BlockCost, image: int, text: int) -> Cost:
    tokens = {"image": image, "text": text, "both": image + text, "vector": 1}
    products = sum(2 * layer.size * tokens[layer.reads] for layer in block.layers.values())
    attention = sum(4 * tokens[each.queries] * tokens[each.keys] * each.width for each in block.attention)
    memory = config.memory
    share = 1 / memory.checkpoint_every if memory.checkpointing != "off" else 1.0
    again = [share * each for each in RECOMPUTED[memory.checkpointing]]
    # Frozen weights have no gradient: one product per linear in the backward pass, two where they train.
    gradients = 2 if str(config.train.mode) == FULL else 1
    return Cost(
        products_forward=products,
        products_backward=(gradients + again[0]) * products,
        attention_forward=attention,
        # Two and a half times the operations of the forward pass; recomputing runs that once more.
        attention_backward=(2.5 + again[1]) * attention,
        moved=block.levels[memory.checkpointing].moved.of(image, text) * BYTES[config.precision.compute],
    )
