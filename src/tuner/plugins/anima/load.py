"""Modules from weight files: built without memory, then filled tensor by tensor in their final dtype and place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tuner.core.compute.dtypes import dtype_by_name
from tuner.core.compute.weights import assign, read_tensors
from tuner.core.errors import UsageError
from tuner.core.files import WeightHeader

from . import latents
from .denoiser import Denoiser
from .sizes import (
    ADAPTER_PREFIX,
    PICKLE_SUFFIXES,
    adapter_names,
    adapter_sizes,
    denoiser_sizes,
    encoder_names,
    encoder_sizes,
    original_names,
)
from .sources import Sources, settings_path
from .text import LLMAdapter, build_encoder

if TYPE_CHECKING:
    from tuner.core.types import Placement


def load_denoiser(sources: Sources, placement: Placement, *, mmap: bool = True) -> Denoiser:
    """The diffusion transformer, frozen; the adapter's keys in its file are left to `load_adapter`."""
    header = _renamed(sources.header("denoiser"))
    own = header.renamed({name: name for name in header if not name.startswith(ADAPTER_PREFIX)})
    where = str(sources.denoiser)
    with torch.device("meta"):
        denoiser = Denoiser(denoiser_sizes(own, where))
    _fill(denoiser, own, "denoiser", placement, where, mmap)
    denoiser.fuse()
    return denoiser.eval()


def load_adapter(sources: Sources, placement: Placement, *, mmap: bool = True) -> LLMAdapter:
    """The LLM adapter, from its own file when there is one, else from inside the denoiser's."""
    if sources.llm_adapter is not None:
        header, where = sources.header("llm_adapter"), str(sources.llm_adapter)
        header = header.renamed(adapter_names(header))
    else:
        inside, where = _renamed(sources.header("denoiser")), str(sources.denoiser)
        header = inside.renamed(
            {name.removeprefix(ADAPTER_PREFIX): name for name in inside if name.startswith(ADAPTER_PREFIX)}
        )
    with torch.device("meta"):
        adapter = LLMAdapter(adapter_sizes(header, where))
    _fill(adapter, header, "llm_adapter", placement, where, mmap)
    return adapter.eval()


def load_encoder(sources: Sources, placement: Placement, *, mmap: bool = True) -> nn.Module:
    """The Qwen3 encoder."""
    header, where = sources.header("qwen3"), str(sources.qwen3)
    header = header.renamed(encoder_names(header))
    return build_encoder(
        read_tensors(header, mmap=mmap),
        encoder_sizes(header, where),
        _settings(settings_path(sources.qwen3)),
        dtype=dtype_by_name(placement.dtype("qwen3")),
        device=placement.device,
        where=where,
    )


def load_vae(sources: Sources, placement: Placement, *, band_rows: int | None = None, mmap: bool = True) -> latents.VAE:
    """The image autoencoder, folded to 2-D; ``band_rows`` as in `latents.VAE.set_band_rows`."""
    path = sources.vae
    tensors: Iterator[tuple[str, Tensor]]
    if path.suffix in PICKLE_SUFFIXES:
        values = _read_pickle(path)
        found = latents.names(values)
        shapes = {name: tuple(values[key].shape) for name, key in found.items()}
        tensors = ((name, values[key]) for name, key in found.items())
    else:
        header = sources.header("vae")
        header = header.renamed(latents.names(header))
        shapes = {name: header.shape(name) for name in header}
        tensors = read_tensors(header, mmap=mmap)
    dtype = dtype_by_name(placement.dtype("vae"))
    vae = latents.build(tensors, shapes, dtype=dtype, device=placement.device, where=str(path))
    vae.set_band_rows(band_rows)
    return vae


def _renamed(header: WeightHeader) -> WeightHeader:
    return header.renamed(original_names(header))


def _fill(module: nn.Module, header: WeightHeader, name: str, placement: Placement, where: str, mmap: bool) -> None:
    dtype = dtype_by_name(placement.dtype(name))
    assign(module, read_tensors(header, mmap=mmap), dtype=dtype, device=placement.device, where=where)


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError("this is not JSON", where=str(path), why=str(error)) from error
    return settings if isinstance(settings, dict) else {}


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a .pth file through torch's restricted loader, which builds tensors and runs no code."""
    from pickle import UnpicklingError

    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise UsageError("cannot read this file as plain weights", where=str(path), why=str(error).splitlines()[0],
                         fix="use the .safetensors file instead") from error  # fmt: skip
    values = values.get("state_dict", values) if isinstance(values, dict) else values
    if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
        raise UsageError("this file does not hold a dictionary of tensors", where=str(path),
                         fix="use the .safetensors file instead")  # fmt: skip
    return values
