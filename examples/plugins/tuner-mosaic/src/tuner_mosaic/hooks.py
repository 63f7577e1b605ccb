"""The model hooks for Mosaic."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tuner import ModelFacts, Models, NoiseTarget, Placement, TextEmbeds, hookimpl
from tuner.core.adapters.files import save_adapter
from tuner.core.adapters.formats import format_by_name
from tuner.core.compute.dtypes import dtype_by_name
from tuner.core.compute.weights import assign, read_tensors
from tuner.core.files import weight_header

from .facts import MAPS, sizes
from .modules import Bytes, Denoiser, Tiles


@hookimpl
def load_models(config: Any, components: Collection[str], placement: Placement) -> Models:
    """Modules are built without memory and filled tensor by tensor."""
    header = weight_header(Path(config.model.path))
    width, blocks = sizes(header)
    models = Models(vae=Tiles() if "vae" in components else None)
    for name in {"denoiser", "bytes"} & set(components):
        with torch.device("meta"):
            module: nn.Module = Denoiser(width, blocks) if name == "denoiser" else Bytes(width)
        own = header.renamed({key.removeprefix(f"{name}."): key for key in header if key.startswith(f"{name}.")})
        dtype = dtype_by_name(placement.dtype(name))
        tensors = read_tensors(own, mmap=config.model.mmap)
        assign(module, tensors, dtype=dtype, device=placement.device, where=config.model.path)
        if name == "denoiser":
            models.denoiser = module.eval()
        else:
            models.text_encoders[name] = module.eval()
    return models


@hookimpl
def encode_text(models: Models, facts: ModelFacts, captions: Sequence[str]) -> TextEmbeds:
    """Bytes to features; id 0 is padding, and its rows are exactly zero."""
    encoder = models.text_encoders["bytes"]
    lines = [[byte + 1 for byte in caption.encode()[: facts.max_tokens["bytes"]]] for caption in captions]
    length = max(1, *map(len, lines))
    ids = torch.tensor([line + [0] * (length - len(line)) for line in lines], device=encoder.embed.weight.device)
    return TextEmbeds(tensors={"text": encoder(ids) * (ids > 0)[..., None], "text_mask": ids > 0})


@hookimpl
def encode_latents(models: Models, pixels: Tensor) -> Tensor:
    return models.vae.encode(pixels)


@hookimpl
def decode_latents(models: Models, latents: Tensor) -> Tensor:
    return models.vae.decode(latents)


@hookimpl
def noise_target(latents: Tensor, noise: Tensor, sigmas: Tensor) -> NoiseTarget:
    """The core's objective, with timesteps from 0 to 1000."""
    mix = sigmas[:, None, None, None]
    return NoiseTarget(
        noisy=(1 - mix) * latents + mix * noise,
        target=noise - latents,
        sigmas=sigmas,
        timesteps=1000 * sigmas,
        weight=torch.ones_like(sigmas),
    )


@hookimpl
def predict(models: Models, config: Any, noisy: Tensor, timesteps: Tensor, text: TextEmbeds) -> Tensor:
    """The velocity that leads from the predicted clean picture to the noisy one."""
    clean = models.denoiser(noisy, timesteps, text.tensors["text"], text.tensors["text_mask"])
    return (noisy - clean) / (timesteps / 1000).clamp(min=config.model.lowest_sigma)[:, None, None, None]


@hookimpl
def save(config: Any, tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> list[Path]:
    fmt = format_by_name(MAPS, config.checkpoint.format)
    dtype = dtype_by_name(config.checkpoint.dtype or config.precision.adapter)
    own = {"modelspec.architecture": "mosaic/lora"} if config.checkpoint.metadata.embed else {}
    return [save_adapter(tensors, fmt, path, {**metadata, **own}, dtype)]
