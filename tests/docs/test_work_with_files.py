"""Every command of the page about files is run, in its order, on tiny files under the names that it uses."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.docs.pages import ROOT, blocks_of
from tests.fixtures.tiny_parts import clip_shapes, random_tensors
from tests.helpers import golden_path
from tuner.cli.main import main
from tuner.core.adapters.stripping import LEVELS

PAGE = ROOT / "docs" / "how-to" / "work-with-files.md"
FILES = {
    "flux1-dev.safetensors": "flux/dev_bfl.safetensors",
    "hero.safetensors": "flux/lora_sdscripts.safetensors",
    "style.safetensors": "flux/lora_split_sdscripts.safetensors",
}


def commands() -> list[list[str]]:
    blocks = [block for block in blocks_of(PAGE) if block.language == "console"]
    lines = [line for block in blocks for line in block.text.replace("\\\n", " ").splitlines()]
    return [shlex.split(line) for line in lines]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, source in FILES.items():
        (tmp_path / name).write_bytes(golden_path(source).read_bytes())
    encoder = random_tensors(clip_shapes(width=20, layers=1, projection=None), torch.Generator().manual_seed(0))
    save_file(encoder, tmp_path / "clip_l.safetensors")
    tensors = load_file(tmp_path / "hero.safetensors")
    rows, width = encoder["text_model.encoder.layers.0.mlp.fc1.weight"].shape
    name = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = torch.ones(1, width), torch.ones(rows, 1)
    save_file(tensors, tmp_path / "with-text.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_runs_from_top_to_bottom(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for words in commands():
        assert words[0] == "tuner"
        assert main(words[1:]) == 0, words
    assert all(path.read_bytes() == data for path, data in before.items())
    assert (folder / "merged_clip_l.safetensors").is_file()
    again, base = (load_file(folder / f"flux1-dev{name}.safetensors") for name in ("-again", ""))
    assert all(torch.equal(value, again[name]) for name, value in base.items())


def test_the_page_lists_what_the_commands_offer() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert {words[1] for words in commands()} == {"inspect", "merge", "extract", "resize", "convert"}
    for level, meaning in LEVELS.items():
        assert f"| `{level}` | {meaning.split(';')[0]}" in text
