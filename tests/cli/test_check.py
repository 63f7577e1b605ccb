"""``tuner check``: everything that is wrong is listed at once, before any weight is read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Project
from tests.core.registry.toys import Site
from tuner.cli.main import main


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["check", *arguments]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    return streams.err


def test_a_sound_project_is_summarised(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", project.config()]) == 0
    out = capsys.readouterr().out
    assert "model: cubist small" in out
    assert "4 in all" in out
    assert "no problems found" in out
    assert "toy_cubist.hooks" not in sys.modules


def test_a_script_reads_the_same_as_json(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", project.config(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["plan"]["images"], found["plan"]["total_steps"]) == (True, 3, 4)
    assert main(["check", project.config(train={"steps": 0}), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert [each["what"] for each in found["problems"]] == ["train.steps: expected a number at least 1, got 0"]


def test_problems_of_files_images_captions_and_folders_are_listed_together(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    (project.folder / "images" / "0.png").write_bytes(b"no picture")
    (project.folder / "images" / "1.txt").unlink()
    (project.folder / "weights.safetensors").write_bytes(b"\x00" * 4)
    (project.folder / "out").mkdir()
    (project.folder / "out" / "old.txt").touch()
    message = refusal(capsys, project.config(extensions=["ghost"]))
    for expected in (
        "there is no extension plugin 'ghost'",
        "weights.safetensors",
        "the run folder is not empty",
        "0.png",
        "1.png",
    ):
        assert expected in message


def test_contradicting_settings_and_files_that_do_not_fit_are_told_together(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    (project.folder / "weights.safetensors").write_bytes(b"\x00" * 4)
    message = refusal(capsys, project.config(log={"dir": "x"}, optimizer={"name": "adamww"}))
    for expected in ("3 problems", "log.dir: has no effect", "weights.safetensors", "did you mean 'adamw'?"):
        assert expected in message


def test_a_dry_run_is_a_check(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", project.config(), "--dry-run"]) == 0
    assert "no problems found" in capsys.readouterr().out
    assert not (project.folder / "out").exists()


def test_a_used_run_folder_is_fine_when_resuming(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    (project.folder / "out").mkdir()
    (project.folder / "out" / "old.txt").touch()
    assert main(["train", project.config(), "--dry-run", "--resume"]) == 0


def test_weights_of_another_model_are_named(project: Project, site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.model("fauvist")
    message = refusal(capsys, project.config(model={"family": "fauvist"}))
    assert "these weights are not of the model 'fauvist'" in message
    assert "use --model cubist" in message


def test_an_empty_folder_is_a_problem(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (project.folder / "images").iterdir():
        file.unlink()
    assert "images" in refusal(capsys, project.config())


def test_a_file_where_a_folder_should_be_is_a_problem(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    (project.folder / "taken").touch()
    message = refusal(capsys, project.config(checkpoint={"dir": "taken/run"}))
    assert "a file is in the way of a folder" in message


def test_captions_over_the_token_limit_are_counted(
    project: Project, site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin = site.folder / "toy_cubist" / "plugin.py"
    text = plugin.read_text(encoding="utf-8")
    plugin.write_text(text.replace("key_maps=", 'count_tokens="toy_cubist.facts:count", key_maps='), encoding="utf-8")
    facts = site.folder / "toy_cubist" / "facts.py"
    text = facts.read_text(encoding="utf-8").replace("max_tokens={}", 'max_tokens={"words": 3}')
    count = "def count(config):\n    return {'words': lambda texts: [len(text.split()) for text in texts]}\n"
    facts.write_text(text + count, encoding="utf-8")
    (project.folder / "images" / "1.txt").write_text("one two three four five", encoding="utf-8")
    assert main(["check", project.config()]) == 0
    err = capsys.readouterr().err
    assert "captions with more than 3 words tokens are cut, here 1: 5: one two three four five" in err


def test_too_little_space_for_the_cache_is_a_problem(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")  # the shape that shutil returns
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    assert "there is not enough space for the cache" in refusal(capsys, project.config())


def test_environment_variables_are_settings(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNER__TRAIN__STEPZ", "3")
    message = refusal(capsys, project.config())
    assert "unknown key 'stepz' in train\n  at: environment variable TUNER__TRAIN__STEPZ, train.stepz" in message


@pytest.fixture(autouse=True)
def in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_check_names_the_next_command(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", project.config(), "--set", "train.seed=5"]) == 0
    assert capsys.readouterr().out.endswith(f"next: tuner train {project.config()} --set train.seed=5\n")
