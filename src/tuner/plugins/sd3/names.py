"""Module names of SD3 in the layouts that programs use. No torch.

The modules are diffusers': ``transformer_blocks.N.attn.to_q``. Original files join queries, keys and values in one
matrix, and exchange the two halves of the final modulation and of the last block's text modulation.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

from tuner.core.compute.encoder_sizes import clip_modules, t5_modules
from tuner.core.types import JOINT_KINDS, LYCORIS_KINDS, Fused, KeyFormat, KeyMaps, LoraRules

QKV = ("to_q", "to_k", "to_v")
ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")

FUSED = {
    "x_block.attn.qkv": tuple(f"attn.{name}" for name in QKV),
    "context_block.attn.qkv": tuple(f"attn.{name}" for name in ADDED_QKV),
    "x_block.attn2.qkv": tuple(f"attn2.{name}" for name in QKV),
}
"""Inside one block: original matrices that are several modules here, in the order of their rows."""
BLOCK = {
    "x_block.attn.proj": "attn.to_out.0",
    "context_block.attn.proj": "attn.to_add_out",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
NORMS = {
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
}
ROOT = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
NORM_PROBE = "transformer_blocks.0.attn.norm_added_k.weight"


def parameter_name(original: str) -> str:
    """diffusers' name of a parameter outside the blocks."""
    if original == "pos_embed":
        return "pos_embed.pos_embed"
    module, _, leaf = original.rpartition(".")
    return f"{ROOT[module]}.{leaf}"


def parameter_parts(original: str) -> tuple[str, ...] | None:
    """diffusers' names of the parameters that one original parameter becomes, by rows; None for an unknown name."""
    if original == "pos_embed":
        return ("pos_embed.pos_embed",)
    module, _, leaf = original.rpartition(".")
    match = re.fullmatch(r"joint_blocks\.(\d+)\.(.+)", module)
    if match is None:
        return (f"{ROOT[module]}.{leaf}",) if module in ROOT else None
    number, inner = match.groups()
    parts = FUSED.get(inner) or tuple(filter(None, (BLOCK.get(inner) or NORMS.get(inner),)))
    return tuple(f"transformer_blocks.{number}.{part}.{leaf}" for part in parts) or None


def original_parameters(blocks: int) -> tuple[str, ...]:
    """Every original parameter name that a denoiser of that depth can have."""
    leaves = ("weight", "bias")
    found = ["pos_embed", *(f"{module}.{leaf}" for module in ROOT for leaf in leaves)]
    for index in range(blocks):
        inner = (*FUSED, *BLOCK, *NORMS)
        found += [f"joint_blocks.{index}.{module}.{leaf}" for module in inner for leaf in leaves]
    return tuple(found)


def exchanged(module: str, blocks: int) -> bool:
    """Whether the two halves of the rows of a module (diffusers' name) lie in the other order in original files."""
    return module in ("norm_out.linear", f"transformer_blocks.{blocks - 1}.norm1_context.linear")


# --- adapters ---------------------------------------------------------------------------------------------------------

BLOCKS = r"transformer_blocks\.\d+\."
CLASSES = {
    "x_attn": BLOCKS + r"(attn|attn2)\.(to_q|to_k|to_v|to_out\.0)",
    "context_attn": BLOCKS + r"attn\.(add_[qkv]_proj|to_add_out)",
    "x_mlp": BLOCKS + r"ff\..*",
    "context_mlp": BLOCKS + r"ff_context\..*",
    "x_mod": BLOCKS + r"norm1\.linear",
    "context_mod": BLOCKS + r"norm1_context\.linear",
}
"""Linears of the blocks by side and kind, as the options of other trainers name them."""
EMBEDDER_KINDS = {
    "context_embedder": "context_embedder",
    "t_embedder": r"time_text_embed\.timestep_embedder\..*",
    "x_embedder": r"pos_embed\.proj",
    "y_embedder": r"time_text_embed\.text_embedder\..*",
    "final_layer_adaLN_modulation": r"norm_out\.linear",
    "final_layer_linear": "proj_out",
}
EMBEDDERS = r"context_embedder|time_text_embed\..*|pos_embed\.proj|norm_out\.linear|proj_out"
TEXT_LAYERS = {
    "clip_l": r"text_model\.encoder\.layers\..*",
    "clip_g": r"text_model\.encoder\.layers\..*",
    "t5": r"encoder\.block\..*",
}
TEXT = tuple(dict.fromkeys(TEXT_LAYERS.values()))

_GROUPS = tuple(
    (Fused(parent=rf"transformer_blocks\.(\d+)\.{module}", members=members, rows=(1, 1, 1)), original)
    for module, members, original in (
        ("attn", QKV, "x_block.attn.qkv"),
        ("attn", ADDED_QKV, "context_block.attn.qkv"),
        ("attn2", QKV, "x_block.attn2.qkv"),
    )
)

LORA = LoraRules(
    include={
        "denoiser": (BLOCKS + r".*", EMBEDDERS),
        **{name: (pattern,) for name, pattern in TEXT_LAYERS.items()},
    },
    exclude=(EMBEDDERS,),
    presets={
        "blocks": ((BLOCKS + r".*", *TEXT), ()),
        "attention": ((CLASSES["x_attn"], CLASSES["context_attn"], *TEXT), ()),
        "mlp": ((CLASSES["x_mlp"], CLASSES["context_mlp"], *TEXT), ()),
        "image": ((CLASSES["x_attn"], CLASSES["x_mlp"], CLASSES["x_mod"], *TEXT), ()),
        "context": ((CLASSES["context_attn"], CLASSES["context_mlp"], CLASSES["context_mod"], *TEXT), ()),
        "embedders": ((EMBEDDERS, *TEXT), ()),
        "all": ((r".*",), ()),
        **{name: ((pattern, *TEXT), ()) for name, pattern in CLASSES.items()},
    },
    groups={"blocks": "transformer_blocks"},
    fused=tuple(group for group, _ in _GROUPS),
    kinds={**CLASSES, **EMBEDDER_KINDS},
)
"""Without a preset every linear of the blocks is adapted, as in kohya-ss/sd-scripts."""


def lora_rules(*, dual: bool) -> LoraRules:
    """The rules for a model with or without second attentions over the image."""
    return LORA if dual else replace(LORA, fused=tuple(group for group in LORA.fused if "attn2" not in group.parent))


def denoiser_modules(blocks: int) -> tuple[str, ...]:
    """Every linear that a denoiser of that depth can have, and its patch convolution."""
    paths = list(ROOT.values())
    for index in range(blocks):
        inner = [*(part for parts in FUSED.values() for part in parts), *BLOCK.values()]
        paths += [f"transformer_blocks.{index}.{name}" for name in inner]
    return tuple(paths)


def module_paths(keys: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Module paths by component, deep enough for every index that occurs in the keys of an adapter file."""

    def depth(pattern: str) -> int:
        return max((int(match[1]) + 1 for key in keys if (match := re.search(pattern, key))), default=0)

    layers, blocks = depth(r"layers[._](\d+)[._]"), depth(r"(?:joint|transformer)_blocks[._](\d+)[._]")
    norms = [f"transformer_blocks.{index}.{name}" for index in range(blocks) for name in NORMS.values()]
    return {
        "denoiser": (*denoiser_modules(blocks), *norms),
        "clip_l": clip_modules(layers),
        "clip_g": clip_modules(layers),
        "t5": t5_modules(depth(r"encoder[._]block[._](\d+)[._]")),
    }


_RENAME = (
    *((rf"^transformer_blocks\.(\d+)\.{re.escape(name)}$", rf"joint_blocks.\1.{old}") for old, name in BLOCK.items()),
    *((rf"^{re.escape(name)}$", old) for old, name in ROOT.items()),
)
# Patterns without regard to depth: only matrices with twice as many rows as columns are exchanged.
_EXCHANGED = (r"norm_out\.linear", r"transformer_blocks\.\d+\.norm1_context\.linear")


def _original(
    name: str, prefixes: dict[str, str], separator: str, down: str, up: str, readers: tuple[str, ...]
) -> KeyFormat:
    """A format that spells the denoiser's modules as original files do."""
    return KeyFormat(
        name=name,
        prefixes=prefixes,
        separator=separator,
        down=down,
        up=up,
        alpha=".alpha",
        kinds=JOINT_KINDS,
        rename={"denoiser": _RENAME},
        fused={"denoiser": tuple((group, rf"joint_blocks.\1.{original}") for group, original in _GROUPS)},
        exchange={"denoiser": _EXCHANGED},
        readers=readers,
    )


MAPS = KeyMaps(
    formats=(
        _original(
            "sd-scripts",
            {"denoiser": "lora_unet_", "clip_l": "lora_te1_", "clip_g": "lora_te2_", "t5": "lora_te3_"},
            "_",
            ".lora_down.weight",
            ".lora_up.weight",
            ("kohya-ss/sd-scripts", "ComfyUI"),
        ),
        _original(
            "comfyui",
            {
                "denoiser": "diffusion_model.",
                "clip_l": "text_encoders.clip_l.transformer.",
                "clip_g": "text_encoders.clip_g.transformer.",
                "t5": "text_encoders.t5xxl.transformer.",
            },
            ".",
            ".lora_A.weight",
            ".lora_B.weight",
            ("ComfyUI",),
        ),
        KeyFormat(
            name="diffusers",
            prefixes={
                "denoiser": "transformer.",
                "clip_l": "text_encoder.",
                "clip_g": "text_encoder_2.",
                "t5": "text_encoder_3.",
            },
            down=".lora_A.weight",
            up=".lora_B.weight",
            lengths=".lora_magnitude_vector",
            readers=("diffusers", "ComfyUI"),
        ),
        # Names of separate projections, which ComfyUI knows too: kinds that cannot share a joint matrix need them.
        KeyFormat(
            name="lycoris",
            prefixes={"denoiser": "lycoris_", "clip_l": "lora_te1_", "clip_g": "lora_te2_", "t5": "lora_te3_"},
            separator="_",
            down=".lora_down.weight",
            up=".lora_up.weight",
            alpha=".alpha",
            kinds=LYCORIS_KINDS,
            readers=("ComfyUI",),
        ),
    ),
    default="sd-scripts",
    paths=module_paths,
)
"""Every format that is written or read. The products of the matrices are the same in all of them."""
