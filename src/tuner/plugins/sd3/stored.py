"""Which tensors of the model's files hold which parameters, for writing whole models. No torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from tuner.core.compute.encoder_sizes import autoencoder_tensors, encoder_tensors, under_prefix
from tuner.core.files import WeightHeader, weight_header
from tuner.core.types import StoredFile, StoredTensor, WeightMaps

from .names import exchanged, original_parameters, parameter_parts
from .sizes import PREFIX, denoiser_sizes, diffusers_names, looks_like_family, original_names
from .sources import FOLDERS, PREFIXES, resolve

if TYPE_CHECKING:
    from tuner.core.config import RunConfig

OWN = "denoiser:"
LATENT_CHANNELS = 16


def stored(config: RunConfig) -> tuple[StoredFile, ...]:
    """The denoiser's file, with the encoders that are in it, and one for each encoder that is not."""
    sources = resolve(config)
    header = weight_header(sources.denoiser.path)
    tensors = _denoiser(header)
    files = []
    for name, part in sources.encoders.items():
        whole = weight_header(part.path)
        keys = under_prefix(whole, *part.prefixes) if part.prefixes else {key: key for key in whole}
        own = _other(name, keys, whole)
        if part.path == sources.denoiser.path:
            tensors |= own
        else:
            files.append(StoredFile(name=name, header=whole, tensors=own))
    return (StoredFile(name="", header=header, tensors=tensors), *files)


def stored_tensors(header: WeightHeader, component: str | None) -> Mapping[str, StoredTensor]:
    """As `WeightMaps.stored`."""
    if component is None or component == "denoiser":
        found = _denoiser(header) if looks_like_family(header) else {}
        if component is None and found:
            for name, prefixes in PREFIXES.items():
                found |= _other(name, under_prefix(header, *prefixes), header)
        return found
    return _other(component, under_prefix(header, *PREFIXES[component]) or {key: key for key in header}, header)


def _denoiser(header: WeightHeader) -> dict[str, StoredTensor]:
    originals = original_names(header)
    if not originals:
        return {key: StoredTensor(names=(OWN + name,)) for name, key in diffusers_names(header).items()}
    blocks = denoiser_sizes(header, str(header.path)).blocks
    return {key: _original(name, blocks) for name, key in originals.items()}


def _original(name: str, blocks: int) -> StoredTensor:
    parts = parameter_parts(name) or (name,)
    return StoredTensor(
        names=tuple(OWN + part for part in parts), exchange=exchanged(parts[0].rpartition(".")[0], blocks)
    )


def _other(component: str, keys: Mapping[str, str], header: WeightHeader) -> dict[str, StoredTensor]:
    if component == "vae":
        return autoencoder_tensors(keys, header, LATENT_CHANNELS)
    return encoder_tensors(component, keys, "t5" if component == "t5" else "clip")


def original(names: Collection[str]) -> dict[str, StoredTensor]:
    """The denoiser's tensors in the layout of the published single files."""
    start = f"{OWN}transformer_blocks."
    blocks = len({name.removeprefix(start).partition(".")[0] for name in names if name.startswith(start)})
    wanted = {name: _original(name, blocks) for name in original_parameters(blocks)}
    return {name: tensor for name, tensor in wanted.items() if all(each in names for each in tensor.names)}


def diffusers(names: Collection[str]) -> dict[str, StoredTensor]:
    """The same in diffusers' layout."""
    return {name.removeprefix(OWN): StoredTensor(names=(name,)) for name in names if name.startswith(OWN)}


WEIGHTS = WeightMaps(
    stored=stored_tensors,
    original=original,
    diffusers=diffusers,
    folders={name: (folder,) for name, folder in FOLDERS.items()},
    prefixes={"denoiser": PREFIX, **{name: prefixes[0] for name, prefixes in PREFIXES.items()}},
)
