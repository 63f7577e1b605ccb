"""Names of the transformer's tensors in the two layouts, and of adapters in the formats of other programs. No torch.

Module names inside the program are diffusers'. The original layout (Black Forest Labs) joins q, k and v, in single
blocks the MLP too, and keeps the final modulation's two halves in the other order. The tables below are the whole
difference; loading, saving, adapters and merging all read them, so any width and depth works.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from tuner.core.compute.encoder_sizes import clip_modules, t5_modules
from tuner.core.types import JOINT_KINDS, LYCORIS_KINDS, Fused, KeyFormat, KeyMaps

# Original name to diffusers' inside one block; a tuple is a joint matrix, its parts in row order.
DOUBLE: dict[str, str | tuple[str, ...]] = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
SINGLE: dict[str, str | tuple[str, ...]] = {
    "modulation.lin": "norm.linear",
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
FINAL_MODULATION = "norm_out.linear"
ROOT: dict[str, str] = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.adaLN_modulation.1": FINAL_MODULATION,
    "final_layer.linear": "proj_out",
    "distilled_guidance_layer.in_proj": "distilled_guidance_layer.in_proj",
    "distilled_guidance_layer.out_proj": "distilled_guidance_layer.out_proj",
}
APPROXIMATOR = {"in_layer": "linear_1", "out_layer": "linear_2"}
BLOCK_ROOTS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
BLOCK_TABLES = {"double_blocks": DOUBLE, "single_blocks": SINGLE}
MLP_RATIO = 4
"""Width of every MLP over the model's; a constant of the architecture, not of a size."""


@dataclass(frozen=True, slots=True)
class Mapped:
    """Where one original tensor goes: diffusers' names, rows of each in multiples of the width, halves exchanged."""

    names: tuple[str, ...]
    rows: tuple[int, ...] = (1,)
    exchange: bool = False


def to_diffusers(name: str) -> Mapped | None:
    """The place of an original tensor (``double_blocks.0.img_attn.qkv.weight``), None for an unknown name."""
    module, _, leaf = name.rpartition(".")
    leaf = "weight" if leaf == "scale" else leaf
    root, _, rest = module.partition(".")
    if root in BLOCK_ROOTS:
        index, _, inner = rest.partition(".")
        found = BLOCK_TABLES[root].get(inner)
        if found is None or not index.isdigit():
            return None
        parts = (found,) if isinstance(found, str) else found
        names = tuple(f"{BLOCK_ROOTS[root]}.{index}.{part}.{leaf}" for part in parts)
        return Mapped(names, tuple(MLP_RATIO if part == "proj_mlp" else 1 for part in parts))
    if match := re.fullmatch(r"distilled_guidance_layer\.(layers|norms)\.(\d+)(?:\.(in_layer|out_layer))?", module):
        tail = f".{APPROXIMATOR[match[3]]}" if match[3] else ""
        return Mapped((f"distilled_guidance_layer.{match[1]}.{match[2]}{tail}.{leaf}",))
    if module not in ROOT:
        return None
    return Mapped((f"{ROOT[module]}.{leaf}",), exchange=ROOT[module] == FINAL_MODULATION)


def original_names(blocks: int, singles: int, approximator_layers: int = 0) -> tuple[str, ...]:
    """Every tensor name that an original file of that depth can have, in the order of the tables."""
    names = [f"{module}.{leaf}" for module in ROOT for leaf in ("weight", "bias")]
    for root, count in (("double_blocks", blocks), ("single_blocks", singles)):
        for index in range(count):
            for inner in BLOCK_TABLES[root]:
                leaves = ("scale",) if inner.endswith("_norm") else ("weight", "bias")
                names += [f"{root}.{index}.{inner}.{leaf}" for leaf in leaves]
    for index in range(approximator_layers):
        inside = f"distilled_guidance_layer.layers.{index}"
        names += [f"{inside}.{part}.{leaf}" for part in APPROXIMATOR for leaf in ("weight", "bias")]
        names.append(f"distilled_guidance_layer.norms.{index}.scale")
    return tuple(names)


# --- adapters ---------------------------------------------------------------------------------------------------------


def denoiser_modules(blocks: int, singles: int) -> tuple[str, ...]:
    """diffusers' names of every linear that a transformer of that depth can have."""
    found: list[str] = []
    for root, count in (("double_blocks", blocks), ("single_blocks", singles)):
        for index in range(count):
            for part in BLOCK_TABLES[root].values():
                names = (part,) if isinstance(part, str) else part
                found += [f"{BLOCK_ROOTS[root]}.{index}.{name}" for name in names if "norm_" not in name]
    root_modules = [name for name in ROOT.values() if not name.startswith("distilled_guidance_layer")]
    return (*found, *root_modules)


def norm_modules(blocks: int, singles: int) -> tuple[str, ...]:
    """The norms of queries and keys, in diffusers' names."""
    return tuple(
        f"{BLOCK_ROOTS[root]}.{index}.{name}"
        for root, count in (("double_blocks", blocks), ("single_blocks", singles))
        for index in range(count)
        for name in BLOCK_TABLES[root].values()
        if isinstance(name, str) and "norm_" in name
    )


_DOUBLE_BLOCK, _SINGLE_BLOCK = r"transformer_blocks\.\d+\.", r"single_transformer_blocks\.\d+\."
CLASSES = {
    "img_attn": _DOUBLE_BLOCK + r"attn\.(to_[qkv]|to_out\.0)",
    "txt_attn": _DOUBLE_BLOCK + r"attn\.(add_[qkv]_proj|to_add_out)",
    "img_mlp": _DOUBLE_BLOCK + r"ff\..*",
    "txt_mlp": _DOUBLE_BLOCK + r"ff_context\..*",
    "img_mod": _DOUBLE_BLOCK + r"norm1\.linear",
    "txt_mod": _DOUBLE_BLOCK + r"norm1_context\.linear",
    "single": _SINGLE_BLOCK + r"(attn\.to_[qkv]|proj_mlp|proj_out)",
    "single_mod": _SINGLE_BLOCK + r"norm\.linear",
}
"""Kinds of layers as users of kohya-ss/sd-scripts call them, as patterns for ``network.rules``."""
EMBEDDERS = {
    "img_in": "x_embedder",
    "time_in": r"time_text_embed\.timestep_embedder\..*",
    "vector_in": r"time_text_embed\.text_embedder\..*",
    "guidance_in": r"time_text_embed\.guidance_embedder\..*",
    "txt_in": "context_embedder",
}
"""The same for what stands outside of the blocks; add them by ``network.include``."""
_BLOCK = re.compile(r"(?<!single_)(?:double_blocks|transformer_blocks)[._](\d+)[._]")
_SINGLE = re.compile(r"(?:single_blocks|single_transformer_blocks)[._](\d+)[._]")
_CLIP = re.compile(r"encoder[._]layers[._](\d+)[._]")
_T5 = re.compile(r"encoder[._]block[._](\d+)[._]")


def module_paths(keys: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Module paths by component, deep enough for every index that occurs in the keys of an adapter file."""

    def depth(pattern: re.Pattern[str]) -> int:
        return max((int(match[1]) + 1 for key in keys if (match := pattern.search(key))), default=0)

    blocks, singles = depth(_BLOCK), depth(_SINGLE)
    return {
        "denoiser": (*denoiser_modules(blocks, singles), *norm_modules(blocks, singles)),
        "clip_l": clip_modules(depth(_CLIP)),
        "t5": t5_modules(depth(_T5)),
    }


_QKV = Fused(parent=r"transformer_blocks\.(\d+)\.attn", members=("to_q", "to_k", "to_v"), rows=(1, 1, 1))
_TEXT_QKV = Fused(
    parent=r"transformer_blocks\.(\d+)\.attn", members=("add_q_proj", "add_k_proj", "add_v_proj"), rows=(1, 1, 1)
)
_LINEAR1 = Fused(
    parent=r"single_transformer_blocks\.(\d+)",
    members=("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    rows=(1, 1, 1, MLP_RATIO),
)
FUSED = (_QKV, _TEXT_QKV, _LINEAR1)
"""Linears that the original layout holds as one, and that therefore get one adapter."""
_FUSED_NAMES = (
    (_QKV, r"double_blocks.\1.img_attn.qkv"),
    (_TEXT_QKV, r"double_blocks.\1.txt_attn.qkv"),
    (_LINEAR1, r"single_blocks.\1.linear1"),
)
_RENAME = (
    *(
        (rf"^{BLOCK_ROOTS[root]}\.(\d+)\.{re.escape(name)}$", rf"{root}.\1.{original}")
        for root, table in BLOCK_TABLES.items()
        for original, name in table.items()
        if isinstance(name, str)
    ),
    *((rf"^{re.escape(name)}$", original) for original, name in ROOT.items()),
)


def _original(
    name: str, prefixes: dict[str, str], *, dotted: bool, alpha: str | None, readers: tuple[str, ...]
) -> KeyFormat:
    """A format that spells modules as the original layout does; ``final_layer`` modulations change their halves."""
    return KeyFormat(
        name=name,
        prefixes=prefixes,
        separator="." if dotted else "_",
        down=".lora_A.weight" if dotted else ".lora_down.weight",
        up=".lora_B.weight" if dotted else ".lora_up.weight",
        alpha=alpha,
        kinds=JOINT_KINDS,
        rename={"denoiser": _RENAME},
        fused={"denoiser": _FUSED_NAMES},
        exchange={"denoiser": (re.escape(FINAL_MODULATION),)},
        read_prefixes={"denoiser": ("lora_unet_",), "t5": ("lora_te2_",)} if not dotted else {"denoiser": ("",)},
        readers=readers,
    )


_COMFYUI = {
    "denoiser": "diffusion_model.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "t5": "text_encoders.t5xxl.transformer.",
}

MAPS = KeyMaps(
    formats=(
        _original(
            "sd-scripts",
            {"denoiser": "lora_unet_", "clip_l": "lora_te1_", "t5": "lora_te3_"},
            dotted=False,
            alpha=".alpha",
            readers=("kohya-ss/sd-scripts", "ComfyUI"),
        ),
        _original("comfyui", _COMFYUI, dotted=True, alpha=".alpha", readers=("ComfyUI",)),
        KeyFormat(
            name="diffusers",
            prefixes={"denoiser": "transformer.", "clip_l": "text_encoder.", "t5": "text_encoder_2."},
            down=".lora_A.weight",
            up=".lora_B.weight",
            lengths=".lora_magnitude_vector",
            read_prefixes={"denoiser": ("diffusion_model.", "")},
            readers=("diffusers", "ComfyUI"),
        ),
        # Names of separate projections, which ComfyUI knows too: kinds that cannot share a joint matrix need them.
        KeyFormat(
            name="lycoris",
            prefixes={"denoiser": "lycoris_", "clip_l": "lora_te1_", "t5": "lora_te3_"},
            separator="_",
            down=".lora_down.weight",
            up=".lora_up.weight",
            alpha=".alpha",
            kinds=LYCORIS_KINDS,
            readers=("ComfyUI",),
        ),
        replace(
            _original(
                "sd-scripts-oft",
                {"denoiser": "oft_unet_"},
                dotted=False,
                alpha=".alpha",
                readers=("kohya-ss/sd-scripts",),
            ),
            kinds=("oft",),
            numbered=True,
            read_prefixes={},
        ),
    ),
    default="sd-scripts",
    paths=module_paths,
)
"""Every format that is written or read. Products are the same in all of them."""
