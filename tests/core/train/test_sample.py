"""`tuner sample`: the pictures of a run again, bit by bit; grids; adapters of every part; and what does not fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tuner.cli.main import main
from tuner.core.errors import UsageError
from tuner.core.train import previews, sample
from tuner.core.train.pictures import read_settings
from tuner.core.train.run import train

PROMPT = "a red dog --w 64 --h 64 --s 2 --l 3 --n grass"
ONE_STEP = {"train__steps": 2, "optimizer__lr": 2e-2}


@contextmanager
def recorded() -> Iterator[list[Tensor]]:
    """The latents of every picture that is drawn, in a training or not."""
    found: list[Tensor] = []
    original = sample.draw_latents

    def draw(*args: Any, **kwargs: Any) -> Tensor:
        found.append(original(*args, **kwargs))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "draw_latents", draw)
        patch.setattr(previews, "draw_latents", draw)
        yield found


def run(*arguments: str | Path) -> list[Tensor]:
    """`tuner sample` with these arguments; returns the latents."""
    with recorded() as latents:
        assert main(["sample", *map(str, arguments)]) == 0
    return latents


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


RUNS: dict[str, dict[str, Any]] = {
    "an adapter": {},
    "an adapter on everything, another kind": {
        "train__components": ["denoiser", "qwen3", "llm_adapter"], "network": {"type": "dora", "rank": 2},
    },
    "an encoder whose output the frozen adapter reads": {"train__components": ["denoiser", "qwen3"]},
    "texts encoded in every step": {"network": {"rank": 2, "alpha": 4.0}, "cache__text": "off"},
    "a quantized base": {"quantize": {"denoiser": "int8", "activations": "int8", "parity": {"loss": 1, "gradient": 1}}},
    "an average": {"ema": {"enabled": True, "decay": 0.5}, "sample": {"prompts": [PROMPT], "weights": "ema"}},
    "bfloat16": {"precision": {"compute": "bf16"}},
    "a whole model": {"train__mode": "full", "network": {}, "optimizer__lr": 1e-3},
}  # fmt: skip


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_a_run_draws_the_picture_of_its_training_again_bit_by_bit(make_config, tmp_path, changes):
    changes = {**ONE_STEP, "sample": {"prompts": [PROMPT]}, **changes}
    with recorded() as before:
        train(make_config(**changes))
    base, trained = before
    ema = ["--ema"] if "ema" in changes else []
    [again] = run(tmp_path / "out", *ema)
    assert torch.equal(again, trained)
    assert not torch.equal(base, trained)
    [preview] = (tmp_path / "out/samples/step-000002").glob("0*.png")
    with Image.open(preview) as one, Image.open(tmp_path / "samples/001/000.png") as other:
        assert one.tobytes() == other.tobytes()
    [repeated] = run(tmp_path / "out", "--like", preview, "--out", tmp_path / "again")
    assert torch.equal(repeated, trained)
    [of_base] = (tmp_path / "out/samples").glob("base-*/000.png")
    assert torch.equal(run(tmp_path / "out", "--like", of_base)[0], base)
