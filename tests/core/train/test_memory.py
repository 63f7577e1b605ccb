"""Whole runs with memory services: the same losses, validation, pictures and adapter as without them, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tuner.core.errors import UsageError
from tuner.core.track.events import read_events
from tuner.core.train import trainer
from tuner.core.train.run import train

SERVICES: dict[str, dict[str, Any]] = {
    "streamed": {"swap_blocks": 4},
    "streamed and recomputed": {"swap_blocks": 4, "checkpointing": "block"},
    "streamed, every second block selectively": {
        "swap_blocks": 2, "checkpointing": "selective", "checkpoint_every": 2, "empty_cache_every": 2,
    },
    "attention kept": {"checkpointing": "keep_attention"},
    "inputs offloaded": {"checkpointing": "block", "offload_activations": "async"},
}  # fmt: skip
BUSY: dict[str, Any] = {
    "train__steps": 3,
    "train__accumulate": 2,
    "network__dropout": 0.2,
    "guidance": {"distill": {"scale": 2}},
    "validate": {"split": 0.2, "every": 1},
    "sample": {"prompts": ["a red dog --w 64 --h 64 --s 2 --n grass"], "every": 1},
}
"""Every kind of pass: with gradients, without, guided, several per update."""


def outcome(folder: Path) -> tuple[Any, ...]:
    events = list(read_events(folder / "events.jsonl"))
    numbers = [
        (each["step"], each.get("loss"), each.get("grad_norm"), each.get("adapted"), each.get("base"))
        for each in events
        if each["kind"] in ("step", "validation")
    ]
    pictures = {path.name: path.read_bytes() for path in sorted(folder.rglob("*.png"))}
    tensors = {
        name: value.numpy().tobytes() for name, value in load_file(folder / f"{folder.name}.safetensors").items()
    }
    return numbers, pictures, tensors


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {}


@pytest.mark.parametrize("memory", SERVICES.values(), ids=SERVICES)
def test_a_run_has_the_same_outcome(make_config, six_blocks, tmp_path, plain, memory):
    if not plain:
        train(make_config(model=six_blocks, checkpoint__dir=str(tmp_path / "plain/run"), **BUSY))
        plain["outcome"] = outcome(tmp_path / "plain/run")
    train(make_config(model=six_blocks, checkpoint__dir=str(tmp_path / "saving/run"), memory=memory, **BUSY))
    assert outcome(tmp_path / "saving/run") == plain["outcome"]


@pytest.mark.parametrize(
    "memory", [SERVICES["streamed"], SERVICES["streamed and recomputed"]], ids=["kept", "recomputed"]
)
def test_quantized_blocks_are_streamed_as_their_codes(make_config, six_blocks, tmp_path, memory):
    options = {"model": six_blocks, "quantize": {"denoiser": "int8"}, "train__steps": 3}
    train(make_config(checkpoint__dir=str(tmp_path / "plain/run"), **options))
    train(make_config(checkpoint__dir=str(tmp_path / "saving/run"), memory=memory, **options))
    assert outcome(tmp_path / "saving/run") == outcome(tmp_path / "plain/run")


def test_the_run_streams_the_blocks_it_was_told_to(make_config, six_blocks, streamings):
    train(make_config(model=six_blocks, train__steps=2, memory={"swap_blocks": 4}))
    [streaming] = streamings
    assert len(streaming.blocks) == 4
    assert streaming.loads == 3 + 2 * 2
    assert streaming.late == 1
    # Modulations of all blocks are computed ahead, so their weights are not in the stream.
    inside = {id(tensor) for layout in streaming.layouts for tensor in layout.owners}
    names = [name for name, value in streaming.blocks[0].named_parameters() if id(value) not in inside]
    assert names and all(name.startswith("adaln_modulation_") for name in names)


def test_the_allocator_is_emptied_as_often_as_told(make_config, monkeypatch):
    devices: list[torch.device] = []
    monkeypatch.setattr(trainer, "empty_cache", devices.append)
    train(make_config(train__steps=5, memory={"empty_cache_every": 2}))
    assert len(devices) == 2


def test_more_blocks_than_the_model_can_spare_are_refused_with_the_limit(make_config, six_blocks):
    with pytest.raises(UsageError, match="at most 4 blocks of this model can be in host memory"):
        train(make_config(model=six_blocks, memory={"swap_blocks": 5}))


def test_services_of_a_device_say_that_a_cpu_gains_nothing(make_config, caplog):
    train(make_config(train__steps=1, memory={"checkpointing": "block", "offload_activations": "sync"}))
    assert "memory.offload_activations saves nothing on a device of type cpu" in caplog.text
