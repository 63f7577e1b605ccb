"""From the paths and hub ids of a configuration to weight files and tokenizers on this machine. No torch.

``model.path`` is an all-in-one file, a file of the transformer alone, or a folder in the diffusers layout. What is
named beside it (``model.text_encoders``, ``model.vae``) wins over what it brings.
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

from .sizes import denoiser_sizes

if TYPE_CHECKING:
    from tuner.core.config import ComponentSource, RunConfig

    from .config import SD3Config

FOLDERS = {
    "denoiser": "transformer",
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "t5": "text_encoder_3",
    "vae": "vae",
}
"""Names of the components' folders in the diffusers layout."""
HUB_FILES = ("transformer/*", "vae/*", "text_encoder*/*", "tokenizer*/*")
"""What a repository in that layout is fetched for; the same weights lie in it once more as single files."""
HUB_VARIANTS = ("*.fp16*", "text_encoders/*")
PREFIXES = {
    "clip_l": ("text_encoders.clip_l.transformer.", "text_encoders.clip_l."),
    "clip_g": ("text_encoders.clip_g.transformer.", "text_encoders.clip_g."),
    "t5": ("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl."),
    "vae": ("first_stage_model.", "vae."),
}
"""What stands before the keys of a component in an all-in-one file."""
TOKENIZER_FOLDERS = {"clip": ("tokenizer", "tokenizer_2"), "t5": ("tokenizer_3", "t5_tokenizer")}
TOKENIZERS = {
    each.name: each
    for each in (
        TokenizerPlaces(name="clip", hub="openai/clip-vit-large-patch14", pieces=("vocab.json", "merges.txt")),
        TokenizerPlaces(name="t5", hub="google-t5/t5-base", pieces=("spiece.model",)),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Where the weights of a component lie; ``prefixes`` when they are inside an all-in-one file."""

    path: Path
    prefixes: tuple[str, ...] = ()

    def header(self) -> WeightHeader:
        """The weight header of the component alone, under the names of its file without prefix."""
        header = weight_header(self.path)
        return header.renamed(under_prefix(header, *self.prefixes)) if self.prefixes else header


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Local places of everything. ``encoders`` has ``clip_l``, ``clip_g`` and, unless it is missing, ``t5``."""

    denoiser: Part
    encoders: Mapping[str, Part]
    vae: Part
    tokenizers: Mapping[str, Path]

    def part(self, name: str) -> Part:
        return self.encoders[name]


def resolve(config: RunConfig) -> Sources:
    """Find every file of a run, fetching from the hub what is not here. UsageError for the first that is absent."""
    model: SD3Config = config.model  # type: ignore[assignment]
    patterns = (*HUB_FILES, f"{model.subfolder}/*") if model.subfolder else HUB_FILES
    root = Place.of(model.path, where="model.path", revision=model.revision, download_dir=model.download_dir,
                    patterns=patterns, ignore=() if model.variant else HUB_VARIANTS)  # fmt: skip
    denoiser = root.weights(FOLDERS["denoiser"], subfolder=model.subfolder, variant=model.variant)
    inside = list(weight_header(denoiser))
    encoders: dict[str, Part] = {}
    for name in ("clip_l", "clip_g", "t5"):
        source = model.text_encoders.get(name)
        found = _component(name, source, root, denoiser, inside, model, f"model.text_encoders.{name}.path")
        if found is not None:
            encoders[name] = found
        elif name != "t5":
            raise _absent(name, f"model.text_encoders.{name}.path", model)
    vae = _component("vae", model.vae, root, denoiser, inside, model, "model.vae.path")
    if vae is None:
        raise _absent("vae", "model.vae.path", model)
    wanted = ["clip", *(["t5"] if "t5" in encoders else [])]
    return Sources(
        denoiser=Part(path=denoiser),
        encoders=encoders,
        vae=vae,
        tokenizers={name: _tokenizer(name, model, root, encoders) for name in wanted},
    )


def files(config: RunConfig) -> dict[str, tuple[Path, ...]]:
    """The files whose bytes make each component; the first one of a component carries its header.

    Tokenizer files belong to the components whose input they make. A denoiser file of another family is refused here,
    where it can still be said what it seems to be.
    """
    found = resolve(config)
    denoiser_sizes(found.denoiser.header(), str(found.denoiser.path))
    made: dict[str, tuple[Path, ...]] = {"denoiser": with_shards(found.denoiser.path)}
    for name, part in found.encoders.items():
        kind = "t5" if name == "t5" else "clip"
        tokenizer = TOKENIZERS[kind].files(found.tokenizers[kind])
        made[name] = (*with_shards(part.path), *_settings_file(part), *tokenizer)
    return {**made, "vae": with_shards(found.vae.path)}


def count_tokens(config: RunConfig) -> dict[str, Callable[[Sequence[str]], list[int]]]:
    """By tokenizer, a function from captions to their numbers of tokens before any cutting."""
    from .text import load_tokenizers

    found = load_tokenizers(resolve(config).tokenizers)
    return {name: found[loaded].lengths for name, loaded in (("clip", "clip_l"), ("t5", "t5")) if loaded in found}


# --- components -------------------------------------------------------------------------------------------------------


def _component(
    name: str,
    source: ComponentSource | None,
    root: Place,
    denoiser: Path,
    inside: Sequence[str],
    model: SD3Config,
    where: str,
) -> Part | None:
    if source is not None:
        place = Place.of(source.path, where=where, revision=source.revision, download_dir=model.download_dir)
        return _inside(place.weights(FOLDERS[name], subfolder=source.subfolder), name)
    if any(key.startswith(PREFIXES[name]) for key in inside):
        return Part(path=denoiser, prefixes=PREFIXES[name])
    folder = root.folder(FOLDERS[name])
    if folder is None:
        return None
    variant = model.variant if any(folder.glob(f"*.{model.variant}.*")) else None
    return Part(path=Place(local=folder, where=where).weights(variant=variant))


def _inside(path: Path, name: str) -> Part:
    """A named file may itself be an all-in-one file."""
    prefixed = any(key.startswith(PREFIXES[name]) for key in weight_header(path))
    return Part(path=path, prefixes=PREFIXES[name] if prefixed else ())


def _absent(name: str, where: str, model: SD3Config) -> UsageError:
    return UsageError(f"the {name} weights are not named", where=where,
                      why=f"{model.path} neither contains them nor is a folder in the diffusers layout",
                      fix=f"set {where} to a file, a folder or a hub id")  # fmt: skip


def _settings_file(part: Part) -> tuple[Path, ...]:
    path = part.path.parent / "config.json"
    return (path,) if not part.prefixes and path.is_file() else ()


# --- tokenizers -------------------------------------------------------------------------------------------------------


def _tokenizer(name: str, model: SD3Config, root: Place, encoders: Mapping[str, Part]) -> Path:
    weights = encoders["t5" if name == "t5" else "clip_l"].path.parent
    inside = root.folder(*TOKENIZER_FOLDERS[name])
    beside = [folder / inner for folder in (weights, weights.parent) for inner in TOKENIZER_FOLDERS[name]]
    near = (*([inside] if inside else []), weights, *beside)
    return TOKENIZERS[name].find(model.tokenizers.get(name), near, download_dir=model.download_dir)  # type: ignore[call-overload]
