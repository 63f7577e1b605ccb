"""From the paths and hub ids of a configuration to files on this machine. No torch.

A source is a local file, a local folder, or a hub id ``owner/name`` that may go on with a path inside the repository
(``owner/name/folder/file.safetensors``). One folder in the diffusers layout serves all components.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.core.errors import UsageError
from tuner.core.files import WeightHeader, find_weights, weight_header
from tuner.core.places import Place, TokenizerPlaces, with_shards

from .sizes import check_family, original_names

if TYPE_CHECKING:
    from tuner.core.config import ComponentSource, RunConfig

    from .config import AnimaConfig

FOLDERS = {
    "denoiser": ("transformer",),
    "llm_adapter": ("text_conditioner", "llm_adapter"),
    "qwen3": ("text_encoder",),
    "vae": ("vae",),
    "qwen3_tokenizer": ("tokenizer",),
    "t5_tokenizer": ("t5_tokenizer",),
}
"""Names of the components' folders in the diffusers layout."""
TOKENIZERS = {
    each.name: each
    for each in (
        TokenizerPlaces(name="qwen3", hub="Qwen/Qwen3-0.6B", pieces=("vocab.json", "merges.txt")),
        TokenizerPlaces(name="t5", hub="google-t5/t5-base", pieces=("spiece.model",)),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Local places of weight files or shard indexes, and of tokenizers. ``llm_adapter`` None: inside the denoiser's."""

    denoiser: Path
    llm_adapter: Path | None
    qwen3: Path
    vae: Path
    tokenizers: Mapping[str, Path]

    def header(self, component: str) -> WeightHeader:
        """The weight header of a component under the names of its file."""
        path: Path = getattr(self, component)
        return weight_header(path)


def resolve(config: RunConfig) -> Sources:
    """Find every file of a run, fetching from the hub what is not here. UsageError for the first that is absent."""
    model: AnimaConfig = config.model  # type: ignore[assignment]
    root = Place.of(model.path, where="model.path", revision=model.revision, download_dir=model.download_dir)
    denoiser = root.weights(*FOLDERS["denoiser"], subfolder=model.subfolder, variant=model.variant)
    qwen3 = _component(model.text_encoders.get("qwen3"), root, "qwen3", model, "model.text_encoders.qwen3.path")
    tokenizers = {name: _tokenizer(name, model, root, qwen3) for name in ("qwen3", "t5")}
    return Sources(
        denoiser=denoiser,
        llm_adapter=_adapter(model, root),
        qwen3=qwen3,
        vae=_component(model.vae, root, "vae", model, "model.vae.path"),
        tokenizers=tokenizers,
    )


def files(config: RunConfig) -> dict[str, tuple[Path, ...]]:
    """The files whose bytes make each component; the first one of a component carries its header.

    The tokenizers' files belong to the components whose input they make. A denoiser file of another family is refused
    here, where it can still be said what it seems to be.
    """
    sources = resolve(config)
    check_family(original_names(sources.header("denoiser")), str(sources.denoiser))
    adapter = sources.llm_adapter or sources.denoiser
    return {
        "denoiser": with_shards(sources.denoiser),
        "llm_adapter": (*with_shards(adapter), *_tokenizer_files(sources, "t5")),
        "qwen3": (*with_shards(sources.qwen3), *_settings_file(sources.qwen3), *_tokenizer_files(sources, "qwen3")),
        "vae": with_shards(sources.vae),
    }


def count_tokens(config: RunConfig) -> dict[str, Callable[[Sequence[str]], list[int]]]:
    """By tokenizer, a function from captions to their numbers of tokens before any cutting."""
    from .text import load_tokenizer

    return {name: load_tokenizer(name, path).lengths for name, path in resolve(config).tokenizers.items()}


def settings_path(weights: Path) -> Path:
    """Where a ``config.json`` would lie beside weights."""
    return weights.parent / "config.json"


def _settings_file(weights: Path) -> tuple[Path, ...]:
    path = settings_path(weights)
    return (path,) if path.is_file() else ()


def _tokenizer_files(sources: Sources, name: str) -> tuple[Path, ...]:
    return TOKENIZERS[name].files(sources.tokenizers[name])


# --- components -------------------------------------------------------------------------------------------------------


def _component(source: ComponentSource | None, root: Place, name: str, model: AnimaConfig, where: str) -> Path:
    if source is not None:
        place = Place.of(source.path, where=where, revision=source.revision, download_dir=model.download_dir)
        return place.weights(*FOLDERS[name], subfolder=source.subfolder)
    if (folder := root.folder(*FOLDERS[name])) is not None:
        return find_weights(folder)
    raise UsageError(f"the {name} weights are not named", where=where,
                     why=f"{model.path} is not a folder in the diffusers layout that brings them",
                     fix=f"set {where} to a file, a folder or a hub id")  # fmt: skip


def _adapter(model: AnimaConfig, root: Place) -> Path | None:
    if model.llm_adapter is not None:
        source, where = model.llm_adapter, "model.llm_adapter.path"
        place = Place.of(source.path, where=where, revision=source.revision, download_dir=model.download_dir)
        return place.weights(*FOLDERS["llm_adapter"], subfolder=source.subfolder)
    folder = root.folder(*FOLDERS["llm_adapter"])
    return None if folder is None else find_weights(folder)


def _tokenizer(name: str, model: AnimaConfig, root: Place, qwen3: Path) -> Path:
    folders = {"qwen3": (qwen3.parent, qwen3.parent.parent / "tokenizer"),
               "t5": (qwen3.parent / "t5_tokenizer", qwen3.parent.parent / "t5_tokenizer")}  # fmt: skip
    inside = root.folder(*FOLDERS[f"{name}_tokenizer"])
    near = (*([inside] if inside else []), *folders[name])
    return TOKENIZERS[name].find(model.tokenizers.get(name), near, download_dir=model.download_dir)  # type: ignore[call-overload]
