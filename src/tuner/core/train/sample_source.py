"""What a run folder offers to `tuner sample`: its configuration and the weights of one of its files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.core.config.network import SPLITTING
from tuner.core.errors import UsageError
from tuner.core.files import safetensors_header
from tuner.core.track.events import read_events
from tuner.core.train.averaging import ema_path
from tuner.core.train.checkpoint import list_checkpoints
from tuner.core.train.folder import CONFIG, RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSource:
    """A run to make pictures with. config: resolved, as JSON. file: its adapter, or its whole model where ``whole``.

    split: whether the training took a part out of the weights, and quantized the rest if anything. arithmetic: whether
    quantized arithmetic passed the run's check; None when there was none.
    """

    folder: RunFolder
    config: dict[str, Any]
    file: Path
    whole: bool
    split: bool
    arithmetic: bool | None


def open_source(path: Path, *, step: int | None = None, ema: bool = False, named: str | None = None) -> RunSource:
    """The run in a folder with its final file, else its newest checkpoint, or that after ``step`` updates.

    ema: its average instead. named: rather the whole model of this name, if the run has it. UsageError when there is no
    such run or file.
    """
    folder, config = _read_folder(path)
    whole = config.get("train", {}).get("mode") == "full"
    again = next((each for each in _files(folder) if each.name == named), None) if whole else None
    file = again or _file_of(folder, step)
    if ema and again is None:
        file = ema_path(file)
        if not file.is_file():
            raise UsageError(
                "there is no average of these weights",
                where=str(file),
                why="the run had no ema, or did not save it",
                fix="leave --ema out",
            )
    # How an adapter began is no matter any more, and would be checked against what is quantized here.
    init = config.get("network", {}).pop("init", None)
    return RunSource(
        folder=folder,
        config=config,
        file=file,
        whole=whole,
        split=init in SPLITTING,
        arithmetic=_arithmetic(folder),
    )


def files_of(path: Path) -> Iterator[Path]:
    """Every adapter file of the run in a folder, the final ones first."""
    yield from _files(_read_folder(path)[0])


def _files(folder: RunFolder) -> Iterator[Path]:
    for place in (folder.path, *reversed(list_checkpoints(folder))):
        yield from sorted(each for each in place.glob("*.safetensors") if each.name != "state.safetensors")


def _read_folder(path: Path) -> tuple[RunFolder, dict[str, Any]]:
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        return RunFolder(path, config["checkpoint"]["name"]), config
    except OSError as error:
        raise UsageError(
            "this folder holds no run",
            where=str(path),
            why=f"it has no readable {CONFIG}",
            fix="name the folder of a run (checkpoint.dir), or a configuration file",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError("the configuration of this run is damaged", where=str(path / CONFIG)) from error


def _file_of(folder: RunFolder, step: int | None) -> Path:
    saved = {}
    for place in list_checkpoints(folder):
        number = int(place.name.removeprefix("step-"))
        if folder.checkpoint_file(number).is_file():
            saved[number] = folder.checkpoint_file(number)
    final = folder.final if folder.final.is_file() else None
    reached = safetensors_header(final).metadata.get("ss_steps") if final is not None else None
    if step is None:
        # A run that was made longer and stopped has checkpoints that are newer than its final file.
        newer = saved and (final is None or (reached is not None and max(saved) > int(reached)))
        newest = saved[max(saved)] if newer else final
        if newest is None:
            raise UsageError(
                "this run has saved nothing yet", where=str(folder.path), fix="wait for its first checkpoint"
            )
        return newest
    if step in saved:
        return saved[step]
    if final is not None and reached == str(step):
        return final
    listed = ", ".join(map(str, sorted(saved))) or "none"
    raise UsageError(
        f"there are no weights of step {step}", where=str(folder.path), why=f"steps with a checkpoint: {listed}"
    )


def _arithmetic(folder: RunFolder) -> bool | None:
    if not folder.events.is_file():
        return None
    checks = [event for event in read_events(folder.events) if event["kind"] == "parity"]
    return bool(checks[-1]["passed"]) if checks else None
