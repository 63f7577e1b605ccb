"""What kind of model a file holds, read from tensor names and shapes alone. No torch.

Sizes: D width of the denoiser, r rank of its modulation, W width of the adapter, S width of the text encoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tuner.core.errors import UsageError

from . import names

if TYPE_CHECKING:
    from tuner.core.types import Header

PATCH = 4
"""Pixels of one patch in latent space: 2 x 2."""
ADAPTER_PREFIX = "llm_adapter."
DENOISER_PREFIXES = ("net.", "model.diffusion_model.")
BUNDLED = ("text_encoders.", "vae.", "first_stage_model.", "cond_stage_model.", "conditioner.")
"""First parts of the other components' keys in an all-in-one file."""
OWN_PROBE = "blocks.0.adaln_modulation_self_attn.1.weight"
"""A tensor that every model of the family has, and no other in whatever layout."""
PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
"""A VAE under such a name is read by torch's restricted loader; it has no header that could be read without torch."""
IGNORED = re.compile(r"pos_embedder\..*|.*inv_freq")
"""Buffers that some files carry and that are recomputed in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiserSizes:
    """Sizes of the diffusion transformer. ``adaln_rank`` 0: modulation is one matrix instead of two."""

    width: int
    heads: int
    head_dim: int
    blocks: int
    mlp_width: int
    text_width: int
    adaln_rank: int
    in_channels: int
    out_channels: int
    rope_ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSizes:
    """Sizes of the LLM adapter: ``embed_width`` of its token table, ``source_width`` of the states that it reads."""

    vocab: int
    embed_width: int
    width: int
    source_width: int
    out_width: int
    layers: int
    heads: int
    mlp_width: int
    in_proj_bias: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSizes:
    """Sizes of the text encoder."""

    vocab: int
    width: int
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    mlp_width: int


# --- key layouts ------------------------------------------------------------------------------------------------------


def original_names(header: Iterable[str]) -> dict[str, str]:
    """Original key names to the names in the file, for every layout that is accepted.

    Layouts: original names, bare or behind ``net.`` (stripped key by key) or ``model.diffusion_model.``, and those of
    diffusers. The adapter's keys, if any, keep the ``llm_adapter.`` prefix. Recomputed buffers are left out.
    """
    keys = list(header)
    all_in_one = any(key.startswith("model.diffusion_model.") for key in keys)
    found: dict[str, str] = {}
    for key in keys:
        name = key
        for prefix in DENOISER_PREFIXES:
            name = name.removeprefix(prefix)
        if all_in_one and name == key and key.startswith(BUNDLED):
            continue
        module, _, leaf = name.rpartition(".")
        translated = names.from_diffusers(module)
        if translated is not None:
            name = f"{translated}.{leaf}"
        if not IGNORED.fullmatch(name):
            found[name] = key
    return found


def adapter_names(header: Iterable[str]) -> dict[str, str]:
    """Adapter key names without any prefix to the names in a separate adapter file."""
    found: dict[str, str] = {}
    for key in header:
        name = key
        for prefix in (*DENOISER_PREFIXES, ADAPTER_PREFIX, "text_conditioner."):
            name = name.removeprefix(prefix)
        if not IGNORED.fullmatch(name):
            found[name] = key
    return found


def encoder_names(header: Iterable[str]) -> dict[str, str]:
    """Text encoder key names relative to the inner model to the names in the file; the output head is left out."""
    found: dict[str, str] = {}
    for key in header:
        name = key.removeprefix("model.")
        if not name.startswith("lm_head.") and not IGNORED.fullmatch(name):
            found[name] = key
    return found


# --- sizes ------------------------------------------------------------------------------------------------------------


def denoiser_sizes(shapes: Header, where: str = "") -> DenoiserSizes:
    """Sizes of the denoiser from original key names. Raises UsageError naming what does not fit together."""
    check_family(shapes, where)
    reader = _Shapes(shapes, where)
    width = reader("x_embedder.proj.1.weight")[0]
    head_dim = reader("blocks.0.self_attn.q_norm.weight")[0]
    in_channels = reader("x_embedder.proj.1.weight")[1] // PATCH - 1
    low_rank = "blocks.0.adaln_modulation_self_attn.2.weight" in shapes
    return DenoiserSizes(
        width=width,
        heads=reader.divide("width", width, "head size", head_dim),
        head_dim=head_dim,
        blocks=reader.count("blocks"),
        mlp_width=reader("blocks.0.mlp.layer1.weight")[0],
        text_width=reader("blocks.0.cross_attn.k_proj.weight")[1],
        adaln_rank=reader("blocks.0.adaln_modulation_self_attn.1.weight")[0] if low_rank else 0,
        in_channels=in_channels,
        out_channels=reader("final_layer.linear.weight")[0] // PATCH,
        rope_ratio=3.0 if in_channels == 17 else 4.0,
    )


def adapter_sizes(shapes: Header, where: str = "") -> AdapterSizes:
    """Sizes of the adapter from key names without prefix."""
    if "out_proj.weight" not in shapes:
        raise UsageError(
            "this file has no LLM adapter",
            where=where or None,
            why="llm_adapter.out_proj.weight is absent",
            fix="set model.llm_adapter.path to the file that holds the adapter",
        )
    reader = _Shapes(shapes, where)
    width = reader("out_proj.weight")[1]
    head_dim = reader("blocks.0.self_attn.q_norm.weight")[0]
    return AdapterSizes(
        vocab=reader("embed.weight")[0],
        embed_width=reader("embed.weight")[1],
        width=width,
        source_width=reader("blocks.0.cross_attn.k_proj.weight")[1],
        out_width=reader("out_proj.weight")[0],
        layers=reader.count("blocks"),
        heads=reader.divide("adapter width", width, "head size", head_dim),
        mlp_width=reader("blocks.0.mlp.0.weight")[0],
        in_proj_bias="in_proj.bias" in shapes,
    )


def encoder_sizes(shapes: Header, where: str = "") -> EncoderSizes:
    """Sizes of the text encoder from key names relative to its inner model."""
    if "layers.0.self_attn.q_norm.weight" not in shapes:
        raise UsageError("this is not a Qwen3 text encoder", where=where or None,
                         why=f"it has no layers.0.self_attn.q_norm.weight{_looks_like(shapes)}",
                         fix="set model.text_encoders.qwen3.path to the Qwen3-0.6B folder or file")  # fmt: skip
    reader = _Shapes(shapes, where)
    head_dim = reader("layers.0.self_attn.q_norm.weight")[0]
    vocab, width = reader("embed_tokens.weight")
    return EncoderSizes(
        vocab=vocab,
        width=width,
        layers=reader.count("layers"),
        heads=reader.divide("query width", reader("layers.0.self_attn.q_proj.weight")[0], "head size", head_dim),
        key_heads=reader.divide("key width", reader("layers.0.self_attn.k_proj.weight")[0], "head size", head_dim),
        head_dim=head_dim,
        mlp_width=reader("layers.0.mlp.gate_proj.weight")[0],
    )


class _Shapes:
    """Shape look-ups whose failures tell the user which key of which file is at fault."""

    def __init__(self, shapes: Header, where: str) -> None:
        self.shapes, self.where = shapes, where or None

    def __call__(self, name: str) -> tuple[int, ...]:
        if name not in self.shapes:
            raise UsageError(f"the weights lack {name}", where=self.where, fix="use a complete model file")
        return self.shapes[name].shape

    def count(self, root: str) -> int:
        """Number of blocks under ``root``; a gap in their numbers is an error."""
        pattern = re.compile(rf"{re.escape(root)}\.(\d+)\.")
        numbers = {int(match[1]) for name in self.shapes if (match := pattern.match(name))}
        missing = sorted(set(range(max(numbers, default=0) + 1)) - numbers)
        if missing:
            raise UsageError(f"the weights lack {root}.{missing[0]}", where=self.where,
                             why=f"they hold {len(numbers)} blocks numbered up to {max(numbers, default=0)}",
                             fix="use a complete model file")  # fmt: skip
        return len(numbers)

    def divide(self, what: str, whole: int, part_name: str, part: int) -> int:
        if part < 1 or whole % part:
            raise UsageError(f"{what} {whole} is not a multiple of the {part_name} {part}", where=self.where)
        return whole // part


# --- families ---------------------------------------------------------------------------------------------------------

FAMILIES = (
    (r"(.*\.)?(lora_(unet|te\d*)_.*|.*\.lora_[AB]\..*|.*\.lora_(up|down)\..*)", "an adapter (LoRA), not a base model"),
    (r"(.*\.)?(double_blocks|single_transformer_blocks)\..*", "a Flux-like model"),
    (r"(.*\.)?joint_blocks\..*|(.*\.)?context_embedder\..*", "a Stable Diffusion 3 model"),
    (r"(.*\.)?(input_blocks|down_blocks\.\d+\.attentions)\..*", "a Stable Diffusion 1.x, 2.x or XL model"),
    (r"(.*\.)?transformer_blocks\.\d+\.(img_mod|txt_mod)\..*", "a Qwen-Image model"),
    (r"(.*\.)?blocks\.\d+\.self_attn\.(q|norm_q)\..*", "a Wan model"),
    (r"(.*\.)?(cap_embedder|noise_refiner)\..*", "a Lumina model"),
    (r"(.*\.)?(embed_tokens|shared)\.weight|(.*\.)?text_model\..*", "a text encoder"),
    (r"(encoder|decoder)\.(conv1|conv_in|middle|mid|mid_block|down|up).*", "a VAE"),
)
"""Key patterns of other files that users have at hand, for the error message only."""


def looks_like(header: Iterable[str]) -> str | None:
    """What a file seems to be, in words, or None."""
    keys = list(header)
    for pattern, words in FAMILIES:
        compiled = re.compile(pattern)
        if any(compiled.fullmatch(key) for key in keys):
            return words
    return None


def _looks_like(header: Iterable[str]) -> str:
    words = looks_like(header)
    return f"; it looks like {words}" if words else ""


def check_family(shapes: Mapping[str, object], where: str = "") -> None:
    """Raise UsageError when original key names are not those of this family."""
    if "blocks.0.mlp.layer1.weight" not in shapes:
        raise UsageError(
            "this is not an Anima model",
            where=where or None,
            why=f"it has no blocks.0.mlp.layer1.weight{_looks_like(shapes)}",
            fix="set model.path to the Anima weights, or --model to the family of this file",
        )
