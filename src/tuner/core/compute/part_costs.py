"""What the text encoders and the autoencoder that several models share cost: weights, values at work, operations.

No torch. Values at work and operations of the autoencoder were counted on the module under fake tensors, at 512 and at
1024 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tuner.core.compute.encoder_sizes import ClipSizes, T5Sizes
from tuner.core.costs import Layer, PartCost

if TYPE_CHECKING:
    from tuner.core.files import TensorInfo

PUBLIC_T5 = T5Sizes(vocab=32128, width=4096, layers=24, heads=64, head_dim=64, mlp_width=10240, buckets=32)
"""The encoder of T5 v1.1 XXL."""
PUBLIC_CLIP_L = ClipSizes(vocab=49408, width=768, layers=12, heads=12, mlp_width=3072, positions=77, projection=768)
"""OpenAI's CLIP ViT-L/14."""
PUBLIC_CLIP_G = ClipSizes(vocab=49408, width=1280, layers=32, heads=20, mlp_width=5120, positions=77, projection=1280)
"""OpenCLIP's ViT-bigG/14."""

KL_BASE, KL_PARAMETERS = 128, 83_819_683
"""Width and weights of the common autoencoder with 16 channels and a factor of 8."""
_KL_WORK, _KL_DECODE_WORK = 512.0, 768.0
_KL_OPERATIONS, _KL_DECODE_OPERATIONS = 4.13e6, 9.46e6


def t5_cost(sizes: T5Sizes) -> PartCost:
    """A T5 v1.1 encoder."""
    width, hidden, inner = sizes.width, sizes.mlp_width, sizes.heads * sizes.head_dim
    one = {f"layer.0.SelfAttention.{name}": (inner, width) for name in "qkv"}
    one["layer.0.SelfAttention.o"] = (width, inner)
    one |= {f"layer.1.DenseReluDense.{name}": (hidden, width) for name in ("wi_0", "wi_1")}
    one["layer.1.DenseReluDense.wo"] = (width, hidden)
    layers = repeated_layers("encoder.block", sizes.layers, one)
    others = sizes.vocab * width + sizes.buckets * sizes.heads + (2 * sizes.layers + 1) * width
    # Its attention adds a table of positions, which no fused kernel takes: scores of all heads exist.
    return _encoder(layers, others, work=3 * hidden + 6 * width + 1024 * sizes.heads)


def clip_cost(sizes: ClipSizes) -> PartCost:
    """The text encoder of a CLIP, with its projection."""
    width, hidden = sizes.width, sizes.mlp_width
    one = {f"self_attn.{name}": (width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    one |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    layers = repeated_layers("text_model.encoder.layers", sizes.layers, one)
    others = (sizes.vocab + sizes.positions) * width + sizes.layers * (9 * width + hidden) + 2 * width
    # Without a projection in the file the module has one that changes nothing.
    return _encoder(layers, others + (sizes.projection or width) * width, work=2 * hidden + 6 * width)


def autoencoder_cost(header: Mapping[str, TensorInfo] | None = None) -> PartCost:
    """A KL autoencoder of four stages; without a header the public one of 16 channels."""
    parameters, base = KL_PARAMETERS, float(KL_BASE)
    if header is not None:
        parameters = sum(math.prod(info.shape) for info in header.values())
        base = next((info.shape[0] for name, info in header.items() if name.endswith("encoder.conv_in.weight")), base)
    scale = base / KL_BASE
    return PartCost(
        parameters=parameters,
        work=_KL_WORK * scale,
        decode_work=_KL_DECODE_WORK * scale,
        operations=_KL_OPERATIONS * scale**2,
        decode_operations=_KL_DECODE_OPERATIONS * scale**2,
    )


def _encoder(layers: dict[str, Layer], others: int, *, work: float) -> PartCost:
    inside = sum(layer.size for layer in layers.values())
    return PartCost(parameters=inside + others, layers=layers, work=work, operations=2 * inside)


def repeated_layers(path: str, count: int, one: Mapping[str, tuple[int, int]]) -> dict[str, Layer]:
    """The linears of ``count`` blocks ``path.N``. one: name inside a block to (rows, columns)."""
    return {
        f"{path}.{index}.{name}": Layer(rows=rows, columns=columns, reads="text")
        for index in range(count)
        for name, (rows, columns) in one.items()
    }
