"""Module names of one model in the formats that other programs use. No torch.

The denoiser is named as in the original files, the adapter and the text encoder relative to their own root. A LoRA key
is a module name in one of a few spellings plus a suffix; sd-scripts joins with underscores what others join with dots,
so its names can only be read back from a table of all modules, which `module_paths` builds for any depth.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from tuner.core.types import COMFYUI_KINDS, LYCORIS_KINDS, KeyFormat, KeyMaps

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


# --- all linears ------------------------------------------------------------------------------------------------------


def denoiser_modules(blocks: int) -> tuple[str, ...]:
    """Every linear that a denoiser of that depth can have, in the order of the forward pass."""
    paths = ["x_embedder.proj.1", "t_embedder.1.linear_1", "t_embedder.1.linear_2"]
    for index in range(blocks):
        paths += [f"blocks.{index}.{kind}.{name}" for kind in ("self_attn", "cross_attn") for name in ATTENTION]
        paths += [f"blocks.{index}.mlp.layer1", f"blocks.{index}.mlp.layer2"]
        paths += [f"blocks.{index}.{name}.{part}" for name in MODULATIONS for part in (1, 2)]
    return (*paths, "final_layer.linear", "final_layer.adaln_modulation.1", "final_layer.adaln_modulation.2")


def adapter_modules(layers: int) -> tuple[str, ...]:
    """Every linear of an LLM adapter of that depth."""
    projections = ("q_proj", "k_proj", "v_proj", "o_proj")
    inner = [f"{kind}.{name}" for kind in ("self_attn", "cross_attn") for name in projections]
    blocks = [f"blocks.{index}.{name}" for index in range(layers) for name in (*inner, "mlp.0", "mlp.2")]
    return ("in_proj", *blocks, "out_proj")


def encoder_modules(layers: int) -> tuple[str, ...]:
    """Every linear of a text encoder of that depth."""
    inner = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    inner += [f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    return tuple(f"layers.{index}.{name}" for index in range(layers) for name in inner)


ADAPTER_INDEX = re.compile(r"(?:llm_adapter|text_conditioner)[._]blocks[._](\d+)[._]")
DENOISER_INDEX = re.compile(r"(?<!llm_adapter[._])(?<!text_conditioner[._])blocks[._](\d+)[._]")
ENCODER_INDEX = re.compile(r"layers[._](\d+)[._]")


def module_paths(keys: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Module paths by component, deep enough for every index that occurs in the keys of an adapter file."""

    def depth(pattern: re.Pattern[str]) -> int:
        return max((int(match[1]) + 1 for key in keys if (match := pattern.search(key))), default=0)

    blocks, layers, depth_of_encoder = depth(DENOISER_INDEX), depth(ADAPTER_INDEX), depth(ENCODER_INDEX)
    return {
        "denoiser": (*denoiser_modules(blocks), "t_embedding_norm", *_norms(blocks, HEAD_NORMS)),
        "llm_adapter": (*adapter_modules(layers), *_norms(layers, (*HEAD_NORMS, *ADAPTER_NORMS)), "norm"),
        "qwen3": (*encoder_modules(depth_of_encoder), *_norms(depth_of_encoder, ENCODER_NORMS, "layers"), "norm"),
    }


HEAD_NORMS = tuple(f"{kind}.{name}" for kind in ("self_attn", "cross_attn") for name in ("q_norm", "k_norm"))
ADAPTER_NORMS = ("norm_self_attn", "norm_cross_attn", "norm_mlp")
ENCODER_NORMS = ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm")


def _norms(count: int, names: tuple[str, ...], root: str = "blocks") -> list[str]:
    return [f"{root}.{index}.{name}" for index in range(count) for name in names]


# --- adapter formats --------------------------------------------------------------------------------------------------

DIFFUSERS_RENAME = (
    *(
        (rf"^(blocks\.\d+)\.{re.escape(name)}$", rf"transformer_\1.{other}")
        for name, other in BLOCK_TO_DIFFUSERS.items()
    ),
    *((rf"^{re.escape(name)}$", other) for name, other in ROOT_TO_DIFFUSERS.items()),
)
QWEN3_COMFYUI = "text_encoders.qwen3_06b.transformer.model."


def _peft_like(name: str, alpha: str | None, readers: tuple[str, ...]) -> KeyFormat:
    """ComfyUI's spelling; further prefixes are those that other trainers put before the same module names."""
    return KeyFormat(
        name=name,
        prefixes={
            "denoiser": "diffusion_model.",
            "llm_adapter": "diffusion_model.llm_adapter.",
            "qwen3": QWEN3_COMFYUI,
        },
        down=".lora_A.weight",
        up=".lora_B.weight",
        alpha=alpha,
        kinds=COMFYUI_KINDS,
        read_prefixes={
            "denoiser": ("net.", "transformer."),
            "llm_adapter": ("net.llm_adapter.", "transformer.llm_adapter.", "llm_adapter."),
        },
        readers=readers,
    )


MAPS = KeyMaps(
    formats=(
        # One file for ComfyUI and diffusers: no alpha, because diffusers refuses such keys.
        _peft_like("comfyui", None, ("ComfyUI", "diffusers")),
        _peft_like("comfyui-alpha", ".alpha", ("ComfyUI",)),
        KeyFormat(
            name="sd-scripts",
            prefixes={"denoiser": "lora_unet_", "llm_adapter": "lora_unet_llm_adapter_", "qwen3": "lora_te_"},
            separator="_",
            down=".lora_down.weight",
            up=".lora_up.weight",
            alpha=".alpha",
            kinds=LYCORIS_KINDS,
            readers=("kohya-ss/sd-scripts", "ComfyUI"),
        ),
        KeyFormat(
            name="diffusers",
            prefixes={"denoiser": "transformer.", "llm_adapter": "text_conditioner.", "qwen3": "text_encoder."},
            down=".lora_A.weight",
            up=".lora_B.weight",
            lengths=".lora_magnitude_vector",
            rename={"denoiser": DIFFUSERS_RENAME},
            readers=("diffusers",),
        ),
    ),
    default="comfyui",
    paths=module_paths,
)
"""Every format that is written or read. Values are the same in all of them, up to where alpha / rank is kept."""
