"""Configurations and commands in the documentation are accepted by the program that it documents."""

from __future__ import annotations

import shlex

import pytest

from tests.docs.pages import Block, blocks
from tuner.cli.main import COMMANDS, command_parser
from tuner.core.config.document import merged
from tuner.core.config.jsonc import parse
from tuner.core.errors import UsageError
from tuner.core.registry import Catalog, typed_config

# What a page leaves out because it shows a part. A part with sections of its own wins over these, key by key.
BASE = {
    "model": {"family": "anima", "path": "anima.safetensors"},
    "data": {"sets": [{"sources": [{"id": "hero", "path": "images/hero"}]}]},
    "optimizer": {"lr": 1e-4},
    "train": {"steps": 2000},
    "checkpoint": {"dir": "out/hero"},
}
CONFIGS = blocks("json")


def commands() -> list:
    found = []
    for block in blocks("console"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words and words[0] == "tuner":
                found.append(pytest.param(words[1:], id=f"{block.page}: {' '.join(words)}"))
    return found


def test_there_is_something_to_check() -> None:
    assert len(CONFIGS) > 15
    assert len(commands()) > 10


@pytest.mark.parametrize("block", CONFIGS, ids=lambda block: block.name)
def test_a_configuration_passes_the_schema(block: Block) -> None:
    document = parse(block.text, block.name).value
    typed_config(merged(BASE, document), Catalog())


@pytest.mark.parametrize("words", commands())
def test_a_command_is_accepted_by_its_parser(words: list[str]) -> None:
    command, *rest = words
    if command in ("--help", "--version") or rest == ["--help"]:
        return
    assert command in COMMANDS
    command_parser(command).parse_args(rest)


def test_a_wrong_command_would_be_noticed() -> None:
    with pytest.raises(UsageError, match="unrecognized arguments"):
        command_parser("train").parse_args(["config.json", "--ghost"])
