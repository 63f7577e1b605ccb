"""The longer examples of the how-to pages are run as they stand, on a tiny model."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import tuner
from tests.docs.pages import ROOT, blocks_of, make_tutorial_folder
from tuner.cli.main import main
from tuner.core.train.prompt_files import read_prompt_file


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the tutorial: tiny files under the names that the pages use, and two steps of training."""
    folder = tmp_path / "work"
    make_tutorial_folder(folder, 64, ["a red dog 0", "a red dog 1"])
    (folder / "config.json").write_text(json.dumps(config()), encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TUNER_CACHE_DIR", str(tmp_path / "user-cache"))
    return folder


def config(**sections: Any) -> dict[str, Any]:
    return {
        "model": {
            "family": "anima",
            "path": "anima.safetensors",
            "text_encoders": {"qwen3": {"path": "Qwen3-0.6B"}},
            "vae": {"path": "qwen_image_vae.safetensors"},
        },
        "data": {
            "defaults": {"resolution": 64, "buckets": {"enabled": False}},
            "sets": [{"sources": [{"id": "hero", "path": "images/hero"}]}],
            "workers": {"scan": 0, "cache": 0, "load": 0},
        },
        "network": {"rank": 2},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 2},
        "precision": {"compute": "fp32", "text_encoder": {"qwen3": "fp32", "llm_adapter": "fp32"}},
        "checkpoint": {"dir": "out/hero"},
        "log": {"plain": True},
        **sections,
    }


def test_the_python_page_runs_from_top_to_bottom(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for block in blocks_of(ROOT / "docs" / "how-to" / "use-from-python.md"):
        if block.language == "python":
            exec(compile(block.text, block.name, "exec"), names)
    printed = capsys.readouterr().out
    assert "finished 2" in printed
    assert "unknown key 'trian'" in printed
    assert names["picture"].shape == (1, 3, 256, 256)
    assert [step for step, _ in names["losses"]] == [1, 2]


def test_every_command_of_the_page_about_pictures_draws_some(project: Path) -> None:
    prompts = ["a red dog on grass --l 1", "a red dog --l 1", "a red dog in snow --n blurry --l 5"]
    small = {"size": 64, "steps": 2, "cfg": 2, "prompts": prompts}
    trained = config(sample=small, ema={"enabled": True}, checkpoint={"dir": "out/hero", "every": 1})
    (project / "config.json").write_text(json.dumps(trained), encoding="utf-8")
    tuner.train("config.json")
    (project / "style.safetensors").write_bytes((project / "out/hero/hero.safetensors").read_bytes())
    (project / "prompts.txt").write_text("a red dog --l 3 --n blurry\n", encoding="utf-8")
    smaller = {"1024x768": "96x64", "30": "3", "1000": "1"}
    drawn = []
    for block in blocks_of(ROOT / "docs" / "how-to" / "sample-pictures.md"):
        if block.language == "console":
            for line in block.text.replace("\\\n", " ").splitlines():
                words = [smaller.get(word, word) for word in shlex.split(line.removeprefix("$ "))]
                if "--model" in words:
                    words += ["--size", "64x64", "--steps", "2"]
                assert main(words[1:]) == 0, line
                drawn.append(sorted((project / "samples").iterdir())[-1])
    counts = [len(list(folder.glob("0*.png"))) for folder in drawn]
    assert counts == [1, 1, 1, 12, 1, 1, 1, 1, 3, 1]
    first = (drawn[0] / "000.png").read_bytes()
    assert (drawn[7] / "000.png").read_bytes() == first
    assert (drawn[1] / "000.png").read_bytes() != first


def test_the_prompt_files_of_the_page_hold_the_same_prompts(project: Path) -> None:
    read = {}
    for block in blocks_of(ROOT / "docs" / "how-to" / "sample-pictures.md"):
        if block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
            read[block.title] = read_prompt_file(Path(block.title))
    assert set(read) == {"prompts.txt", "prompts.toml", "prompts.json"}
    assert {tuple(each["prompt"] for each in entries) for entries in read.values()} == {
        ("a red dog on grass", "a red dog in snow")
    }


def test_the_extension_of_the_page_keeps_its_diary(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for name in [name for name in sys.modules if name.startswith("tuner_diary")]:
        monkeypatch.delitem(sys.modules, name)
    summary = tuner.train(config(extensions=["diary"]))
    told = capsys.readouterr().err
    for line in ("a run of anima begins", "step 2 saved as", "finished after 2 steps"):
        assert f"diary: {line}" in told
    with safe_open(summary.files[0], framework="pt") as file:
        assert file.metadata()["diary_note"] == "trained with a diary"
    hooks = sys.modules["tuner_diary.hooks"]
    assert set(hooks.extra_metrics(2)) == {"diary/steps_per_minute"}


def install(site: Path) -> None:
    """Put the files of the page where an installer would, with the entry points of its pyproject.toml."""
    import tomllib

    files = {block.title: block.text for block in blocks_of(ROOT / "docs" / "how-to" / "write-an-extension.md")}
    project = tomllib.loads(files["pyproject.toml"])["project"]
    package = site / "tuner_diary"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for title, text in files.items():
        if title.startswith("src/"):
            (site / title.removeprefix("src/")).write_text(text, encoding="utf-8")
    info = site / f"tuner_diary-{project['version']}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\nRequires-Dist: tuner\n"
    (info / "METADATA").write_text(metadata, encoding="utf-8")
    (info / "RECORD").touch()
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(groups), encoding="utf-8")
