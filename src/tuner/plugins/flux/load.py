"""The transformer from weight files: built without memory, filled tensor by tensor in its final dtype and place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tuner.core.compute.dtypes import dtype_by_name
from tuner.core.compute.encoders import read_settings
from tuner.core.compute.weights import assign, read_tensors
from tuner.core.errors import UsageError

from . import denoiser as network
from .names import to_diffusers
from .sizes import bare_names, denoiser_sizes, diffusers_shapes, layout_of

if TYPE_CHECKING:
    from tuner.core.files import WeightHeader
    from tuner.core.types import Placement


def load_denoiser(header: WeightHeader, placement: Placement, *, mmap: bool = True, where: str = "") -> nn.Module:
    """The frozen transformer from a file in either layout, at any size; 8-bit weights are widened.

    Raises UsageError naming every missing and unknown tensor.
    """
    sizes = denoiser_sizes(diffusers_shapes(header, where), where, read_settings(header.path))
    bare = header.renamed(bare_names(header))
    with torch.device("meta"):
        model = network.build(sizes)
    tensors: Iterable[tuple[str, Tensor]] = read_tensors(bare, mmap=mmap)
    if layout_of(bare) == "original":
        tensors = diffusers_tensors(tensors)
    assign(
        model,
        tensors,
        dtype=dtype_by_name(placement.dtype("denoiser")),
        device=placement.device,
        where=where or None,
        keep_float32=network.KEEP_FLOAT32,
    )
    network.restore_buffers(model, placement.device)
    network.fuse_projections(model)
    return model.eval().requires_grad_(False)


def diffusers_tensors(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Original names and values to diffusers': joint matrices cut by rows, the final modulation's halves exchanged."""
    for name, value in tensors:
        found = to_diffusers(name)
        if found is None:
            raise UsageError(f"unknown tensor {name}", fix="use a file without added keys")
        if found.exchange:
            value = torch.cat(value.chunk(2)[::-1])
        if len(found.names) == 1:
            yield found.names[0], value
            continue
        unit = value.shape[0] // sum(found.rows)
        yield from zip(found.names, torch.split(value, [unit * rows for rows in found.rows]), strict=True)
