"""The tutorial of the wizard: its answers are run as they stand, on tiny files under the names of the page."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, blocks_of, make_tutorial_folder
from tuner.cli.main import main
from tuner.core.config.jsonc import parse
from tuner.core.wizard.questions import Interview

PAGE = ROOT / "docs" / "tutorials" / "wizard.md"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    make_tutorial_folder(folder, 1024, ["1girl, hero, red scarf"] * 2)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TUNER_CACHE_DIR", str(tmp_path / "user-cache"))
    return folder


def test_the_answers_of_the_page_write_and_change_a_configuration(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, str] = {}
    ask = Interview.ask
    monkeypatch.setattr(
        Interview, "ask", lambda self, question: (asked.update({question.id: question.text}), ask(self, question))[1]
    )
    steps = []
    for block in blocks_of(PAGE):
        if block.title:
            (work / block.title).write_text(block.text, encoding="utf-8")
        for line in block.text.splitlines() if block.language == "console" else []:
            words = shlex.split(line)[1:]
            if "--answers" in words:
                assert main(words) == 0
                steps.append(parse((work / "config.json").read_text(encoding="utf-8"), "config.json").value)
                assert main(["check", "config.json"]) == 0
    first, second = steps
    assert first["model"]["text_encoders"] == {"qwen3": {"path": "Qwen3-0.6B"}}
    assert (first["network"]["rank"], second["network"]["rank"], second["train"]["steps"]) == (16, 16, 500)
    assert second["sample"]["prompts"] == ["hero on a boat, watercolour"]
    assert "+++ config.json (new)" in capsys.readouterr().out
    table = {
        line.split("|")[1].strip() for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")
    }
    shown = [question for question in asked.values() if question in table]
    assert len(shown) >= 8, "the table of the page calls the questions by other names"
