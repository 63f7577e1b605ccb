"""The pages of the everyday tools: every command on them is run, in the folder of the tutorial."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.cli.test_report import make_run
from tests.docs.pages import ROOT, blocks_of
from tests.docs.test_how_to import config, project  # noqa: F401  # the tutorial's folder with a tiny model
from tuner.cli.main import main
from tuner.core.lifecycle import machine

PAGES = (
    "explain-settings", "inspect-your-data", "look-after-the-cache", "find-faults", "train-several-runs",
    "complete-commands",
)  # fmt: skip


def commands(page: str) -> list[list[str]]:
    blocks = [block for block in blocks_of(ROOT / "docs" / "how-to" / f"{page}.md") if block.language == "console"]
    lines = [line for block in blocks for line in block.text.splitlines()]
    return [shlex.split(line.removeprefix("$ tuner ")) for line in lines if line.startswith("$ tuner ")]


@pytest.fixture
def prepared(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Configurations and earlier runs under the names that the pages use, and no slow imports of extras."""
    (project / "other.json").write_text(json.dumps(config(network={"rank": 4})), encoding="utf-8")
    for name in ("first", "second", "third"):
        document = config(checkpoint={"dir": f"out/{name}"}, train={"steps": 1})
        (project / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
        make_run(f"out/{name}", rank=4, losses=[0.5], deltas=[-0.1])
    make_run("out/hero", rank=4, losses=[0.5], deltas=[])
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    # What a run leaves that finished; the queue itself has its own tests.
    monkeypatch.setattr("tuner.core.train.queue.PROGRAM", ("true",))


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_page_runs(page: str, prepared: None, capsys: pytest.CaptureFixture[str]) -> None:
    found = commands(page)
    assert found
    if page == "look-after-the-cache":
        assert main(["cache", "config.json"]) == 0
    for words in found:
        code = main(words)
        streams = capsys.readouterr()
        assert code == 0, (words, streams.err)
        assert streams.out
