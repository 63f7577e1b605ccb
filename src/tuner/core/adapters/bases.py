"""The weight files of a model that a tool was given: what they are, and their parameters one by one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from tuner.core.adapters.checkpoints import members
from tuner.core.compute.encoder_sizes import refuse_scaled
from tuner.core.compute.weights import read_tensors
from tuner.core.errors import UsageError
from tuner.core.files import TensorInfo, WeightHeader, weight_header
from tuner.core.types import StoredFile

if TYPE_CHECKING:
    from tuner.core.types import StoredTensor, WeightMaps

NAMED = re.compile(r"(\w+)=(.+)")


def open_files(maps: WeightMaps, given: Sequence[str], where: str) -> tuple[StoredFile, ...]:
    """The files that arguments name: ``FILE``, ``COMPONENT=FILE``, or a folder in the diffusers layout.

    Names of the files are as in `StoredFile`. UsageError: a file of another model, one that could be several
    components, or two files for one.
    """
    files: dict[str, StoredFile] = {}
    for text in given:
        for file in _opened(maps, text, where):
            if file.name in files:
                raise UsageError(f"two files hold the {file.name or 'denoiser'}", where=where, why=text)
            refuse_scaled(file.header, str(file.header.path))
            files[file.name] = file
    return tuple(sorted(files.values(), key=lambda file: (file.name != "", file.name)))


def _opened(maps: WeightMaps, text: str, where: str) -> Iterator[StoredFile]:
    match = NAMED.fullmatch(text)
    if match is not None and (match[1] in maps.folders or match[1] == "denoiser"):
        component: str | None = match[1]
        path = Path(match[2])
    else:
        component, path = None, Path(text)
    if component is None and (inside := folders_of(maps, path)):
        for name, folder in inside.items():
            header = weight_header(folder)
            yield _file(name, header, maps.stored(header, name), where)
        return
    header = weight_header(path)
    if component is not None:
        tensors = maps.stored(header, component)
        if not tensors:
            raise _foreign(path, where, component)
        yield _file(component, header, tensors, where)
        return
    found = maps.stored(header, None)
    if found:
        yield StoredFile(name="", header=header, tensors=found)
        return
    fitting = {name: tensors for name in maps.folders if (tensors := maps.stored(header, name))}
    if len(fitting) > 1:
        raise UsageError(
            f"this file could be {' or '.join(fitting)}", where=str(path), fix=f"write {next(iter(fitting))}={path}"
        )
    if not fitting:
        raise _foreign(path, where)
    [(name, tensors)] = fitting.items()
    yield StoredFile(name=name, header=header, tensors=tensors)


def folders_of(maps: WeightMaps, path: Path) -> dict[str, Path]:
    """The folders of the components below a folder in the diffusers layout; {} for anything else."""
    found: dict[str, Path] = {}
    for name, folders in maps.folders.items():
        existing = [path / folder for folder in folders if (path / folder).is_dir()]
        # One folder may be either of two components, depending on the model: what is in it decides.
        fits = [folder for folder in existing if not _other(maps, name, folder)]
        if fits:
            found[name] = fits[0]
    return found if "denoiser" in found else {}


def _other(maps: WeightMaps, name: str, folder: Path) -> bool:
    header = weight_header(folder)
    if maps.stored(header, name):
        return False
    return any(maps.stored(header, each) for each in maps.folders)


def _file(name: str, header: WeightHeader, tensors: Mapping[str, StoredTensor], where: str) -> StoredFile:
    if not tensors and name == "denoiser":
        raise _foreign(header.path, where)
    return StoredFile(name="" if name == "denoiser" else name, header=header, tensors=tensors)


def _foreign(path: Path, where: str, component: str | None = None) -> UsageError:
    return UsageError(
        f"this file holds no {component or 'weights'} of this model",
        where=f"{where} {path}",
        why="its tensors have other names",
        fix="tuner inspect tells what a file is; --model names the model",
    )


@dataclass(frozen=True, slots=True)
class _Place:
    info: TensorInfo
    stored: StoredTensor
    number: int


class Parameters:
    """The parameters that files hold, by ``component:name``, read from the files when they are asked for."""

    def __init__(self, files: Sequence[StoredFile]) -> None:
        self.places = {
            name: _Place(file.header[key], stored, number)
            for file in files
            for key, stored in file.tensors.items()
            for number, name in enumerate(stored.names)
        }

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def dtype(self, name: str) -> str:
        """As the file spells it."""
        return self.places[name].info.dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the parameter, which may be a part of the rows of a file's tensor."""
        place = self.places[name]
        shape, stored = place.info.shape, place.stored
        if len(stored.names) == 1:
            return shape
        rows = stored.rows or (1,) * len(stored.names)
        return (shape[0] // sum(rows) * rows[place.number], *shape[1:])

    def read(self, name: str) -> Tensor:
        """The values on the CPU in the file's dtype; not to be written to."""
        place = self.places[name]
        return members(read_one(place.info), place.stored)[place.number]


def read_one(info: TensorInfo) -> Tensor:
    """One tensor of a file in its stored dtype, a view of the mapped file."""
    [(_, value)] = read_tensors(WeightHeader(info.path, {info.name: info}))
    return value
