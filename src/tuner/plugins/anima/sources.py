"""From the paths and hub ids of a configuration to files on this machine. No torch.

A source is a local file, a local folder, or a hub id ``owner/name`` that may go on with a path inside the repository
(``owner/name/folder/file.safetensors``). One folder in the diffusers layout serves all components.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.core.errors import UsageError
from tuner.core.files import INDEX_SUFFIX, WeightHeader, find_weights, weight_header

from .sizes import check_family, original_names

if TYPE_CHECKING:
    from tuner.core.config import ComponentSource, RunConfig

    from .config import AnimaConfig

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?P<inside>(/[\w. -]+)*)")
WEIGHT_SUFFIXES = (".safetensors", ".sft", ".pth", ".pt", ".ckpt", ".bin", ".gguf")
FOLDERS = {
    "denoiser": ("transformer",),
    "llm_adapter": ("text_conditioner", "llm_adapter"),
    "qwen3": ("text_encoder",),
    "vae": ("vae",),
    "qwen3_tokenizer": ("tokenizer",),
    "t5_tokenizer": ("t5_tokenizer",),
}
"""Names of the components' folders in the diffusers layout."""
TOKENIZER_FILES = {"qwen3": ("tokenizer.json", "vocab.json", "merges.txt"), "t5": ("tokenizer.json", "spiece.model")}
TOKENIZER_HUB = {"qwen3": "Qwen/Qwen3-0.6B", "t5": "google-t5/t5-base"}
"""Public repositories whose tokenizer files are the ones that the model was trained with."""


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
    root = _Place.of(model.path, model.revision, model, "model.path")
    denoiser = root.weights(FOLDERS["denoiser"], model.subfolder, model.variant)
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
        "denoiser": _with_shards(sources.denoiser),
        "llm_adapter": (*_with_shards(adapter), *_tokenizer_files(sources, "t5")),
        "qwen3": (*_with_shards(sources.qwen3), *_settings_file(sources.qwen3), *_tokenizer_files(sources, "qwen3")),
        "vae": _with_shards(sources.vae),
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


def _with_shards(path: Path) -> tuple[Path, ...]:
    return (path, *weight_header(path).files) if path.name.endswith(INDEX_SUFFIX) else (path,)


def _tokenizer_files(sources: Sources, name: str) -> tuple[Path, ...]:
    path = sources.tokenizers[name]
    if path.is_file():
        return (path,)
    return tuple(file for name in TOKENIZER_FILES[name] if (file := path / name).is_file())


# --- components -------------------------------------------------------------------------------------------------------


def _component(source: ComponentSource | None, root: _Place, name: str, model: AnimaConfig, where: str) -> Path:
    if source is not None:
        return _Place.of(source.path, source.revision, model, where).weights(FOLDERS[name], source.subfolder, None)
    if (folder := root.folder(FOLDERS[name])) is not None:
        return find_weights(folder)
    raise UsageError(f"the {name} weights are not named", where=where,
                     why=f"{model.path} is not a folder in the diffusers layout that brings them",
                     fix=f"set {where} to a file, a folder or a hub id")  # fmt: skip


def _adapter(model: AnimaConfig, root: _Place) -> Path | None:
    if model.llm_adapter is not None:
        source = model.llm_adapter
        place = _Place.of(source.path, source.revision, model, "model.llm_adapter.path")
        return place.weights(FOLDERS["llm_adapter"], source.subfolder, None)
    folder = root.folder(FOLDERS["llm_adapter"])
    return None if folder is None else find_weights(folder)


def _tokenizer(name: str, model: AnimaConfig, root: _Place, qwen3: Path) -> Path:
    source = model.tokenizers.get(name)  # type: ignore[call-overload]
    if source is not None:
        where = f"model.tokenizers.{name}.path"
        place = _Place.of(source.path, source.revision, model, where, TOKENIZER_FILES[name])
        path = place.local / source.subfolder if source.subfolder else place.local
        if not _is_tokenizer(path, name):
            raise UsageError(f"no {name} tokenizer here", where=str(path), why=_wanted(name),
                             fix=f"set {where} to the folder of its files")  # fmt: skip
        return path
    beside = [qwen3.parent, qwen3.parent.parent / "tokenizer"] if name == "qwen3" else [
        qwen3.parent / "t5_tokenizer", qwen3.parent.parent / "t5_tokenizer"]  # fmt: skip
    in_root = root.folder(FOLDERS[f"{name}_tokenizer"])
    for path in (*([in_root] if in_root else []), *beside):
        if _is_tokenizer(path, name):
            return path
    return _fetch(TOKENIZER_HUB[name], None, model.download_dir, TOKENIZER_FILES[name], f"model.tokenizers.{name}.path")


ALTERNATIVES = {"qwen3": ("vocab.json", "merges.txt"), "t5": ("spiece.model",)}
"""What serves as well as a ``tokenizer.json``, taken together."""


def _is_tokenizer(path: Path, name: str) -> bool:
    if path.is_file():
        return path.suffix == ".json" or path.name in ALTERNATIVES[name]
    return (path / "tokenizer.json").is_file() or all((path / file).is_file() for file in ALTERNATIVES[name])


def _wanted(name: str) -> str:
    return f"it needs tokenizer.json, or {' and '.join(ALTERNATIVES[name])}"


# --- places -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """What one path of the configuration means: ``local`` is a file or folder that exists."""

    local: Path
    where: str

    @classmethod
    def of(
        cls,
        path: str,
        revision: str | None,
        model: AnimaConfig,
        where: str,
        patterns: tuple[str, ...] = ("*.safetensors", "*.json", "*.txt"),
    ) -> _Place:
        local = Path(path).expanduser()
        if local.exists():
            if revision is not None:
                raise _no_effect(where, "revision", f"{path} is on this machine, not on the hub")
            return cls(local=local, where=where)
        match = HUB_ID.fullmatch(path)
        if not match or _is_local(path):
            raise UsageError("no such file or folder", where=f"{where}: {path}", fix=_nearest(local))
        inside = match["inside"].strip("/")
        if inside:
            patterns = (inside, f"{inside}/*")
        folder = _fetch(match["repo"], revision, model.download_dir, patterns, where)
        local = folder / inside if inside else folder
        if not local.exists():
            raise UsageError(f"{match['repo']} has no {inside}", where=where, fix="look at the repository's file list")
        return cls(local=local, where=where)

    def folder(self, names: tuple[str, ...]) -> Path | None:
        """The first of the named folders that exists in a diffusers layout around ``local``; None for a lone file."""
        base = self.local if self.local.is_dir() else self.local.parent
        inside = base.name in FOLDERS["denoiser"]
        if self.local.is_file() and not inside:
            return None
        root = base.parent if inside else base
        return next((root / name for name in names if (root / name).is_dir()), None)

    def weights(self, names: tuple[str, ...], subfolder: str | None, variant: str | None) -> Path:
        """The weight file or shard index, looked up in ``subfolder``, or in a folder of the diffusers layout."""
        if self.local.is_file():
            for key, value in (("subfolder", subfolder), ("variant", variant)):
                if value is not None:
                    raise _no_effect(self.where, key, f"{self.local.name} is one file")
            return self.local
        base = self.local / subfolder if subfolder else self.local
        if not subfolder:
            base = next((self.local / name for name in names if (self.local / name).is_dir()), self.local)
        if variant is not None:
            named = sorted((*base.glob(f"*.{variant}.safetensors"), *base.glob(f"*.safetensors.index.{variant}.json")))
            if len(named) != 1:
                raise UsageError(f"{len(named)} files of variant {variant!r}", where=str(base),
                                 fix="set model.variant to a variant that exists, or name the file")  # fmt: skip
            return named[0]
        return find_weights(base)


def _no_effect(where: str, key: str, why: str) -> UsageError:
    """``where`` ends with ``path``; ``key`` stands beside it."""
    return UsageError(f"{where.removesuffix('path')}{key} has no effect", where=where, why=why, fix="take it out")


def _nearest(path: Path) -> str:
    """What to do about a path that does not exist: a similar name beside it, when there is one."""
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    similar = difflib.get_close_matches(path.name, beside, n=1)
    return f"did you mean {path.parent / similar[0]}?" if similar else "check the path"


def _is_local(path: str) -> bool:
    """Whether a path that does not exist was meant as a local one: by its suffix, or because its folder exists."""
    first = Path(path).parts[0]
    inside = path.count("/") > 1
    return Path(first).exists() or (not inside and path.endswith(WEIGHT_SUFFIXES)) or first in (".", "..", "~")


@cache
def _fetch(repo: str, revision: str | None, folder: str | None, patterns: tuple[str, ...], where: str) -> Path:
    """A snapshot of the matching files of a hub repository; asks the hub once per process, then the local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    arguments = {"revision": revision, "cache_dir": folder, "allow_patterns": list(patterns)}
    try:
        return Path(snapshot_download(repo, **arguments))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        options = "".join(f" --include '{pattern}'" for pattern in patterns)
        options += f" --revision {revision}" if revision else ""
        options += f" --cache-dir {folder}" if folder else ""
        raise UsageError(
            f"cannot fetch {repo} from the hub",
            where=where,
            why=str(error).splitlines()[0] or type(error).__name__,
            fix=f"on a machine with network run: hf download {repo}{options}; or set {where} to local files",
        ) from error
