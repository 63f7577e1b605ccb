"""``log.to``: the event log needs no mention, a missing package says what to install, plugins bring further ones."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from tuner.core.config import LogConfig
from tuner.core.errors import UsageError
from tuner.core.track import trackers
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
    assert "jsonl, tensorboard, theirs" in str(caught.value)
    assert "did you mean 'tensorboard'?" in str(caught.value)
