"""What the commands that read and write model files have in common."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.cli.console import warn
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.adapters.inspecting import Family
    from tuner.core.types import KeyMaps, StoredFile, WeightMaps

ADAPTER_DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True, slots=True)
class ModelNames:
    """What a model's plugin declares about its files."""

    name: str
    adapters: KeyMaps
    weights: WeightMaps | None

    def require_weights(self) -> WeightMaps:
        if self.weights is None:
            raise UsageError(
                f"the model {self.name!r} does not say how its weight files are laid out",
                why="its plugin declares no weight_maps",
                fix="ask the plugin's author",
            )
        return self.weights


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """``--model``."""
    parser.add_argument("--model", metavar="NAME", help="the model the files are for (that of the first file)")


def add_output_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """``--out``, ``--overwrite`` and ``--json``. what: is written, for the help."""
    parser.add_argument("--out", required=True, metavar="FILE", help=f"the {what} to write")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE when it exists")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """``--rank`` and ``--energy``."""
    parser.add_argument("--rank", type=int, metavar="N", help="rank of every module, where the sizes allow it")
    parser.add_argument(
        "--energy", type=float, metavar="SHARE", help="as many ranks as hold this share of a module's squared norm"
    )


def model_names(name: str | None, source: Path | str) -> ModelNames:
    """The names of the chosen model, else of the one that ``source`` is a file of.

    UsageError when it must be named, or declares no adapter formats.
    """
    from tuner.core.registry import MODELS, Catalog

    catalog = Catalog()
    names = [entry.name for entry in catalog.entries(MODELS)]
    chosen = name or (names[0] if len(names) == 1 else _recognised(source, names))
    descriptor = catalog.model(chosen)
    entry = catalog.entry(MODELS, chosen)
    if descriptor.key_maps is None:
        raise UsageError(f"the model {chosen!r} declares no adapter formats")
    weights: Any = None
    if descriptor.weight_maps is not None:
        weights = catalog.load(entry, "descriptor", descriptor.weight_maps)
    return ModelNames(chosen, catalog.load(entry, "descriptor", descriptor.key_maps), weights)


def _recognised(source: Path | str, names: list[str]) -> str:
    from tuner.core.adapters.inspecting import inspect
    from tuner.core.files import weight_header

    known = families()
    inside = {Path(source, name) for each in known if each.weights for name in each.weights.folders.get("denoiser", ())}
    # In the diffusers layout the denoiser has a folder of its own.
    weights = next((folder for folder in sorted(inside) if folder.is_dir()), source)
    family = inspect(weight_header(weights), known).family
    if family not in names:
        why = "no installed model has these names" if family is None else f"it can belong to {family}"
        raise UsageError(
            "which model is this file for?", where=str(source), why=why, fix=f"add --model, one of: {', '.join(names)}"
        )
    return family


def families() -> list[Family]:
    """What every installed model declares about names; one that cannot be loaded is told and left out."""
    from tuner.core.adapters.inspecting import Family
    from tuner.core.registry import MODELS, Catalog

    catalog = Catalog()
    found = []
    for entry in catalog.entries(MODELS):
        try:
            descriptor = catalog.model(entry.name)
            detect = catalog.load(entry, "descriptor", descriptor.detect)
            maps, weights = (
                None if reference is None else catalog.load(entry, "descriptor", reference)
                for reference in (descriptor.key_maps, descriptor.weight_maps)
            )
        except UsageError as error:
            warn(f"the model {entry.name} is left out: {error.what}")
            continue
        found.append(Family(name=entry.name, detect=detect, adapters=maps, weights=weights))
    return found


def network_metadata(ranks: list[int]) -> dict[str, str]:
    """What other tools look for in an adapter; alpha is the rank in everything that is made here."""
    rank = str(ranks[0]) if len(set(ranks)) == 1 else "Dynamic"
    return {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}


def split_strength(text: str) -> tuple[Path, float]:
    """``file.safetensors:0.8`` as path and strength; a colon that no number follows belongs to the name, and so does
    one in the name of a file that is there."""
    name, colon, number = text.rpartition(":")
    if Path(text).exists():
        return Path(text), 1.0
    strength = number_or_none(number) if colon and name else None
    if strength is None and colon and Path(name).is_file():
        raise UsageError(f"cannot read the strength {number!r}", where=text, fix=f"write {name}:0.8, for example")
    return (Path(text), 1.0) if strength is None else (Path(name), finite(strength, text))


def number_or_none(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def finite(strength: float, text: str) -> float:
    if not math.isfinite(strength):
        raise UsageError(f"a strength must be finite, not {strength:g}", where=text, fix="write 0.8, for example")
    return strength


def new_file(text: str, *, overwrite: bool, sources: Iterable[Path]) -> Path:
    """The file to write. UsageError when it exists, is one of those that are read, or cannot be written."""
    path = Path(text)
    if any(path.exists() and source.exists() and path.samefile(source) for source in sources):
        raise UsageError("the result would replace the file it is made of", where=text, fix="choose another name")
    if path.is_dir():
        raise UsageError("a file is to be written here, this is a folder", where=text, fix="name a file in it")
    if path.exists() and not overwrite:
        raise UsageError("the file exists", where=text, fix="choose another name, or add --overwrite")
    _check_writable(path.parent, text)
    return path


def sources_of(files: Iterable[StoredFile]) -> list[Path]:
    """Everything on disk that makes ``files``: their shards, and the index of these."""
    return [path for file in files for path in (file.header.path, *file.header.files)]


def new_folder(text: str, *, overwrite: bool, sources: Iterable[Path]) -> Path:
    """The folder to write files into. UsageError when it has any, when one of them is read, or it cannot be written."""
    path = Path(text)
    if any(source.resolve().is_relative_to(path.resolve()) for source in sources):
        raise UsageError("the result would replace what it is made of", where=text, fix="choose another folder")
    if path.exists() and not path.is_dir():
        raise UsageError("a folder is to be written here, this is a file", where=text, fix="choose another name")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UsageError("the folder is not empty", where=text, fix="choose another name, or add --overwrite")
    _check_writable(path, text)
    return path


def _check_writable(folder: Path, where: str) -> None:
    """Try it before hours of work, in the nearest folder that exists."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    with writing(where), tempfile.TemporaryFile(dir=there):
        pass


@contextmanager
def writing(where: Path | str) -> Iterator[None]:
    """UsageError instead of what the system says when the result cannot be written, for example on a full disk."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            "the result cannot be written",
            where=str(where),
            why=error.strerror or str(error),
            fix="choose another place",
        ) from error


@contextmanager
def shown_progress(stage: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (how many are done, of how many) that shows it on standard error."""
    from rich.console import Console

    from tuner.core.track.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total: None
        return
    with ExitStack() as stack:
        shown: list[Progress] = []

        def show(done: int, total: int) -> None:
            if not shown:
                shown.append(stack.enter_context(Progress(stage, total, unit, console=console)))
            shown[0].advance(done - shown[0].done)

        yield show
