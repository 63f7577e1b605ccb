"""``tuner train a.json b.json``: one process per run, a summary, and exit code 3 when some failed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.core.train.conftest import cache_dir, make_config, model_files, pictures  # noqa: F401  # a tiny real model
from tuner.cli.main import main
from tuner.core.train.queue import QueuedRun, run_queue

Write = Callable[..., str]

PROGRAM = """
import json, os, signal, sys
from pathlib import Path
name = Path(sys.argv[2]).stem
folder = Path(sys.argv[2]).with_suffix("")
folder.mkdir(exist_ok=True)
def end(reason):
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "run_end", "steps": 5, "reason": reason}) + "\\n")
if name == "signalled":
    def stop(*_):
        end("interrupted")
        sys.exit(0)
    signal.signal(signal.SIGTERM, stop)
    os.kill(os.getppid(), signal.SIGTERM)
    signal.pause()
if name == "bad":
    sys.exit(2)
(folder / "config.resolved.json").write_text(json.dumps({"train": {"steps": 5, "epochs": None}}))
(folder / "arguments.json").write_text(json.dumps(sys.argv[1:]))
end("finished")
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that leaves what a run leaves, at once."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM, encoding="utf-8")
    monkeypatch.setattr("tuner.core.train.queue.PROGRAM", (sys.executable, str(script)))


@pytest.fixture
def queue(tmp_path: Path, stand_in: None) -> Callable[..., list[tuple[str, str, int | None, int | None]]]:
    """A function from names of runs to (name, result, exit code, steps) of each, with a stand-in for the program."""

    def run(*names: str, **options: Any) -> list[tuple[str, str, int | None, int | None]]:
        runs = [
            QueuedRun(config=str(tmp_path / f"{name}.json"), folder=tmp_path / name, length=(5, None)) for name in names
        ]
        options = {"keep_going": False} | options
        rows = run_queue(runs, ["--set", "train.seed=1"], **options)
        return [(Path(row.config).stem, row.result, row.code, row.steps) for row in rows]

    return run


def test_a_failure_ends_the_queue_unless_it_keeps_going(queue: Any, tmp_path: Path) -> None:
    assert queue("one", "bad", "two") == [
        ("one", "finished", 0, 5),
        ("bad", "failed", 2, None),
        ("two", "not started", None, None),
    ]
    assert queue("bad", "two", keep_going=True) == [("bad", "failed", 2, None), ("two", "finished", 0, 5)]
    passed = json.loads((tmp_path / "two" / "arguments.json").read_text(encoding="utf-8"))
    assert passed == ["train", str(tmp_path / "two.json"), "--set", "train.seed=1"]


def test_resuming_passes_over_what_finished(queue: Any, tmp_path: Path) -> None:
    assert queue("one") == [("one", "finished", 0, 5)]
    assert queue("one", "two", resume=True) == [("one", "finished", None, 5), ("two", "finished", 0, 5)]
    passed = json.loads((tmp_path / "two" / "arguments.json").read_text(encoding="utf-8"))
    assert passed[-1] == "--resume"


def test_a_signal_reaches_the_run_and_ends_the_queue(queue: Any) -> None:
    assert queue("signalled", "one", keep_going=True) == [
        ("signalled", "interrupted", 0, 5),
        ("one", "not started", None, None),
    ]


@pytest.fixture
def write(make_config: Callable[..., dict[str, Any]], tmp_path: Path) -> Write:  # noqa: F811
    def to_file(name: str, **changes: Any) -> str:
        path = tmp_path / f"{name}.json"
        changes = {"checkpoint__dir": str(tmp_path / name), "train__steps": 1} | changes
        path.write_text(json.dumps(make_config(**changes)), encoding="utf-8")
        return str(path)

    return to_file


def test_a_failure_makes_the_exit_code_3_and_the_table_tells_which(
    stand_in: None, write: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    bad, good = write("bad"), write("good", train__steps=5)
    assert main(["train", bad, good, "--keep-going"]) == 3
    rows = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert [bad, "failed", "2", "-"] in [row[:4] for row in rows]
    assert [good, "finished", "0", "5"] in [row[:4] for row in rows]
    assert main(["train", bad, good, "--json"]) == 3
    assert [row["result"] for row in json.loads(capfd.readouterr().out)] == ["failed", "not started"]


def test_real_runs_have_their_own_processes_and_those_that_finished_are_passed_over(
    write: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = write("first"), write("second")
    assert main(["train", first, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["steps"], found["reason"], len(found["files"])) == (1, "finished", 1)
    assert main(["train", first, second, "--set", "train.seed=5", "--json", "--resume"]) == 0
    rows = json.loads(capfd.readouterr().out)
    assert [(row["result"], row["code"], row["steps"]) for row in rows] == [("finished", None, 1), ("finished", 0, 1)]
    resolved = json.loads((tmp_path / "second" / "config.resolved.json").read_text(encoding="utf-8"))
    assert resolved["train"]["seed"] == 5


def test_what_cannot_work_is_told_before_the_first_run(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, wrong = write("good"), write("wrong", train__stepz=3)
    assert main(["train", good, wrong, "--keep-going"]) == 2
    assert "unknown key 'stepz'" in capsys.readouterr().err
    twin = write("twin", checkpoint__dir=str(tmp_path / "good"))
    assert main(["train", good, twin]) == 2
    assert "two runs of the queue have the same run folder" in capsys.readouterr().err
    assert main(["train", good, "--keep-going"]) == 2
    assert main(["train", good, twin, "--dry-run"]) == 2
    assert not (tmp_path / "good").exists()
