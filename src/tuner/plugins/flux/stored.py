"""Which tensors of the model's files hold which parameters, for writing whole models. No torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from tuner.core.compute.encoder_sizes import autoencoder_tensors, encoder_tensors, under_prefix
from tuner.core.files import WeightHeader, weight_header
from tuner.core.types import StoredFile, StoredTensor, WeightMaps

from .names import original_names, to_diffusers
from .sizes import LATENT_CHANNELS, bare_names, layout_of
from .sources import EMBEDDED, FOLDERS, resolve

if TYPE_CHECKING:
    from tuner.core.config import RunConfig

OWN = "denoiser:"


def stored(config: RunConfig) -> tuple[StoredFile, ...]:
    """The transformer's file in either layout, with all else that is in it."""
    header = weight_header(resolve(config).weights["denoiser"])
    return (StoredFile(name="", header=header, tensors=_denoiser(header)),)


def stored_tensors(header: WeightHeader, component: str | None) -> Mapping[str, StoredTensor]:
    """As `WeightMaps.stored`."""
    if component is None:
        found = _denoiser(header)
        for name in EMBEDDED if found else ():
            found |= _other(name, under_prefix(header, *EMBEDDED[name]), header)
        return found
    if component == "denoiser":
        return _denoiser(header)
    return _other(component, under_prefix(header, *EMBEDDED[component]) or {key: key for key in header}, header)


def _other(component: str, keys: Mapping[str, str], header: WeightHeader) -> dict[str, StoredTensor]:
    if component == "vae":
        return autoencoder_tensors(keys, header, LATENT_CHANNELS)
    return encoder_tensors(component, keys, "t5" if component == "t5" else "clip")


def _denoiser(header: WeightHeader) -> dict[str, StoredTensor]:
    bare = bare_names(header)
    layout = layout_of(bare)
    if layout is None:
        return {}
    tensors = {}
    for name, key in bare.items():
        found = _original(name) if layout == "original" else StoredTensor(names=(OWN + name,))
        if found is not None:
            tensors[key] = found
    return tensors


def _original(name: str) -> StoredTensor | None:
    place = to_diffusers(name)
    if place is None:
        return None
    return StoredTensor(names=tuple(OWN + each for each in place.names), exchange=place.exchange, rows=place.rows)


def original(names: Collection[str]) -> dict[str, StoredTensor]:
    """The transformer's tensors in the layout of Black Forest Labs."""
    found = {}
    for name in original_names(*(_depth(names, root) for root in _LISTS)):
        tensor = _original(name)
        if tensor is not None and all(each in names for each in tensor.names):
            found[name] = tensor
    return found


def diffusers(names: Collection[str]) -> dict[str, StoredTensor]:
    """The same in diffusers' layout."""
    return {name.removeprefix(OWN): StoredTensor(names=(name,)) for name in names if name.startswith(OWN)}


_LISTS = ("transformer_blocks", "single_transformer_blocks", "distilled_guidance_layer.layers")


def _depth(names: Collection[str], root: str) -> int:
    start = f"{OWN}{root}."
    return len({name.removeprefix(start).partition(".")[0] for name in names if name.startswith(start)})


WEIGHTS = WeightMaps(
    stored=stored_tensors,
    original=original,
    diffusers=diffusers,
    folders={name: folders for name, folders in FOLDERS.items() if "tokenizer" not in name},
    prefixes={
        "denoiser": "model.diffusion_model.",
        "vae": "vae.",
        **{name: EMBEDDED[name][0] for name in ("clip_l", "t5")},
    },
)
"""Chroma's T5 lies in the folder that holds CLIP for the others."""
