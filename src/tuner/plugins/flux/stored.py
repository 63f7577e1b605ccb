"""Which tensors of the model's file hold which parameters, for writing whole models. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuner.core.files import weight_header
from tuner.core.types import StoredFile, StoredTensor

from .names import to_diffusers
from .sizes import bare_names, layout_of
from .sources import resolve

if TYPE_CHECKING:
    from tuner.core.config import RunConfig


def stored(config: RunConfig) -> tuple[StoredFile, ...]:
    """The transformer's file in either layout, with all else that is in it."""
    header = weight_header(resolve(config).weights["denoiser"])
    bare = bare_names(header)
    original = layout_of(bare) == "original"
    tensors = {}
    for name, key in bare.items():
        place = to_diffusers(name) if original else None
        if place is not None:
            names = tuple(f"denoiser:{each}" for each in place.names)
            tensors[key] = StoredTensor(names=names, exchange=place.exchange)
        elif not original:
            tensors[key] = StoredTensor(names=(f"denoiser:{name}",))
    return (StoredFile(name="", header=header, tensors=tensors),)
