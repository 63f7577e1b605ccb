"""Which model files there are: weight headers under a folder, shown to every installed plugin. No torch, no network."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tuner.core.errors import UsageError
from tuner.core.files import INDEX_SUFFIX, WeightHeader, find_weights, weight_header
from tuner.core.places import DENOISER_FOLDERS
from tuner.core.registry import MODELS, Catalog, Entry

DEPTH = 5
"""So many folders deep is looked."""
MOST = 400
"""So many weight files are read, no more: a whole disk is a mistake."""
_TOLD = 3
_SHARD = re.compile(r".*-\d{5}-of-\d{5}\.(safetensors|sft)")
_PLAIN_NAMES = re.compile(r"(model|diffusion_pytorch_model|pytorch_model)(\.\w+)?\.(safetensors|sft).*")
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "vocab.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundModel:
    """Weights of a denoiser. path: as ``model.path`` takes it."""

    family: str
    flavour: str
    path: Path


@dataclass(slots=True, kw_only=True)
class Found:
    """models: denoisers. parts: (family, key of the model section) to files or folders that may be given for it.
    tokenizers: folders of tokenizers. unread: weight files that could not be read, and why. read: how many could.
    passed: how many were not looked at because there were too many."""

    models: list[FoundModel] = field(default_factory=list)
    parts: dict[tuple[str, str], list[Path]] = field(default_factory=dict)
    tokenizers: list[Path] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    read: int = 0
    passed: int = 0

    def notes(self) -> list[str]:
        """What a user should know about files that were not taken, one line each."""
        told = [f"not readable: {each}" for each in self.unread[:_TOLD]]
        if len(self.unread) > _TOLD:
            told.append(f"not readable: {len(self.unread) - _TOLD} more")
        if self.passed:
            told.append(f"{self.passed} more weight files were not looked at: name a smaller folder to have them found")
        return told


def look_for_models(place: Path, catalog: Catalog) -> Found:
    """What is in a folder and the folders below it, or in one weight file and beside it."""
    found = Found()
    root = place if place.is_dir() else place.parent
    for path, is_weights in _files(root):
        if not is_weights:
            if path.parent not in found.tokenizers:
                found.tokenizers.append(path.parent)
        elif found.read + len(found.unread) < MOST:
            _take(path, catalog, found)
        else:
            found.passed += 1
    if place.is_file():
        # The file was named: others beside it may be its parts, not its rivals.
        found.models = [each for each in found.models if each.path == place or _within(place, each.path)]
    return found


def families_of(catalog: Catalog) -> list[Entry]:
    """Installed models."""
    return catalog.entries(MODELS)


def nearest_first(paths: list[Path], name: str) -> list[Path]:
    """Those whose own or folder's name has the last part of ``name`` in it first."""
    word = name.rsplit(".", 1)[-1].lower()
    return sorted(paths, key=lambda path: (word not in path.name.lower(), word not in str(path).lower()))


def _within(place: Path, folder: Path) -> bool:
    return folder.is_dir() and place.is_relative_to(folder)


def _files(root: Path) -> Iterator[tuple[Path, bool]]:
    """(path, whether it holds weights) of everything that could be part of a model, by name."""
    seen: set[str] = set()
    # Links are followed: models are large, and often lie elsewhere.
    for folder, names, files in os.walk(root, followlinks=True):
        here = Path(folder)
        names[:] = sorted(name for name in names if not name.startswith("."))
        if (real := os.path.realpath(folder)) in seen:
            names.clear()
            continue
        seen.add(real)
        if len(here.relative_to(root).parts) >= DEPTH:
            names.clear()
        for name in sorted(files):
            if name.endswith(INDEX_SUFFIX) or (name.endswith((".safetensors", ".sft")) and not _SHARD.fullmatch(name)):
                yield here / name, True
            elif name in _TOKENIZER_FILES:
                yield here / name, False


def _take(path: Path, catalog: Catalog, found: Found) -> None:
    try:
        header = weight_header(path)
    except UsageError as problem:
        found.unread.append(f"{path}: {problem.why or problem.what}")
        return
    found.read += 1
    shown = _as_given(path)
    models = [
        FoundModel(family=entry.name, flavour=flavour, path=_root_of(shown))
        for entry in families_of(catalog)
        if (flavour := _flavour(entry, catalog, header)) is not None
    ]
    found.models.extend(each for each in models if each not in found.models)
    if not models:
        for key, family in _keys(catalog, header):
            found.parts.setdefault((family, key), []).append(shown)


def _flavour(entry: Entry, catalog: Catalog, header: WeightHeader) -> str | None:
    """What the plugin calls the weights, None when they are not its own or it cannot tell."""
    try:
        detect = catalog.load(entry, "descriptor", catalog.model(entry.name).detect)
        flavour: str | None = catalog.call(entry, "detect", detect, header)
    except UsageError:
        return None
    return flavour


def _keys(catalog: Catalog, header: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    for entry in families_of(catalog):
        try:
            reference = catalog.model(entry.name).recognise
            if reference is None:
                continue
            recognise = catalog.load(entry, "descriptor", reference)
            keys: tuple[str, ...] = catalog.call(entry, "recognise", recognise, header)
        except UsageError:
            continue
        yield from ((key, entry.name) for key in keys)


def _as_given(path: Path) -> Path:
    """The folder, for a file whose name says nothing and that is the one its folder is found by."""
    if path.name.endswith(INDEX_SUFFIX) or _PLAIN_NAMES.fullmatch(path.name):
        with contextlib.suppress(UsageError):
            if find_weights(path.parent) == path:
                return path.parent
    return path


def _root_of(path: Path) -> Path:
    """The folder in the diffusers layout that a denoiser's folder is part of."""
    if path.is_dir() and path.name in DENOISER_FOLDERS and _is_layout(path.parent):
        return path.parent
    return path


def _is_layout(folder: Path) -> bool:
    try:
        return isinstance(json.loads((folder / "model_index.json").read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False
