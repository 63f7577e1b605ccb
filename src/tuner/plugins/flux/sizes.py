"""Sizes of a FLUX.1 or Chroma transformer, read from names and shapes of its weight file. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tuner.core.compute.encoder_sizes import block_count, refuse_scaled, under_prefix
from tuner.core.errors import UsageError
from tuner.core.types import Header

from .names import MLP_RATIO, to_diffusers

Flavour = Literal["dev", "schnell", "chroma"]
PREFIXES = ("model.diffusion_model.", "diffusion_model.")
OTHER_PARTS = ("vae.", "first_stage_model.", "text_encoders.", "conditioner.")
"""Prefixes of what else an all-in-one file may hold."""
ORIGINAL_PROBE = "double_blocks.0.img_attn.qkv.weight"
DIFFUSERS_PROBE = "single_transformer_blocks.0.proj_mlp.weight"
SECOND_GENERATION = "double_stream_modulation_img.lin.weight"
LATENT_CHANNELS = 16
PATCH = 2
TOKEN_CHANNELS = LATENT_CHANNELS * PATCH * PATCH


@dataclass(frozen=True, slots=True, kw_only=True)
class Approximator:
    """The network that makes Chroma's modulation vectors: channels per input, width, residual layers."""

    channels: int
    width: int
    layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiserSizes:
    """pooled_width: of the pooled CLIP text, None without one. axes: rotary numbers per axis (none, row, column)."""

    flavour: Flavour
    width: int
    heads: int
    head_dim: int
    blocks: int
    singles: int
    in_channels: int
    out_channels: int
    text_width: int
    pooled_width: int | None
    axes: tuple[int, int, int]
    approximator: Approximator | None = None


def bare_names(names: Iterable[str]) -> dict[str, str]:
    """The transformer's names without prefix, in the file's layout, to the names of the file."""
    listed = list(names)
    return under_prefix(listed, *PREFIXES) or {name: name for name in listed if not name.startswith(OTHER_PARTS)}


def layout_of(names: Iterable[str]) -> Literal["original", "diffusers"] | None:
    """How bare names are spelled, None when they are not of this family."""
    found = set(names)
    if ORIGINAL_PROBE in found and SECOND_GENERATION not in found:
        return "original"
    return "diffusers" if DIFFUSERS_PROBE in found and "context_embedder.weight" in found else None


def diffusers_shapes(header: Header, where: str = "") -> dict[str, tuple[int, ...]]:
    """Shapes by diffusers' names, whatever the file's layout and prefix. UsageError for another family's file."""
    bare = {name: header[old].shape for name, old in bare_names(header).items()}
    layout = layout_of(bare)
    if layout is None:
        raise UsageError("this is not a FLUX.1 or Chroma model", where=where or None,
                         why=f"it has neither {ORIGINAL_PROBE} nor {DIFFUSERS_PROBE}{_looks_like(bare)}",
                         fix="set model.path to the transformer, or --model to this file's family")  # fmt: skip
    refuse_scaled(bare, where)
    if layout == "diffusers":
        return bare
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in bare.items():
        found = to_diffusers(name)
        if found is None:
            raise UsageError(f"unknown tensor {name}", where=where or None, fix="use a file without added keys")
        unit = shape[0] // sum(found.rows)
        for target, rows in zip(found.names, found.rows, strict=True):
            shapes[target] = (unit * rows if len(found.names) > 1 else shape[0], *shape[1:])
    return shapes


def denoiser_sizes(
    shapes: Mapping[str, tuple[int, ...]], where: str = "", settings: Mapping[str, Any] | None = None
) -> DenoiserSizes:
    """Sizes from shapes by diffusers' names. settings: a ``config.json``, of which only the rotary axes are used."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in shapes:
            raise UsageError(f"the weights lack {name}", where=where or None, fix="use a complete model file")
        return shapes[name]

    width, in_channels = shape("x_embedder.weight")
    head_dim = shape("transformer_blocks.0.attn.norm_q.weight")[0]
    if width % head_dim:
        raise UsageError(f"width {width} is not a multiple of the head width {head_dim}", where=where or None)
    if shape("transformer_blocks.0.ff.net.0.proj.weight")[0] != MLP_RATIO * width:
        raise UsageError(f"the MLP is not {MLP_RATIO} times as wide as the model", where=where or None)
    approximator = None
    if "distilled_guidance_layer.in_proj.weight" in shapes:
        inner, channels = shape("distilled_guidance_layer.in_proj.weight")
        approximator = Approximator(
            channels=channels, width=inner, layers=block_count(shapes, "distilled_guidance_layer.layers", where)
        )
    guided = "time_text_embed.guidance_embedder.linear_1.weight" in shapes
    pooled = None if approximator else shape("time_text_embed.text_embedder.linear_1.weight")[1]
    return DenoiserSizes(
        flavour="chroma" if approximator else "dev" if guided else "schnell",
        width=width,
        heads=width // head_dim,
        head_dim=head_dim,
        blocks=block_count(shapes, "transformer_blocks", where),
        singles=block_count(shapes, "single_transformer_blocks", where),
        in_channels=in_channels,
        out_channels=shape("proj_out.weight")[0],
        text_width=shape("context_embedder.weight")[1],
        pooled_width=pooled,
        axes=_axes(head_dim, settings or {}),
        approximator=approximator,
    )


def _axes(head_dim: int, settings: Mapping[str, Any]) -> tuple[int, int, int]:
    """Rotary numbers per axis: 16, 56, 56 for the public width 128, the same shares rounded to even for others."""
    given = settings.get("axes_dims_rope")
    if isinstance(given, list | tuple) and len(given) == 3 and sum(given) == head_dim:
        return (int(given[0]), int(given[1]), int(given[2]))
    side = 2 * (7 * head_dim // 32)
    return (head_dim - 2 * side, side, side)


FAMILIES = (
    (r"(.*\.)?(lora_(unet|te\d*)_.*|.*\.lora_[AB]\..*|.*\.lora_(up|down)\..*)", "an adapter (LoRA), not a base model"),
    (r"double_stream_modulation_img\..*", "a FLUX.2 model"),
    (r"(.*\.)?joint_blocks\..*|pos_embed\.pos_embed", "a Stable Diffusion 3 model"),
    (r"(.*\.)?(input_blocks|down_blocks\.\d+\.attentions)\..*", "a Stable Diffusion 1.x, 2.x or XL model"),
    (r"transformer_blocks\.\d+\.(img_mod|txt_mod)\..*", "a Qwen-Image model"),
    (r"(.*\.)?blocks\.\d+\.(self_attn|mlp\.layer1)\..*", "a model with one list of blocks"),
    (r"(.*\.)?(embed_tokens|shared)\.weight|(.*\.)?text_model\..*", "a text encoder"),
    (r"(encoder|decoder)\.(conv_in|mid|mid_block|down|up).*", "an autoencoder"),
)
"""Key patterns of other files that users have at hand, for the error message only."""


def _looks_like(names: Iterable[str]) -> str:
    listed = list(names)
    for pattern, words in FAMILIES:
        if any(re.fullmatch(pattern, name) for name in listed):
            return f"; it looks like {words}"
    return ""
