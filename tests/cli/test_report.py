"""``tuner report``: runs side by side, made from what they left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers import no_network
from tuner.cli.main import main


@pytest.fixture(autouse=True)
def in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make_run(name: str, *, rank: int, losses: list[float], deltas: list[float], torch: str = "2.11") -> Path:
    """A run folder as a training leaves it."""
    folder = Path(name)
    (folder / "samples").mkdir(parents=True)
    Image.new("RGB", (40, 20), "teal").save(folder / "samples" / "sheet.png")
    events: list[dict[str, Any]] = [{"kind": "run_start", "run": "hero", "plan": {"total_steps": len(losses)}}]
    for step, loss in enumerate(losses, 1):
        events.append({"kind": "step", "step": step, "loss": loss, "loss_avg": loss, "seconds": 2.0,
                       "images_per_second": float(rank), "memory_bytes": 10**9 * rank})  # fmt: skip
    for step, delta in enumerate(deltas, 1):
        events.append({"kind": "validation", "step": step, "delta": delta, "low": delta - 0.1, "high": delta + 0.1})
    events.append({"kind": "sample", "step": len(losses), "sheet": "samples/sheet.png"})
    events.append({"kind": "run_end", "steps": len(losses), "reason": "finished"})
    lines = [json.dumps({"time": "2026-01-01T00:00:00Z", **event}) for event in events]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "network": {"rank": rank, "type": "lora"},
        "checkpoint": {"dir": name},
        "train": {"components": ["a", "b"]},
    }
    (folder / "config.resolved.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "manifest.json").write_text(json.dumps({"packages": {"torch": torch}}), encoding="utf-8")
    return folder


def test_runs_are_compared_in_numbers_settings_and_versions(capsys: pytest.CaptureFixture[str]) -> None:
    make_run("small", rank=4, losses=[0.5, 0.4], deltas=[-0.2, -0.1])
    make_run("large", rank=8, losses=[0.5, 0.3, 0.25], deltas=[-0.3], torch="2.13")
    assert main(["report", "small", "large", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    small, large = found["runs"]
    assert (small["run"], large["run"]) == ("small", "large")
    assert (small["steps"], small["seconds"], small["loss"], small["state"]) == (2, 4.0, 0.4, "finished")
    assert (small["delta"], small["best"], small["best_step"]) == (-0.1, -0.2, 1)
    assert (large["speed"], large["memory"]) == (8.0, 8 * 10**9)
    assert found["settings"] == {"network.rank": [4, 8]}
    assert found["versions"] == {"packages.torch": ["2.11", "2.13"]}
    assert main(["report", "small", "large"]) == 0
    out = capsys.readouterr().out
    assert "-0.2000 at 1" in out
    assert "network.rank  4      8" in out


def test_the_comparison_is_one_page_that_needs_nothing_else(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    no_network(monkeypatch)
    make_run("one", rank=4, losses=[0.5, 0.4], deltas=[-0.2])
    make_run("two", rank=8, losses=[0.5, 0.3], deltas=[-0.3])
    assert main(["report", "one", "two", "--out", "both.html"]) == 0
    page = Path("both.html").read_text(encoding="utf-8")
    for expected in ("Settings that differ", "network.rank", "Loss, smoothed", "two, step 2", "data:image/"):
        assert expected in page
    assert "<script" not in page
    assert 'src="http' not in page
    assert main(["report", "one", "two", "--out", "both.html"]) == 2
    assert "this file exists" in capsys.readouterr().err


def test_a_single_run_gets_its_page_anew(capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run("one", rank=4, losses=[0.5], deltas=[])
    assert main(["report", "one"]) == 0
    out = capsys.readouterr().out
    assert "held-out" not in out
    assert f"page: {folder / 'report.html'}" in out
    assert (folder / "report.html").is_file()


def test_wrong_use_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "this is not a run folder" in capsys.readouterr().err
    make_run("one", rank=4, losses=[0.5], deltas=[])
    assert main(["report", "one", "--out", "x.html"]) == 2
