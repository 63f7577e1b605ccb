"""What a FLUX.1 or Chroma model costs: weights, kept and moved values, operations. No torch.

The amounts per token were counted on the full-size step run under fake tensors (``benchmarks/trace.py``), as multiples
of the width: what 3 and 7 blocks differ by, at 512 and 1024 pixels. A test counts them again.
"""

from __future__ import annotations

from collections.abc import Mapping

from tuner.core.costs import Attend, BlockCost, CostRules, Layer, LevelCost, PartCost, Rate

from .names import MLP_RATIO
from .sizes import Approximator, DenoiserSizes

TOKEN = 16
"""Pixels along the side of a token: 8 of the autoencoder, 2 of the patch."""
TIME_CHANNELS = 256
Amounts = Mapping[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]]
DOUBLE: Amounts = {
    "off": ((19.07, 19.1), (5.98, 10.0), (183.1, 271.0)),
    "selective": ((11.04, 11.06), (13.95, 14.7), (236.1, 322.0)),
    "keep_attention": ((2.02, 2.04), (21.97, 22.6), (261.2, 348.1)),
    "block": ((1.0, 1.02), (22.98, 23.8), (261.2, 348.1)),
}
"""By recompute level, in widths per token of the image and per row of text: kept, at work, moved."""
SINGLE: Amounts = {
    "off": ((17.06, 17.07), (5.98, 10.0), (167.1, 197.1)),
    "selective": ((10.03, 10.04), (13.95, 14.6), (210.1, 241.5)),
    "keep_attention": ((2.02, 2.02), (21.97, 22.6), (233.1, 265.0)),
    "block": ((1.0, 1.01), (22.98, 23.6), (233.1, 265.0)),
}
PUBLIC = {
    flavour: DenoiserSizes(
        flavour=flavour,
        width=3072,
        heads=24,
        head_dim=128,
        blocks=19,
        singles=38,
        in_channels=64,
        out_channels=64,
        text_width=4096,
        pooled_width=None if flavour == "chroma" else 768,
        axes=(16, 56, 56),
        approximator=Approximator(channels=64, width=5120, layers=5) if flavour == "chroma" else None,
    )
    for flavour in ("dev", "schnell", "chroma")
}
"""Sizes of the published models."""


def cost_rules(sizes: DenoiserSizes, text_rows: int, parts: Mapping[str, PartCost]) -> CostRules:
    """Costs of a model of these sizes. text_rows: rows of T5; parts: text encoders and autoencoder."""
    width = sizes.width
    attention = (Attend(queries="both", keys="both", width=width),)
    double, single = _double(sizes), _single(sizes)
    heads = 2 * sizes.head_dim
    return CostRules(
        blocks=(
            BlockCost(
                path="transformer_blocks",
                first=0,
                count=sizes.blocks,
                layers=double,
                other=2 * heads + _biases(double),
                attention=attention,
                levels=_levels(DOUBLE, width),
            ),
            BlockCost(
                path="single_transformer_blocks",
                first=0,
                count=sizes.singles,
                layers=single,
                other=heads + _biases(single),
                attention=attention,
                levels=_levels(SINGLE, width),
            ),
        ),
        outer=_outer(sizes),
        outer_other=_biases(_outer(sizes))
        + (sizes.approximator.layers * sizes.approximator.width if sizes.approximator else 0),
        token=TOKEN,
        text_rows=text_rows,
        parts=parts,
        joined=(6 * sizes.blocks + 3 * sizes.singles) * width * width,
    )


def _levels(table: Amounts, width: int) -> dict[str, LevelCost]:
    return {
        level: LevelCost(
            kept=Rate(kept[0] * width, kept[1] * width),
            work=Rate(work[0] * width, work[1] * width),
            moved=Rate(moved[0] * width, moved[1] * width),
        )
        for level, (kept, work, moved) in table.items()
    }


def _double(sizes: DenoiserSizes) -> dict[str, Layer]:
    width, hidden = sizes.width, MLP_RATIO * sizes.width
    layers = {f"attn.to_{name}": Layer(rows=width, columns=width) for name in "qkv"}
    layers |= {f"attn.add_{name}_proj": Layer(rows=width, columns=width, reads="text") for name in "qkv"}
    layers["attn.to_out.0"] = Layer(rows=width, columns=width)
    layers["attn.to_add_out"] = Layer(rows=width, columns=width, reads="text")
    layers["ff.net.0.proj"] = Layer(rows=hidden, columns=width)
    layers["ff.net.2"] = Layer(rows=width, columns=hidden)
    layers["ff_context.net.0.proj"] = Layer(rows=hidden, columns=width, reads="text")
    layers["ff_context.net.2"] = Layer(rows=width, columns=hidden, reads="text")
    if sizes.approximator is None:
        for name in ("norm1.linear", "norm1_context.linear"):
            layers[name] = Layer(rows=6 * width, columns=width, reads="vector")
    return layers


def _single(sizes: DenoiserSizes) -> dict[str, Layer]:
    width, hidden = sizes.width, MLP_RATIO * sizes.width
    layers = {f"attn.to_{name}": Layer(rows=width, columns=width, reads="both") for name in "qkv"}
    layers["proj_mlp"] = Layer(rows=hidden, columns=width, reads="both")
    layers["proj_out"] = Layer(rows=width, columns=width + hidden, reads="both")
    if sizes.approximator is None:
        layers["norm.linear"] = Layer(rows=3 * width, columns=width, reads="vector")
    return layers


def _outer(sizes: DenoiserSizes) -> dict[str, Layer]:
    width = sizes.width
    layers = {
        "x_embedder": Layer(rows=width, columns=sizes.in_channels),
        "context_embedder": Layer(rows=width, columns=sizes.text_width, reads="text"),
        "proj_out": Layer(rows=sizes.out_channels, columns=width),
    }
    if sizes.approximator is not None:
        inner, root = sizes.approximator.width, "distilled_guidance_layer"
        layers[f"{root}.in_proj"] = Layer(rows=inner, columns=sizes.approximator.channels, reads="vector")
        layers[f"{root}.out_proj"] = Layer(rows=width, columns=inner, reads="vector")
        for index in range(sizes.approximator.layers):
            for name in ("linear_1", "linear_2"):
                layers[f"{root}.layers.{index}.{name}"] = Layer(rows=inner, columns=inner, reads="vector")
        return layers
    layers["norm_out.linear"] = Layer(rows=2 * width, columns=width, reads="vector")
    inputs = {"timestep_embedder": TIME_CHANNELS, "text_embedder": sizes.pooled_width or 0}
    if sizes.flavour == "dev":
        inputs["guidance_embedder"] = TIME_CHANNELS
    for name, columns in inputs.items():
        layers[f"time_text_embed.{name}.linear_1"] = Layer(rows=width, columns=columns, reads="vector")
        layers[f"time_text_embed.{name}.linear_2"] = Layer(rows=width, columns=width, reads="vector")
    return layers


def _biases(layers: Mapping[str, Layer]) -> int:
    return sum(layer.rows for layer in layers.values())
