"""Module names of one model in the formats that other programs use. No torch.

The denoiser is named as in the original files, the adapter and the text encoder relative to their own root. A LoRA key
is a module name in one of four spellings plus a suffix; sd-scripts joins with underscores what others join with dots, so
its names can only be read back from a table of all modules, which `module_paths` builds for any depth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .facts import AdapterSizes, DenoiserSizes, EncoderSizes

ATTENTION = ("q_proj", "k_proj", "v_proj", "output_proj")
MODULATIONS = ("adaln_modulation_self_attn", "adaln_modulation_cross_attn", "adaln_modulation_mlp")

# Inside one block: original name to diffusers' name.
BLOCK_TO_DIFFUSERS = {
    "adaln_modulation_self_attn.1": "norm1.linear_1",
    "adaln_modulation_self_attn.2": "norm1.linear_2",
    "adaln_modulation_cross_attn.1": "norm2.linear_1",
    "adaln_modulation_cross_attn.2": "norm2.linear_2",
    "adaln_modulation_mlp.1": "norm3.linear_1",
    "adaln_modulation_mlp.2": "norm3.linear_2",
    "mlp.layer1": "ff.net.0.proj",
    "mlp.layer2": "ff.net.2",
} | {
    f"{original}.{name}": f"{other}.{renamed}"
    for original, other in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for name, renamed in (
        ("q_proj", "to_q"),
        ("k_proj", "to_k"),
        ("v_proj", "to_v"),
        ("output_proj", "to_out.0"),
        ("q_norm", "norm_q"),
        ("k_norm", "norm_k"),
    )
}
ROOT_TO_DIFFUSERS = {
    "x_embedder.proj.1": "patch_embed.proj",
    "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
    "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
    "t_embedding_norm": "time_embed.norm",
    "final_layer.adaln_modulation.1": "norm_out.linear_1",
    "final_layer.adaln_modulation.2": "norm_out.linear_2",
    "final_layer.linear": "proj_out",
}
BLOCK_FROM_DIFFUSERS = {other: original for original, other in BLOCK_TO_DIFFUSERS.items()}
ROOT_FROM_DIFFUSERS = {other: original for original, other in ROOT_TO_DIFFUSERS.items()}


def to_diffusers(module: str) -> str | None:
    """The diffusers name of a denoiser module, None when there is none."""
    return _rename(module, "blocks.", "transformer_blocks.", BLOCK_TO_DIFFUSERS, ROOT_TO_DIFFUSERS)


def from_diffusers(module: str) -> str | None:
    """The original name of a diffusers denoiser module, None when there is none."""
    return _rename(module, "transformer_blocks.", "blocks.", BLOCK_FROM_DIFFUSERS, ROOT_FROM_DIFFUSERS)


def _rename(module: str, prefix: str, new_prefix: str, block: dict[str, str], root: dict[str, str]) -> str | None:
    if not module.startswith(prefix):
        return root.get(module)
    index, _, inner = module.removeprefix(prefix).partition(".")
    renamed = block.get(inner)
    return f"{new_prefix}{index}.{renamed}" if index.isdigit() and renamed else None


def denoiser_modules(sizes: DenoiserSizes) -> tuple[str, ...]:
    """Every linear of the denoiser, in the order of the forward pass."""
    modulation = (1, 2) if sizes.adaln_rank else (1,)
    paths = ["x_embedder.proj.1", "t_embedder.1.linear_1", "t_embedder.1.linear_2"]
    for index in range(sizes.blocks):
        paths += [f"blocks.{index}.{kind}.{name}" for kind in ("self_attn", "cross_attn") for name in ATTENTION]
        paths += [f"blocks.{index}.mlp.layer1", f"blocks.{index}.mlp.layer2"]
        paths += [f"blocks.{index}.{name}.{part}" for name in MODULATIONS for part in modulation]
    paths += ["final_layer.linear", *(f"final_layer.adaln_modulation.{part}" for part in modulation)]
    return tuple(paths)


def adapter_modules(sizes: AdapterSizes) -> tuple[str, ...]:
    """Every linear of the LLM adapter."""
    paths = [
        path
        for index in range(sizes.layers)
        for path in (
            *(
                f"blocks.{index}.{kind}.{name}"
                for kind in ("self_attn", "cross_attn")
                for name in ("q_proj", "k_proj", "v_proj", "o_proj")
            ),
            f"blocks.{index}.mlp.0",
            f"blocks.{index}.mlp.2",
        )
    ]
    return (*(["in_proj"] if sizes.embed_width != sizes.width else []), *paths, "out_proj")


def encoder_modules(sizes: EncoderSizes) -> tuple[str, ...]:
    """Every linear of the text encoder."""
    return tuple(
        f"layers.{index}.{name}"
        for index in range(sizes.layers)
        for name in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        )
    )  # fmt: skip
