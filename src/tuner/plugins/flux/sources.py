"""From the paths and hub ids of a configuration to files on this machine. No torch.

Three layouts serve: single files per part, one all-in-one file, and a folder as diffusers saves it. Nothing is fetched
unless the configuration names a hub id.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.core.compute.encoder_sizes import under_prefix
from tuner.core.errors import UsageError
from tuner.core.files import WeightHeader, weight_header
from tuner.core.places import Place, TokenizerPlaces, with_shards

from .sizes import diffusers_shapes

if TYPE_CHECKING:
    from tuner.core.config import ComponentSource, RunConfig

    from .config import FluxConfig

CHROMA_PROBE = "distilled_guidance_layer.in_proj.weight"
FOLDERS = {
    "denoiser": ("transformer",),
    "clip_l": ("text_encoder",),
    "t5": ("text_encoder_2", "text_encoder"),
    "vae": ("vae",),
    "clip_l tokenizer": ("tokenizer",),
    "t5 tokenizer": ("tokenizer_2", "tokenizer"),
}
"""Names of the parts' folders in the diffusers layout; Chroma, with one text encoder, uses the last of two."""
HUB_FILES = ("transformer/*", "vae/*", "text_encoder*/*", "tokenizer*/*")
"""What a repository in that layout is fetched for; the same weights lie in it once more as single files."""
EMBEDDED = {
    "clip_l": ("text_encoders.clip_l.transformer.", "text_encoders.clip_l."),
    "t5": ("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl."),
    "vae": ("vae.", "first_stage_model."),
}
"""Prefixes of the parts of an all-in-one file."""
TOKENIZERS = {
    each.name: each
    for each in (
        TokenizerPlaces(name="clip_l", hub="openai/clip-vit-large-patch14", pieces=("vocab.json", "merges.txt")),
        TokenizerPlaces(name="t5", hub="google/t5-v1_1-xxl", pieces=("spiece.model",)),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Local weight files or shard indexes by component, and places of tokenizers. Chroma has no ``clip_l``."""

    weights: Mapping[str, Path]
    tokenizers: Mapping[str, Path]

    def header(self, component: str) -> WeightHeader:
        """The header of a component's weights; what else an all-in-one file holds is left out."""
        header = weight_header(self.weights[component])
        found = under_prefix(header, *EMBEDDED.get(component, ()))
        return header.renamed(found) if found else header


def resolve(config: RunConfig) -> Sources:
    """Find every file of a run. UsageError for the first that is absent, naming the key that would bring it."""
    model: FluxConfig = config.model  # type: ignore[assignment]
    patterns = (*HUB_FILES, f"{model.subfolder}/*") if model.subfolder else HUB_FILES
    root = Place.of(model.path, where="model.path", revision=model.revision, download_dir=model.download_dir,
                    patterns=patterns)  # fmt: skip
    denoiser = root.weights(*FOLDERS["denoiser"], subfolder=model.subfolder, variant=model.variant)
    header = weight_header(denoiser)
    chroma = CHROMA_PROBE in diffusers_shapes(header, str(denoiser))
    encoders = ("t5",) if chroma else ("clip_l", "t5")
    for key, given in (("text_encoders", model.text_encoders), ("tokenizers", model.tokenizers)):
        if chroma and "clip_l" in given:
            raise UsageError("Chroma does not use CLIP", where=f"model.{key}.clip_l", fix="take it out")
    weights = {"denoiser": denoiser}
    for name in encoders:
        weights[name] = _weights(model.text_encoders.get(name), root, header, name, model, chroma)  # type: ignore[call-overload]
    weights["vae"] = _weights(model.vae, root, header, "vae", model, chroma)
    tokenizers = {name: _tokenizer(name, model, root, weights[name], chroma) for name in encoders}
    return Sources(weights=weights, tokenizers=tokenizers)


def files(config: RunConfig) -> dict[str, tuple[Path, ...]]:
    """The files whose bytes make each component; the first one of a component carries its header.

    The tokenizers' files belong to the components whose input they make.
    """
    sources = resolve(config)
    found = {}
    for name, path in sources.weights.items():
        extra: tuple[Path, ...] = ()
        if (settings := path.parent / "config.json").is_file():
            extra = (settings,)
        if name in sources.tokenizers:
            extra += TOKENIZERS[name].files(sources.tokenizers[name])
        found[name] = (*with_shards(path), *extra)
    return found


def count_tokens(config: RunConfig) -> dict[str, Callable[[Sequence[str]], list[int]]]:
    """By tokenizer, a function from captions to their numbers of tokens before any cutting."""
    from .text import load_tokenizers

    return {name: tokenizer.lengths for name, tokenizer in load_tokenizers(resolve(config)).items()}


def _folders(name: str, chroma: bool) -> tuple[str, ...]:
    names = FOLDERS[name]
    return names[-1:] if chroma else names[:1]


def _weights(
    source: ComponentSource | None, root: Place, header: WeightHeader, name: str, model: FluxConfig, chroma: bool
) -> Path:
    where = "model.vae.path" if name == "vae" else f"model.text_encoders.{name}.path"
    folders = _folders(name, chroma)
    if source is not None:
        place = Place.of(source.path, where=where, revision=source.revision, download_dir=model.download_dir)
        return place.weights(*folders, subfolder=source.subfolder)
    if (folder := root.folder(*folders)) is not None:
        variant = model.variant if any(folder.glob(f"*.{model.variant}.*")) else None
        return Place(local=folder, where=where).weights(variant=variant)
    if under_prefix(header, *EMBEDDED[name]):
        return header.path
    raise UsageError(f"the {name} weights are not named", where=where,
                     why=f"{model.path} is neither a folder in the diffusers layout nor a file that brings them",
                     fix=f"set {where} to a file or folder")  # fmt: skip


def _tokenizer(name: str, model: FluxConfig, root: Place, weights: Path, chroma: bool) -> Path:
    folders = _folders(f"{name} tokenizer", chroma)
    inside = root.folder(*folders)
    beside = (weights.parent, *(weights.parent.parent / folder for folder in folders))
    near = (*([inside] if inside else []), *beside)
    return TOKENIZERS[name].find(model.tokenizers.get(name), near, download_dir=model.download_dir)  # type: ignore[call-overload]
