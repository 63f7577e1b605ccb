"""The event log is only appended to, survives crashes and full disks, and reads back as one run."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from tuner.core.track.events import EventLog, read_events, without_redone


def kinds(path: Path) -> list[str]:
    return [event["kind"] for event in read_events(path)]


def test_an_event_is_one_line_with_time_and_kind(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as events:
        events.emit("export", path=Path("a/b.safetensors"), keys=3, note="snow ❄\nand more")
    lines = path.read_bytes().splitlines()
    assert len(lines) == 1
    event = json.loads(lines[0])
    assert event["time"].endswith("Z")
    assert {key: event[key] for key in ("kind", "path", "keys", "note")} == {
        "kind": "export",
        "path": "a/b.safetensors",
        "keys": 3,
        "note": "snow ❄\nand more",
    }


def test_numbers_that_json_has_no_word_for_become_null(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as events:
        events.emit("step", step=1, loss=float("nan"), lr={"a": float("inf")}, pair=(1.5, float("-inf")))
    (event,) = read_events(path)
    assert (event["loss"], event["lr"], event["pair"]) == (None, {"a": None}, [1.5, None])


def test_a_second_process_goes_on_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for kind in ("run_start", "resume"):
        with EventLog(path) as events:
            events.emit(kind)
    assert kinds(path) == ["run_start", "resume"]


def test_every_event_is_in_the_file_before_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as events:
        events.emit("step", step=1)
        assert kinds(path) == ["step"]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_cut_off_by_a_crash_costs_that_line_only(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as events:
        events.emit("run_start")
        events.emit("step", step=1, loss=0.123456, note="x" * 30)
    path.write_bytes(path.read_bytes()[:-cut])
    with EventLog(path) as events:
        events.emit("resume", step=0)
    # cutting only the line break leaves a whole event
    assert kinds(path) == (["run_start", "step", "resume"] if cut == 1 else ["run_start", "resume"])


def test_a_torn_line_inside_a_character_is_survived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"kind": "run_start"}\n{"kind": "warning", "message": "\xe2\x9d')
    with caplog.at_level(logging.WARNING):
        assert kinds(path) == ["run_start"]
    assert "skipped 1 unfinished line" in caplog.text


def test_no_file_means_no_events(tmp_path: Path) -> None:
    assert read_events(tmp_path / "events.jsonl") == []


def test_steps_are_not_forced_to_disk_and_everything_else_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with EventLog(tmp_path / "events.jsonl") as events:
        events.emit("step", step=1)
        assert synced == []
        events.emit("checkpoint", step=1)
        assert len(synced) == 1


def test_a_full_disk_is_said_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "events.jsonl"

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with EventLog(path) as events:
        with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
            patch.setattr(os, "fsync", full)
            events.emit("checkpoint", step=1)
            events.emit("checkpoint", step=2)
        events.emit("checkpoint", step=3)
    assert caplog.text.count("No space left on device") == 1
    assert read_events(path)[-1]["step"] == 3


def test_a_resumed_run_reads_as_one_that_was_never_interrupted() -> None:
    events = [{"kind": "run_start"}]
    events += [{"kind": "step", "step": step, "loss": step} for step in (1, 2, 3, 4)]
    events += [{"kind": "checkpoint", "step": 2}, {"kind": "run_start"}, {"kind": "resume", "step": 2}]
    events += [{"kind": "step", "step": step, "loss": 10 * step} for step in (3, 4, 5)]
    kept = without_redone(events)
    assert [event["loss"] for event in kept if event["kind"] == "step"] == [1, 2, 30, 40, 50]
    assert [event["kind"] for event in kept].count("run_start") == 2
    assert {"kind": "checkpoint", "step": 2} in kept
