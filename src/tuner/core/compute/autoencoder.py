"""The KL autoencoder of latent diffusion models from one file or folder, at any size, without the network.

The module is diffusers' ``AutoencoderKL``, configured from the weights. Files spell its layers as the original
implementation did (``encoder.down.0.block.0...``) or as diffusers does; both are read, with or without a prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tuner.core.compute.encoder_sizes import refuse_scaled, under_prefix
from tuner.core.compute.weights import assign, read_tensors
from tuner.core.errors import UsageError
from tuner.core.files import WeightHeader

if TYPE_CHECKING:
    from tuner.core.rng import Rng

PREFIXES = ("first_stage_model.", "vae.")
GROUPS = 32

# Original names to diffusers'. Levels of the decoder are numbered from the finest up there, from the coarsest here.
RENAMES = (
    (r"(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"(encoder|decoder)\.mid\.block_1\.", r"\1.mid_block.resnets.0."),
    (r"(encoder|decoder)\.mid\.block_2\.", r"\1.mid_block.resnets.1."),
    (r"(encoder|decoder)\.mid\.attn_1\.norm\.", r"\1.mid_block.attentions.0.group_norm."),
    (r"(encoder|decoder)\.mid\.attn_1\.proj_out\.", r"\1.mid_block.attentions.0.to_out.0."),
    (r"(encoder|decoder)\.mid\.attn_1\.([qkv])\.", r"\1.mid_block.attentions.0.to_\2."),
    (r"encoder\.down\.(\d+)\.block\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"encoder\.down\.(\d+)\.downsample\.conv\.", r"encoder.down_blocks.\1.downsamplers.0.conv."),
    (r"(.*)\.nin_shortcut\.", r"\1.conv_shortcut."),
)


def autoencoder_names(names: Iterable[str]) -> dict[str, str]:
    """diffusers' names to the names of a file, whichever of the two spellings it has."""
    listed = list(names)
    bare = under_prefix(listed, *PREFIXES) or {name: name for name in listed}
    levels = [int(match[1]) for name in bare if (match := re.match(r"decoder\.up\.(\d+)\.", name))]
    top = max(levels, default=0)
    return {_renamed(name, top): old for name, old in bare.items()}


def load_autoencoder(
    header: WeightHeader, *, dtype: torch.dtype, device: str = "cpu", mmap: bool = True, where: str = ""
) -> nn.Module:
    """diffusers' ``AutoencoderKL``, frozen, in eval mode. Raises UsageError for missing or unknown tensors."""
    from diffusers import AutoencoderKL

    found = header.renamed(autoencoder_names(header))
    refuse_scaled(found, where)
    config = autoencoder_config({name: found.shape(name) for name in found}, where)
    with torch.device("meta"):
        model: nn.Module = AutoencoderKL(**config)
    expected = {name: tuple(value.shape) for name, value in model.named_parameters()}
    # Attention was written as 1x1 convolutions once; its matrices are the same numbers.
    tensors = (
        (name, value.reshape(expected[name]) if name in expected and value.ndim > len(expected[name]) else value)
        for name, value in read_tensors(found, mmap=mmap)
    )
    assign(model, tensors, dtype=dtype, device=device, where=where or None)
    return model.eval().requires_grad_(False)


def autoencoder_config(shapes: Mapping[str, tuple[int, ...]], where: str = "") -> dict[str, Any]:
    """Arguments of ``AutoencoderKL`` from shapes by diffusers' names."""
    probe = "encoder.conv_in.weight"
    if probe not in shapes or "decoder.conv_in.weight" not in shapes:
        raise UsageError("this is not a KL autoencoder", where=where or None, why=f"it has no {probe}",
                         fix="name the file or folder of the autoencoder")  # fmt: skip
    levels = 1 + max(int(match[1]) for name in shapes if (match := re.match(r"encoder\.down_blocks\.(\d+)\.", name)))
    widths = tuple(shapes[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(levels))
    resnets = {name.split(".")[4] for name in shapes if name.startswith("encoder.down_blocks.0.resnets.")}
    return {
        "in_channels": shapes[probe][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": widths,
        "layers_per_block": len(resnets),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "norm_num_groups": min(GROUPS, *widths),
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def encode_image(vae: nn.Module, pixels: Tensor, rng: Rng | None, *, scale: float, shift: float) -> Tensor:
    """(z - shift) * scale for pixels [B,3,H,W] in -1..1, [B,C,H/8,W/8] float32.

    rng: draws a posterior sample; None takes its mode.
    """
    weight = next(vae.parameters())
    posterior = vae.encode(pixels.to(weight.device, weight.dtype)).latent_dist  # type: ignore[operator]
    latents: Tensor = posterior.mean.float()
    if rng is not None:
        noise = rng.normal(tuple(latents.shape)).to(latents.device)
        latents = latents + posterior.std.float() * noise
    return (latents - shift) * scale


def decode_image(vae: nn.Module, latents: Tensor, *, scale: float, shift: float) -> Tensor:
    """Pixels [B,3,H,W] float32 in -1..1 of latents [B,C,h,w]: the inverse of `encode_image`."""
    weight = next(vae.parameters())
    values = latents.to(weight.device, torch.float32) / scale + shift
    pixels: Tensor = vae.decode(values.to(weight.dtype)).sample  # type: ignore[operator]
    return pixels.float().clamp(-1.0, 1.0)


def _renamed(name: str, top: int) -> str:
    if match := re.match(r"decoder\.up\.(\d+)\.(block\.(\d+)|upsample\.conv)\.(.*)", name):
        level = top - int(match[1])
        inner = f"resnets.{match[3]}" if match[3] is not None else "upsamplers.0.conv"
        name = f"decoder.up_blocks.{level}.{inner}.{match[4]}"
    for pattern, replacement in RENAMES:
        name = re.sub(f"^{pattern}", replacement, name)
    return name
