"""Which tensors of the model's files hold which parameters, for writing whole models. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuner.core.compute.encoder_sizes import clip_names, t5_names, under_prefix
from tuner.core.files import WeightHeader, weight_header
from tuner.core.types import StoredFile, StoredTensor

from .names import exchanged, parameter_parts
from .sizes import denoiser_sizes, diffusers_names, original_names
from .sources import Part, resolve

if TYPE_CHECKING:
    from tuner.core.config import RunConfig

EMBEDDING, SECOND_EMBEDDING = "shared.weight", "encoder.embed_tokens.weight"


def stored(config: RunConfig) -> tuple[StoredFile, ...]:
    """The denoiser's file, with the encoders that are in it, and one for each encoder that is not."""
    sources = resolve(config)
    header = weight_header(sources.denoiser.path)
    tensors = _denoiser(header, str(sources.denoiser.path))
    files = []
    for name, part in sources.encoders.items():
        whole = weight_header(part.path)
        own = _encoder(name, part, whole)
        if part.path == sources.denoiser.path:
            tensors |= own
        else:
            files.append(StoredFile(name=name, header=whole, tensors=own))
    return (StoredFile(name="", header=header, tensors=tensors), *files)


def _denoiser(header: WeightHeader, where: str) -> dict[str, StoredTensor]:
    originals = original_names(header)
    if not originals:
        return {key: StoredTensor(names=(f"denoiser:{name}",)) for name, key in diffusers_names(header).items()}
    blocks = denoiser_sizes(header, where).blocks
    found = {}
    for name, key in originals.items():
        parts = parameter_parts(name) or (name,)
        found[key] = StoredTensor(
            names=tuple(f"denoiser:{part}" for part in parts),
            exchange=exchanged(parts[0].rpartition(".")[0], blocks),
        )
    return found


def _encoder(name: str, part: Part, header: WeightHeader) -> dict[str, StoredTensor]:
    keys = under_prefix(header, *part.prefixes) if part.prefixes else {key: key for key in header}
    names = t5_names(keys) if name == "t5" else clip_names(keys)
    found = {keys[bare]: StoredTensor(names=(f"{name}:{own}",)) for own, bare in names.items()}
    if name == "t5" and SECOND_EMBEDDING in keys:
        # Some files hold the embedding twice; both must say the same.
        found[keys[SECOND_EMBEDDING]] = StoredTensor(names=(f"{name}:{EMBEDDING}",))
    return found
