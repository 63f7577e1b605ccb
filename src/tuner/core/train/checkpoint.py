"""Checkpoints: the exported adapter beside the exact state of the run, as safetensors and JSON.

A checkpoint folder appears under its name only when it is complete. Every state file carries the checksum of the
other, so a flipped bit or a half-copied folder is noticed when it is read, and the checkpoint before it is used
instead.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tuner.core.adapters.streams import FILE_NAMES, Planned, write_tensors
from tuner.core.atomic import sync_file, sync_folder, write_json
from tuner.core.errors import UsageError
from tuner.core.train.folder import RunFolder

if TYPE_CHECKING:
    from tuner.core.config.outputs import CheckpointConfig

log = logging.getLogger(__name__)

STATE_TENSORS = "state.safetensors"
STATE_JSON = "state.json"
ROLLING = "rolling"
"""Empty file in a checkpoint of the rolling series."""
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a run stands: ``step`` updates are done; the next batch is number ``batch`` of ``epoch`` (both from 0)."""

    step: int
    epoch: int
    batch: int
    seed: int
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Everything a resumed run needs. ``tensors`` by name; ``scalars`` is plain JSON."""

    position: Position
    tensors: Mapping[str, Tensor]
    scalars: Mapping[str, Any]


def write_state(folder: Path, state: State) -> None:
    """Write both state files into ``folder``, tensor by tensor. OSErrors pass through."""
    path = folder / STATE_TENSORS
    _write_tensors(path, state.tensors)
    document = {
        "format": FORMAT,
        "position": asdict(state.position),
        "scalars": dict(state.scalars),
        "tensors_blake2b": file_digest(path),
    }
    document["blake2b"] = _document_digest(document)
    write_json(folder / STATE_JSON, document)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file. Tensors are fetched from their devices one by one: there may be no room for all of them."""
    # Wide values first, as the library does it, so that all of them are aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    planned = {}
    for name in names:
        value = tensors[name]
        if value.dtype not in FILE_NAMES:
            raise UsageError("the state of this run cannot be saved", where=name, why=f"it is of type {value.dtype}",
                             fix="choose another optimizer, or set checkpoint.state to 'none'")  # fmt: skip
        planned[name] = Planned(FILE_NAMES[value.dtype], tuple(value.shape), value.detach)
    write_tensors(path, planned, {})


def read_state(folder: Path) -> State:
    """Read and verify. Raises UsageError naming the file that is missing, damaged or of another format."""
    path = folder / STATE_JSON
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            "this is no checkpoint to resume from" if not folder.is_dir() else "this checkpoint has no resume state",
            where=str(path),
            why=error.strerror,
            fix="name a folder below checkpoints/ in the run folder, or use --resume alone for the newest",
        ) from error
    except ValueError as error:
        raise UsageError("the resume state is damaged", where=str(path), why=str(error)) from error
    if not isinstance(document, dict) or document.get("blake2b") != _document_digest(document):
        raise UsageError("the resume state is damaged", where=str(path), why="its checksum does not match")
    if document["format"] != FORMAT:
        raise UsageError("the resume state has another format", where=str(path), why=f"format {document['format']}")
    tensors_path = folder / STATE_TENSORS
    try:
        if file_digest(tensors_path) != document["tensors_blake2b"]:
            raise UsageError("the resume state is damaged", where=str(tensors_path), why="its checksum does not match")
        tensors = load_file(tensors_path)
    except (OSError, SafetensorError) as error:
        raise UsageError("the resume state cannot be read", where=str(tensors_path), why=str(error)) from error
    return State(position=Position(**document["position"]), tensors=tensors, scalars=document["scalars"])


def find_state(folder: RunFolder, wanted: str) -> tuple[Path, State] | None:
    """The checkpoint to resume: ``auto`` takes the newest that reads back whole, None when there is none at all.

    Any other ``wanted`` is the path of one checkpoint folder. Raises UsageError when that, or every candidate, is
    unusable.
    """
    if wanted != "auto":
        path = Path(wanted).resolve()
        state = read_state(path)
        _refuse_later_checkpoints(folder, path)
        return path, state
    candidates = [path for path in reversed(list_checkpoints(folder)) if (path / STATE_JSON).exists()]
    failures: list[str] = []
    for path in candidates:
        try:
            state = read_state(path)
        except UsageError as error:
            log.warning("checkpoint %s is not usable, trying the one before: %s", path.name, error)
            failures.append(f"{path.name}: {error.what}")
            continue
        return path, state
    if failures:
        raise UsageError(
            "no checkpoint of this run can be read", where=str(folder.checkpoints), why="; ".join(failures)
        )
    return None


def _refuse_later_checkpoints(folder: RunFolder, chosen: Path) -> None:
    """Going back inside a folder would mix two histories: a later ``auto`` would go on from the one that was left."""
    if chosen.parent != folder.checkpoints.resolve():
        return
    later = [path.name for path in list_checkpoints(folder) if (_step_of(path) or 0) > (_step_of(chosen) or 0)]
    if later:
        raise UsageError(
            f"the run went on after {chosen.name}",
            where=str(folder.checkpoints),
            why=f"it holds {', '.join(later)} as well; two continuations in one folder would mix",
            fix="set checkpoint.dir to a new folder and resume from this checkpoint there, or move the later ones away",
        )


def list_checkpoints(folder: RunFolder) -> list[Path]:
    """Complete checkpoint folders, oldest first."""
    if not folder.checkpoints.is_dir():
        return []
    found = [path for path in folder.checkpoints.iterdir() if _step_of(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: _step_of(path) or 0)


def _step_of(path: Path) -> int | None:
    """The step in a checkpoint folder's name, None for other names."""
    number = path.name.removeprefix("step-")
    return int(number) if path.name.startswith("step-") and number.isdigit() else None


class CheckpointWriter:
    """Builds a checkpoint in a hidden folder and renames it into place, then applies retention."""

    def __init__(self, folder: RunFolder, *, keep_last: int | None, state: str, keep_rolling: int = 1) -> None:
        self.folder, self.keep_last, self.state, self.keep_rolling = folder, keep_last, state, keep_rolling

    @classmethod
    def of(cls, folder: RunFolder, config: CheckpointConfig) -> Self:
        """The writer that a configuration asks for."""
        rolling = 1 if config.rolling is None else config.rolling.keep
        return cls(folder, keep_last=config.keep_last, state=config.state, keep_rolling=rolling)

    def begin(self, step: int) -> Path:
        """The hidden folder to fill; leftovers of a killed attempt are removed."""
        building = self.folder.checkpoints / f".building-step-{step:06d}"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        return building

    def commit(self, building: Path, step: int, *, rolling: bool = False) -> Path:
        """Give the filled folder its name and apply retention; ``rolling``: to its own series."""
        if rolling:
            (building / ROLLING).touch()
        for file in building.iterdir():
            sync_file(file)
        sync_folder(building)
        final = self.folder.checkpoint(step)
        if final.exists():
            # A resumed run reaches a step again; its files are equal, and rename cannot replace a full folder.
            shutil.rmtree(final)
        building.rename(final)
        sync_folder(self.folder.checkpoints)
        self._retain(final)
        return final

    def abandon(self, building: Path) -> None:
        shutil.rmtree(building, ignore_errors=True)

    def _retain(self, newest: Path) -> None:
        """Thin out what lies before ``newest``. A later checkpoint is one that was damaged when the run was resumed:
        counting it would remove good ones in its favour.
        """
        existing = list_checkpoints(self.folder)
        existing = existing[: existing.index(newest) + 1]
        rolling = [path for path in existing if (path / ROLLING).exists()]
        lasting = [path for path in existing if path not in rolling]
        gone = rolling[: -self.keep_rolling] + ([] if self.keep_last is None else lasting[: -self.keep_last])
        for path in gone:
            shutil.rmtree(path)
        existing = [path for path in existing if path not in gone]
        if self.state == "last":
            for path in existing[:-1]:
                (path / STATE_JSON).unlink(missing_ok=True)
                (path / STATE_TENSORS).unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """BLAKE2b of a file, 16 bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _document_digest(document: Mapping[str, Any]) -> str:
    content = {key: value for key, value in document.items() if key != "blake2b"}
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
