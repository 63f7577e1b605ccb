"""What an Anima model costs: weights, kept and moved values, operations. No torch.

The amounts per token were counted on the full-size step run under fake tensors (``benchmarks/trace.py``), as multiples
of the width: what 3 and 7 blocks differ by, at 512 and 1024 pixels. A test counts them again.
"""

from __future__ import annotations

from tuner.core.compute.part_costs import repeated_layers
from tuner.core.costs import Attend, BlockCost, CostRules, Layer, LevelCost, PartCost, Rate

from .sizes import PATCH, AdapterSizes, DenoiserSizes, EncoderSizes

TOKEN = 16
"""Pixels along the side of a token: 8 of the autoencoder, 2 of the patch."""
LEVELS = {
    "off": ((23.15, 3.05), (4.95, 0.62), (199.4, 46.8)),
    "selective": ((14.1, 2.04), (14.0, 1.52), (241.8, 56.4)),
    "keep_attention": ((3.03, 0.02), (25.1, 3.53), (273.0, 61.7)),
    "block": ((1.0, 0.02), (27.1, 3.53), (273.0, 61.7)),
}
"""By recompute level, in widths per token of the image and per row of text: kept, at work, moved."""
VAE_BASE, VAE_PARAMETERS = 96, 44_599_603
"""Width of the public autoencoder, and its weights as 2-D convolutions."""
VAE_WORK, VAE_DECODE_WORK = 389.0, 391.5
"""Values per pixel at the peak of encoding and of decoding."""
VAE_OPERATIONS, VAE_DECODE_OPERATIONS = 2.33e6, 4.10e6

PUBLIC = {
    "preview": DenoiserSizes(
        width=2048, heads=16, head_dim=128, blocks=28, mlp_width=8192, text_width=1024, adaln_rank=256,
        in_channels=16, out_channels=16, rope_ratio=4.0,
    ),
}  # fmt: skip
"""Sizes of published models by flavour."""
PUBLIC_ADAPTER = AdapterSizes(
    vocab=32128, embed_width=1024, width=1024, source_width=1024, out_width=1024, layers=6, heads=16, mlp_width=4096,
    in_proj_bias=False,
)  # fmt: skip
PUBLIC_ENCODER = EncoderSizes(
    vocab=151936, width=1024, layers=28, heads=16, key_heads=8, head_dim=128, mlp_width=3072
)  # fmt: skip


def cost_rules(
    sizes: DenoiserSizes, adapter: AdapterSizes, encoder: EncoderSizes, text_rows: int, vae: tuple[int, int]
) -> CostRules:
    """Costs of a model of these sizes. text_rows: rows of context; vae: (parameters, width) of the autoencoder."""
    width = sizes.width
    parameters, base = vae
    return CostRules(
        blocks=(
            BlockCost(
                path="blocks",
                first=0,
                count=sizes.blocks,
                layers=_block(sizes),
                other=4 * sizes.head_dim,
                attention=(
                    Attend(queries="image", keys="image", width=width),
                    Attend(queries="image", keys="text", width=width),
                ),
                levels={
                    level: LevelCost(
                        **{
                            name: Rate(image * width, text * width)
                            for name, (image, text) in zip(("kept", "work", "moved"), amounts, strict=True)
                        }
                    )
                    for level, amounts in LEVELS.items()
                },
            ),
        ),
        outer=_outer(sizes),
        outer_other=width,
        token=TOKEN,
        text_rows=text_rows,
        joined=sizes.blocks * (3 * width * width + 2 * width * sizes.text_width),
        parts={
            "qwen3": _encoder(encoder),
            "llm_adapter": _adapter(adapter),
            "vae": PartCost(
                parameters=parameters,
                work=VAE_WORK * base / VAE_BASE,
                decode_work=VAE_DECODE_WORK * base / VAE_BASE,
                operations=VAE_OPERATIONS * (base / VAE_BASE) ** 2,
                decode_operations=VAE_DECODE_OPERATIONS * (base / VAE_BASE) ** 2,
            ),
        },
    )


def _block(sizes: DenoiserSizes) -> dict[str, Layer]:
    width, text, hidden = sizes.width, sizes.text_width, sizes.mlp_width
    layers = {f"self_attn.{name}": Layer(rows=width, columns=width) for name in ("q_proj", "k_proj", "v_proj")}
    layers["self_attn.output_proj"] = layers["cross_attn.q_proj"] = Layer(rows=width, columns=width)
    layers |= {f"cross_attn.{name}": Layer(rows=width, columns=text, reads="text") for name in ("k_proj", "v_proj")}
    layers["cross_attn.output_proj"] = Layer(rows=width, columns=width)
    layers["mlp.layer1"] = Layer(rows=hidden, columns=width)
    layers["mlp.layer2"] = Layer(rows=width, columns=hidden)
    for part in ("self_attn", "cross_attn", "mlp"):
        layers |= _modulation(f"adaln_modulation_{part}", width, 3 * width, sizes.adaln_rank)
    return layers


def _outer(sizes: DenoiserSizes) -> dict[str, Layer]:
    width = sizes.width
    layers = {
        "x_embedder.proj.1": Layer(rows=width, columns=(sizes.in_channels + 1) * PATCH),
        "t_embedder.1.linear_1": Layer(rows=width, columns=width, reads="vector"),
        "t_embedder.1.linear_2": Layer(
            rows=3 * width if sizes.adaln_rank else width, columns=width, reads="vector"
        ),
        "final_layer.linear": Layer(rows=sizes.out_channels * PATCH, columns=width),
    }  # fmt: skip
    return layers | _modulation("final_layer.adaln_modulation", width, 2 * width, sizes.adaln_rank)


def _modulation(name: str, width: int, outputs: int, rank: int) -> dict[str, Layer]:
    if not rank:
        return {f"{name}.1": Layer(rows=outputs, columns=width, reads="vector")}
    return {
        f"{name}.1": Layer(rows=rank, columns=width, reads="vector"),
        f"{name}.2": Layer(rows=outputs, columns=rank, reads="vector"),
    }


def _encoder(sizes: EncoderSizes) -> PartCost:
    width, hidden = sizes.width, sizes.mlp_width
    queries, keys = sizes.heads * sizes.head_dim, sizes.key_heads * sizes.head_dim
    one = {
        "self_attn.q_proj": (queries, width), "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries), "mlp.gate_proj": (hidden, width), "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
    }  # fmt: skip
    layers = repeated_layers("layers", sizes.layers, one)
    norms = sizes.layers * (2 * width + 2 * sizes.head_dim) + width
    inside = sum(layer.size for layer in layers.values())
    return PartCost(
        parameters=sizes.vocab * width + inside + norms,
        layers=layers,
        work=3 * hidden + 6 * width,
        operations=2 * inside,
    )


def _adapter(sizes: AdapterSizes) -> PartCost:
    width, source, hidden = sizes.width, sizes.source_width, sizes.mlp_width
    one = {f"self_attn.{name}": (width, width) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    one |= {f"cross_attn.{name}": (width, width) for name in ("q_proj", "o_proj")}
    one |= {f"cross_attn.{name}": (width, source) for name in ("k_proj", "v_proj")}
    one |= {"mlp.0": (hidden, width), "mlp.2": (width, hidden)}
    layers = repeated_layers("blocks", sizes.layers, one)
    layers["out_proj"] = Layer(rows=sizes.out_width, columns=width, reads="text")
    if sizes.embed_width != width:
        layers["in_proj"] = Layer(rows=width, columns=sizes.embed_width, reads="text")
    inside = sum(layer.size for layer in layers.values())
    norms = sizes.layers * (3 * width + 4 * (width // sizes.heads) + hidden + width) + width + sizes.out_width
    return PartCost(
        parameters=sizes.vocab * sizes.embed_width + inside + norms,
        layers=layers,
        work=2 * hidden + 6 * width,
        operations=2 * inside,
    )
