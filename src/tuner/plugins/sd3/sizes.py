"""What kind of model a file holds, read from tensor names and shapes alone. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tuner.core.compute.encoder_sizes import refuse_scaled
from tuner.core.errors import UsageError

from . import names

if TYPE_CHECKING:
    from tuner.core.types import Header

HEAD_DIM = 64
"""Width of a head in every public model of the family."""
PREFIX = "model.diffusion_model."
PROBES = ("joint_blocks.0.context_block.attn.qkv.weight", "x_embedder.proj.weight")
DIFFUSERS_PROBE = "transformer_blocks.0.norm1_context.linear.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiserSizes:
    """Sizes of the diffusion transformer.

    side: rows of the square position table. dual: layers with a second attention over the image. qk_norm: RMS norm of
    queries and keys.
    """

    width: int
    heads: int
    blocks: int
    patch: int
    in_channels: int
    out_channels: int
    side: int
    text_width: int
    pooled_width: int
    qk_norm: bool
    dual: tuple[int, ...]


# --- key layouts ------------------------------------------------------------------------------------------------------


def original_names(header: Iterable[str]) -> dict[str, str]:
    """Original key names, without prefix, to the names in a file of that layout; other parts are left out."""
    keys = list(header)
    prefixed = any(key.startswith(PREFIX) for key in keys)
    found = {key.removeprefix(PREFIX): key for key in keys if not prefixed or key.startswith(PREFIX)}
    return found if all(probe in found for probe in PROBES) else {}


def diffusers_names(header: Iterable[str]) -> dict[str, str]:
    """Key names of a file in diffusers' layout, with or without ``transformer.`` in front; {} for another file."""
    found = {key.removeprefix("transformer."): key for key in header}
    return found if DIFFUSERS_PROBE in found and "pos_embed.proj.weight" in found else {}


def looks_like_family(header: Iterable[str]) -> bool:
    """Whether the names are those of this family in one of the layouts."""
    keys = list(header)
    return bool(original_names(keys) or diffusers_names(keys))


# --- sizes ------------------------------------------------------------------------------------------------------------


def denoiser_sizes(header: Header, where: str = "") -> DenoiserSizes:
    """Sizes of the denoiser of a file in either layout. Raises UsageError naming what is absent or does not fit."""
    originals = original_names(header)
    refuse_scaled(originals or header, where)
    if originals:
        shapes = {new: header[old].shape for new, old in originals.items()}
        return _sizes(shapes, where, original=True)
    found = diffusers_names(header)
    if found:
        return _sizes({new: header[old].shape for new, old in found.items()}, where, original=False)
    raise UsageError("this is not a Stable Diffusion 3 model", where=where or None, why=_seen(header),
                     fix="set model.path to SD3 or SD3.5 weights, or --model to the family of this file")  # fmt: skip


def _sizes(shapes: Mapping[str, tuple[int, ...]], where: str, *, original: bool) -> DenoiserSizes:
    def shape(module: str, leaf: str = "weight") -> tuple[int, ...]:
        name = f"{module}.{leaf}" if leaf else module
        if not original:
            name = names.parameter_name(name)
        if name not in shapes:
            raise UsageError(f"the weights lack {name}", where=where or None, fix="use a complete model file")
        return shapes[name]

    root = "joint_blocks" if original else "transformer_blocks"
    width, in_channels, patch, _ = shape("x_embedder.proj")
    blocks = _count(shapes, root, where)
    rows = shape("pos_embed", "")[1]
    side = math.isqrt(rows)
    if side * side != rows or width % HEAD_DIM:
        raise UsageError(f"a position table of {rows} rows and a width of {width} do not fit", where=where or None,
                         why=f"tables are square and heads have a width of {HEAD_DIM}",
                         fix="use a complete, unchanged model file")  # fmt: skip
    second = re.compile(rf"{root}\.(\d+)\.(x_block\.)?attn2\.(qkv|to_q)\.weight")
    norm = "joint_blocks.0.context_block.attn.ln_k.weight" if original else names.NORM_PROBE
    return DenoiserSizes(
        width=width,
        heads=width // HEAD_DIM,
        blocks=blocks,
        patch=patch,
        in_channels=in_channels,
        out_channels=shape("final_layer.linear")[0] // patch**2,
        side=side,
        text_width=shape("context_embedder")[1],
        pooled_width=shape("y_embedder.mlp.0")[1],
        qk_norm=norm in shapes,
        dual=tuple(sorted(int(match[1]) for name in shapes if (match := second.fullmatch(name)))),
    )


def _count(shapes: Iterable[str], root: str, where: str) -> int:
    pattern = re.compile(rf"{root}\.(\d+)\.")
    numbers = {int(match[1]) for name in shapes if (match := pattern.match(name))}
    missing = sorted(set(range(max(numbers) + 1)) - numbers)
    if missing:
        raise UsageError(f"the weights lack {root}.{missing[0]}", where=where or None,
                         why=f"they hold {len(numbers)} blocks numbered up to {max(numbers)}",
                         fix="use a complete model file")  # fmt: skip
    return len(numbers)


def flavour_of(sizes: DenoiserSizes) -> str:
    """``medium`` (SD3), ``3.5-medium`` (second attention) or ``3.5-large`` (query and key norm alone)."""
    if not sizes.qk_norm and not sizes.dual:
        return "medium"
    return "3.5-medium" if sizes.dual else "3.5-large"


KINDS = (
    (r"(.*\.)?(lora_(unet|te\d*)_.*|.*\.lora_[AB]\..*|.*\.lora_(up|down)\..*)", "an adapter (LoRA), not a base model"),
    (r"(.*\.)?(double_blocks|single_transformer_blocks)\..*", "a model of the FLUX kind"),
    (r"(.*\.)?(input_blocks|down_blocks\.\d+\.attentions)\..*", "a Stable Diffusion 1.x, 2.x or XL model"),
    (r"text_encoders\..*|(.*\.)?(shared|embed_tokens)\.weight|(.*\.)?text_model\..*", "text encoders only"),
    (r"(.*\.)?(encoder|decoder)\.(conv_in|mid|mid_block|down|up).*", "an autoencoder"),
)
"""Key patterns of other files that users have at hand, for the error message only."""


def _seen(header: Iterable[str]) -> str:
    keys = list(header)
    for pattern, words in KINDS:
        if any(re.fullmatch(pattern, key) for key in keys):
            return f"it looks like {words}"
    return f"it has no {PROBES[0]}"
