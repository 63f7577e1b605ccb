"""What an SD3 model costs: weights, kept and moved values, operations. No torch.

The amounts per token were counted on the full-size step run under fake tensors (``benchmarks/trace.py``), as multiples
of the width: what 3 and 7 blocks differ by, at 512 and 1024 pixels. A test counts them again.
"""

from __future__ import annotations

from collections.abc import Mapping

from tuner.core.costs import Attend, BlockCost, CostRules, Layer, LevelCost, PartCost, Rate

from .sizes import HEAD_DIM, DenoiserSizes

VAE_FACTOR = 8
TIME_CHANNELS = 256
Amounts = Mapping[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]]
PLAIN: Amounts = {
    "off": ((19.14, 19.19), (4.45, 5.69), (170.6, 250.4)),
    "selective": ((11.07, 11.11), (12.9, 12.9), (217.3, 296.7)),
    "keep_attention": ((2.03, 2.07), (21.95, 21.95), (242.4, 323.3)),
    "block": ((1.0, 1.04), (22.54, 22.54), (242.4, 323.3)),
}
"""By recompute level, in widths per token of the image and per row of text: kept, at work, moved."""
DUAL: Amounts = {
    "off": ((27.25, 19.2), (4.43, 5.76), (254.1, 270.6)),
    "selective": ((16.13, 11.12), (15.5, 12.9), (326.4, 317.8)),
    "keep_attention": ((3.06, 2.08), (28.4, 21.95), (361.5, 344.7)),
    "block": ((1.0, 1.05), (29.43, 21.04), (361.5, 344.7)),
}
"""The same for blocks with a second attention over the image."""
PUBLIC = {
    "medium": (1536, 24, 192, False, 0),
    "3.5-medium": (1536, 24, 384, True, 13),
    "3.5-large": (2432, 38, 192, True, 0),
}
"""Published models by flavour: width, blocks, side of the position table, norms of queries and keys, dual blocks."""


def public_sizes(flavour: str) -> DenoiserSizes:
    """Sizes of a published model."""
    width, blocks, side, qk_norm, dual = PUBLIC[flavour]
    return DenoiserSizes(
        width=width, heads=width // HEAD_DIM, blocks=blocks, patch=2, in_channels=16, out_channels=16, side=side,
        text_width=4096, pooled_width=2048, qk_norm=qk_norm, dual=tuple(range(dual)),
    )  # fmt: skip


def cost_rules(sizes: DenoiserSizes, text_rows: int, parts: Mapping[str, PartCost]) -> CostRules:
    """Costs of a model of these sizes. text_rows: rows of CLIP and T5 together; parts: encoders and autoencoder."""
    blocks: list[BlockCost] = []
    first = 0
    for index in range(sizes.blocks):
        following = index + 1
        if following == sizes.blocks or _kind(sizes, following) != _kind(sizes, index):
            blocks.append(_blocks(sizes, first, following - first))
            first = following
    outer = _outer(sizes)
    return CostRules(
        blocks=tuple(blocks),
        outer=outer,
        outer_other=sum(layer.rows for layer in outer.values()) + sizes.side**2 * sizes.width,
        token=VAE_FACTOR * sizes.patch,
        text_rows=text_rows,
        parts=parts,
        joined=(6 * sizes.blocks + 3 * len(sizes.dual)) * sizes.width**2,
    )


def _kind(sizes: DenoiserSizes, index: int) -> tuple[bool, bool]:
    """(whether a block attends twice over the image, whether it is the last, which has no text output)."""
    return index in sizes.dual, index == sizes.blocks - 1


def _blocks(sizes: DenoiserSizes, first: int, count: int) -> BlockCost:
    dual, last = _kind(sizes, first)
    width = sizes.width
    layers = _layers(sizes, dual, last)
    attention = [Attend(queries="both", keys="both", width=width)]
    if dual:
        attention.append(Attend(queries="image", keys="image", width=width))
    norms = (6 if dual else 4) * HEAD_DIM if sizes.qk_norm else 0
    return BlockCost(
        path="transformer_blocks",
        first=first,
        count=count,
        layers=layers,
        other=sum(layer.rows for layer in layers.values()) + norms,
        attention=tuple(attention),
        levels={
            level: LevelCost(**{
                name: Rate(image * width, text * width)
                for name, (image, text) in zip(("kept", "work", "moved"), amounts, strict=True)
            })
            for level, amounts in (DUAL if dual else PLAIN).items()
        },
    )  # fmt: skip


def _layers(sizes: DenoiserSizes, dual: bool, last: bool) -> dict[str, Layer]:
    width, hidden = sizes.width, 4 * sizes.width
    layers = {f"attn.to_{name}": Layer(rows=width, columns=width) for name in "qkv"}
    layers |= {f"attn.add_{name}_proj": Layer(rows=width, columns=width, reads="text") for name in "qkv"}
    layers["attn.to_out.0"] = Layer(rows=width, columns=width)
    layers["ff.net.0.proj"] = Layer(rows=hidden, columns=width)
    layers["ff.net.2"] = Layer(rows=width, columns=hidden)
    layers["norm1.linear"] = Layer(rows=(9 if dual else 6) * width, columns=width, reads="vector")
    layers["norm1_context.linear"] = Layer(rows=(2 if last else 6) * width, columns=width, reads="vector")
    if dual:
        layers |= {f"attn2.to_{name}": Layer(rows=width, columns=width) for name in ("q", "k", "v", "out.0")}
    if not last:
        layers["attn.to_add_out"] = Layer(rows=width, columns=width, reads="text")
        layers["ff_context.net.0.proj"] = Layer(rows=hidden, columns=width, reads="text")
        layers["ff_context.net.2"] = Layer(rows=width, columns=hidden, reads="text")
    return layers


def _outer(sizes: DenoiserSizes) -> dict[str, Layer]:
    width, area = sizes.width, sizes.patch**2
    layers = {
        "pos_embed.proj": Layer(rows=width, columns=sizes.in_channels * area),
        "context_embedder": Layer(rows=width, columns=sizes.text_width, reads="text"),
        "norm_out.linear": Layer(rows=2 * width, columns=width, reads="vector"),
        "proj_out": Layer(rows=sizes.out_channels * area, columns=width),
    }
    for name, columns in (("timestep_embedder", TIME_CHANNELS), ("text_embedder", sizes.pooled_width)):
        layers[f"time_text_embed.{name}.linear_1"] = Layer(rows=width, columns=columns, reads="vector")
        layers[f"time_text_embed.{name}.linear_2"] = Layer(rows=width, columns=width, reads="vector")
    return layers
