"""``log.to``: the event log needs no mention, a missing package says what to install, plugins bring further ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tuner.core.config import LogConfig
from tuner.core.errors import UsageError
from tuner.core.track import trackers
from tuner.core.track.events import EventLog
from tuner.core.track.trackers import check_trackers, open_trackers


class Recorder:
    made: list[Recorder] = []  # noqa: RUF012

    def __init__(self, folder: Path, start_step: int) -> None:
        self.folder, self.start_step = folder, start_step
        self.seen: list[tuple] = []
        Recorder.made.append(self)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.seen.append((step, dict(metrics)))

    def image(self, step: int, name: str, path: Path) -> None:
        self.seen.append((step, name, path))

    def close(self) -> None:
        self.seen.append(("closed",))


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("theirs", f"{__name__}:Recorder", trackers.ENTRY_POINTS)
    monkeypatch.setattr(EntryPoint, "load", lambda self: Recorder)
    monkeypatch.setattr(trackers, "entry_points", lambda group: [point])


def test_the_event_log_alone_needs_nothing(tmp_path: Path) -> None:
    with open_trackers(LogConfig(), tmp_path) as none, open_trackers(LogConfig(to=("jsonl",)), tmp_path) as same:
        none.log(1, {"loss": 0.5})
        same.log(1, {"loss": 0.5})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("plugin")
def test_a_plugin_gets_numbers_and_pictures_and_is_closed(tmp_path: Path) -> None:
    with open_trackers(LogConfig(to=("theirs",)), tmp_path, start_step=5) as opened:
        opened.log(6, {"loss": 0.5})
        opened.image(6, "sheet", tmp_path / "sheet.png")
    made = Recorder.made[-1]
    assert (made.folder, made.start_step) == (tmp_path, 5)
    assert made.seen == [(6, {"loss": 0.5}), (6, "sheet", tmp_path / "sheet.png"), ("closed",)]


@pytest.mark.usefixtures("plugin")
def test_trackers_write_into_their_own_folder_when_one_is_named(tmp_path: Path) -> None:
    with open_trackers(LogConfig(to=("theirs",), dir=str(tmp_path / "logs")), tmp_path):
        pass
    assert Recorder.made[-1].folder == tmp_path / "logs"


def test_tensorboard_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UsageError) as caught:
        check_trackers(LogConfig(to=("tensorboard",)))
    assert "pip install tensorboard" in str(caught.value)


@pytest.mark.usefixtures("plugin")
def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError) as caught:
        check_trackers(LogConfig(to=("tensorbord",)))
    assert "jsonl, tensorboard, wandb, theirs" in str(caught.value)
    assert "did you mean 'tensorboard'?" in str(caught.value)


# --- wandb ------------------------------------------------------------------------------------------------------------


KNOWN = {"project", "name", "dir", "config", "id", "resume", "allow_val_change", "settings"}


class Elsewhere:
    """Stands for the package: what it was asked for, and every call of the runs it gave."""

    class RefusedError(Exception):
        pass

    def __init__(self) -> None:
        self.errors = SimpleNamespace(Error=self.RefusedError)
        self.asked: list[dict[str, Any]] = []
        self.calls: list[tuple[Any, ...]] = []
        self.refuses = False

    def init(self, *, tags: tuple[str, ...] = (), **asked: Any) -> Elsewhere:
        if self.refuses:
            raise self.RefusedError("no key")
        if unknown := set(asked) - KNOWN:
            raise TypeError(f"an unexpected argument {unknown}")
        self.asked.append({"tags": tags, **asked})
        return self

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.calls.append((step, metrics))

    def finish(self) -> None:
        self.calls.append(("finished",))

    Image = staticmethod(lambda path: ("picture", path))
    Settings = staticmethod(lambda **settings: settings)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    package = Elsewhere()
    monkeypatch.setitem(sys.modules, "wandb", package)  # type: ignore[arg-type]
    monkeypatch.setattr(trackers, "find_spec", lambda name: name if name == "wandb" else find_spec(name))
    return package


def begun(folder: Path) -> Path:
    settings = {"model": {"path": "/home/someone/base.safetensors"}, "data": {"sets": [{"sources": ["~/pictures"]}]}}
    (folder / "config.resolved.json").write_text(json.dumps(settings), encoding="utf-8")
    with EventLog(folder / "events.jsonl") as events:
        events.emit("run_start", run="hero")
    return folder


def test_wandb_gets_numbers_pictures_and_settings_and_one_run_for_a_folder(wandb: Elsewhere, tmp_path: Path) -> None:
    folder = begun(tmp_path)
    config = LogConfig(to=("wandb",), project="portraits", args={"wandb": {"tags": ("style",)}})
    with open_trackers(config, folder) as opened:
        opened.log(1, {"loss": 0.5})
        opened.image(1, "samples", folder / "sheet.png")
    assert wandb.calls == [
        (1, {"loss": 0.5}), (1, {"samples": ("picture", str(folder / "sheet.png"))}), ("finished",)
    ]  # fmt: skip
    with open_trackers(LogConfig(to=("wandb",), run="second try", config=False), folder, start_step=1):
        pass
    first, second = wandb.asked
    assert (first["project"], first["name"], first["tags"]) == ("portraits", folder.name, ("style",))
    assert (second["project"], second["name"], second["config"]) == ("tuner", "second try", {})
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert first["config"]["model"] == {"path": "…/base.safetensors"}
    assert "someone" not in json.dumps(first["config"]) and "~" not in json.dumps(first["config"])
    (tmp_path / "other").mkdir()
    with open_trackers(LogConfig(to=("wandb",)), begun(tmp_path / "other")):
        pass
    assert wandb.asked[-1]["id"] != first["id"]


def test_wandb_that_refuses_says_why_and_what_to_do(wandb: Elsewhere, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unexpected argument") as caught:
        open_trackers(LogConfig(to=("wandb",), args={"wandb": {"entitee": "us"}}), tmp_path)
    assert "log.args.wandb" in str(caught.value)
    wandb.refuses = True
    with pytest.raises(UsageError, match="did not start") as caught:
        open_trackers(LogConfig(to=("wandb",)), tmp_path)
    assert "no key" in str(caught.value) and "wandb login" in str(caught.value)


def test_wandb_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install wandb"):
        check_trackers(LogConfig(to=("wandb",)))
