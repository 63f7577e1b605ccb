"""``tuner configure``: driven at a real pseudo-terminal, by a file of answers, and on a configuration that exists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.runs import make_pictures
from tests.fixtures.terminal import Terminal
from tests.fixtures.tiny_anima import make_tiny_anima
from tests.fixtures.tiny_flux import make_tiny_flux
from tuner.cli.main import main
from tuner.core.config.jsonc import parse

LINES = {"TERM": "dumb"}
"""A terminal without cursor keys, where plain lines are asked for."""
TOKENIZERS = {
    "anima": {"model.tokenizers.t5": "anima/t5"},
    "flux": {"model.tokenizers.clip_l": "flux/clip_tokenizer", "model.tokenizers.t5": "flux/t5_tokenizer"},
}
MAKERS = {"anima": make_tiny_anima, "flux": make_tiny_flux}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each of two families."""
    folder = tmp_path_factory.mktemp("models")
    for family, make in MAKERS.items():
        make(folder / family)
    return folder


@pytest.fixture
def work(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with freshly made pictures, and the models."""
    for family in MAKERS:
        (tmp_path / family).symlink_to(models / family)
    (tmp_path / "pictures").mkdir()
    make_pictures(tmp_path / "pictures")
    monkeypatch.setenv("TUNER_CACHE_DIR", str(tmp_path / "user"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answers(family: str, **other: Any) -> dict[str, Any]:
    return {
        "models": family,
        **TOKENIZERS[family],
        "pictures": "pictures",
        "trigger": "mila",
        "goal": "character",
        "size": 64,
        "card": "cpu",
        "prompt": "-",
        **other,
    }


def configure(given: dict[str, Any], target: str = "config.json") -> int:
    Path("answers.json").write_text(json.dumps(given), encoding="utf-8")
    return main(["configure", target, "--answers", "answers.json"])


def read(path: str = "config.json") -> Any:
    return parse(Path(path).read_text(encoding="utf-8"), path).value


def trains(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", path]) == 0
    assert "no problems found" in capsys.readouterr().out
    assert main(["train", path, "--set", "train.steps=1", "--set", "data.workers.load=0"]) == 0


# --- at a terminal ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MAKERS)
def test_a_person_answers_on_a_terminal_and_the_file_trains(
    family: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Terminal("configure", folder=work, environment=LINES) as terminal:
        terminal.answer("Which file", "")
        terminal.answer("Where are your model files?", "nowhere")
        terminal.expect("no such file or folder")
        terminal.answer("Where are your model files?", family)
        for name, place in TOKENIZERS[family].items():
            terminal.answer(f"Where is the {name.rsplit('.')[-1]} tokenizer", place)
        terminal.answer("In which folder are your pictures?", "picture")
        terminal.expect("there is no such folder")
        terminal.answer("In which folder are your pictures?", "pictures")
        terminal.expect("4 pictures, 128 x 72 to 96 x 96; 4 with a caption")
        terminal.answer("Which word", "mila")
        terminal.answer("What is it to learn?", "1")
        terminal.answer("At which size", "64")
        terminal.answer("Which card", "cpu")
        offered = terminal.answer("Which of them?", "quick")
        assert [line.split(":")[0].strip() for line in offered.splitlines() if "steps; needs" in line] == [
            "quick", "balanced", "thorough"
        ]  # fmt: skip
        terminal.expect("plan for cpu:")
        terminal.answer("Which prompt", "-")
        terminal.answer("What is the training to be called?", "")
        assert not (work / "config.json").exists()
        terminal.answer("Write this file?", "y")
        assert terminal.end() == 0
        assert f"next: tuner check {work / 'config.json'}" in terminal.screen
        assert f"then: tuner train {work / 'config.json'}" in terminal.screen
    written = read()
    assert (written["model"]["family"], written["network"]["rank"]) == (family, 8)
    assert written["data"]["sets"][0]["sources"] == [
        {"id": "mila", "path": "pictures", "captions": {"prefix": "mila,"}}
    ]
    trains("config.json", capsys)
    assert (work / "out" / "mila" / "mila.safetensors").is_file()


def test_ctrl_c_leaves_everything_as_it_was(work: Path) -> None:
    before = sorted(path.name for path in work.iterdir())
    with Terminal("configure", "new.json", folder=work, environment=LINES) as terminal:
        terminal.answer("Where are your model files?", "anima")
        terminal.expect("tokenizer")
        terminal.expect("> ")
        terminal.type("\x03")
        assert terminal.end() == 130
    assert sorted(path.name for path in work.iterdir()) == before
