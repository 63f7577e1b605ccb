"""Whole runs that keep an average: it follows the training without touching it, is saved, drawn and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from tests.core.train.test_modes import losses, stop_after
from tuner.core.errors import UsageError
from tuner.core.track.events import read_events
from tuner.core.train.run import train

PROMPT = "a red dog --w 64 --h 64 --s 1 --l 1"
EMA = {"enabled": True, "decay": 0.7}
TOGETHER: dict[str, dict[str, Any]] = {
    "plain": {"ema": EMA},
    "with a warm-up, rarely": {"ema": {**EMA, "warmup": "updates", "every": 2, "device": "accelerator"}},
    "bfloat16 weights": {"ema": EMA, "precision": {"compute": "bf16", "adapter": "bf16"}},
    "with feedback": {"ema": {"enabled": True, "decay": 0.95, "feedback": True, "multiplier": 1.01}},
    "frozen parts": {"ema": EMA, "optimizer": {"lr": 2e-3, "lr_rules": [{"match": r".*blocks\.0\..*", "lr": 0}]}},
}


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def kinds(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(folder / "events.jsonl") if event["kind"] == kind]


def test_an_average_changes_nothing_about_the_training(make_config, tmp_path):
    looks = {"sample": {"prompts": [PROMPT], "every": 2}, "validate": {"split": 0.2, "every": 2}}
    plain, averaged = tmp_path / "plain", tmp_path / "averaged"
    train(make_config(checkpoint__dir=str(plain), **looks))
    looks = {"sample": {**looks["sample"], "weights": "both"}, "validate": {**looks["validate"], "weights": "both"}}
    summary = train(make_config(checkpoint__dir=str(averaged), ema=EMA, **looks))
    assert losses(averaged) == losses(plain)
    raw, ema = load_file(averaged / "averaged.safetensors"), load_file(averaged / "ema_averaged.safetensors")
    before = load_file(plain / "plain.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in raw.items())
    assert set(ema) == set(raw) and any(not torch.equal(value, raw[name]) for name, value in ema.items())
    assert [path.name for path in summary.files] == ["averaged.safetensors", "ema_averaged.safetensors"]
    assert kinds(averaged, "validation")[0]["adapted"] == kinds(plain, "validation")[0]["adapted"]


def test_the_saved_average_is_that_of_the_saved_weights(make_config, tmp_path):
    """With decay 0.5 from the first update on it can be computed from the checkpoints; up starts at zero."""
    train(make_config(ema={"enabled": True, "decay": 0.5}, checkpoint__every=1, train__steps=4))
    expected: dict[str, torch.Tensor] = {}
    for step in range(1, 5):
        folder = tmp_path / f"out/checkpoints/step-{step:06d}"
        raw = load_file(folder / f"out-step{step:08d}.safetensors")
        ema = load_file(folder / f"ema_out-step{step:08d}.safetensors")
        for name, value in raw.items():
            if "lora_B" in name:
                expected[name] = 0.5 * expected.get(name, torch.zeros_like(value)) + 0.5 * value
                torch.testing.assert_close(ema[name], expected[name])
    assert expected
    assert torch.equal(ema[name], load_file(tmp_path / "out/ema_out.safetensors")[name])


@pytest.mark.parametrize("changes", TOGETHER.values(), ids=TOGETHER)
def test_stopped_twice_it_goes_on_exactly(make_config, tmp_path, changes):
    options = {"train__steps": 6, **changes}
    train(make_config(checkpoint__dir=str(tmp_path / "whole/run"), **options))
    config = make_config(checkpoint__dir=str(tmp_path / "parts/run"), **options)
    for stop in (1, 4):
        stop_after(config, stop)
    train(config, resume="auto")
    assert losses(tmp_path / "parts/run") == losses(tmp_path / "whole/run")
    for name in ("run.safetensors", "ema_run.safetensors"):
        assert (tmp_path / "parts/run" / name).read_bytes() == (tmp_path / "whole/run" / name).read_bytes()


def test_both_kinds_are_drawn_side_by_side(make_config, tmp_path):
    sample = {"prompts": [PROMPT], "at_start": True, "every": 3, "weights": "both"}
    train(make_config(ema=EMA, sample=sample, optimizer__lr=2e-2, train__steps=6))
    folder = tmp_path / "out/samples"
    assert [path.name for path in sorted((folder / "step-000000").glob("0*"))] == ["000.png"]
    for step in (3, 6):
        raw, ema = (folder / f"step-{step:06d}" / name for name in ("000.png", "000_ema.png"))
        assert raw.read_bytes() != ema.read_bytes()
    widths = []
    for step in (0, 3, 6):
        with Image.open(folder / f"step-{step:06d}/sheet.png") as sheet:
            widths.append(sheet.width)
    column = (widths[1] - widths[0]) / 2
    assert widths == [widths[0] + 2 * column * number for number in range(3)]
    assert kinds(tmp_path / "out", "sample")[-1]["images"] == [
        "samples/step-000006/000.png", "samples/step-000006/000_ema.png",
    ]  # fmt: skip


def test_the_average_alone_is_drawn_and_measured(make_config, tmp_path):
    options = {"ema": EMA, "train__steps": 3, "optimizer__lr": 2e-2}
    sample, measure = {"prompts": [PROMPT], "at_start": True}, {"split": 0.2, "every": None}
    train(
        make_config(
            checkpoint__dir=str(tmp_path / "both"), **options,
            sample={**sample, "weights": "both"}, validate={**measure, "weights": "both"},
        )
    )  # fmt: skip
    train(
        make_config(
            checkpoint__dir=str(tmp_path / "ema"), **options,
            sample={**sample, "weights": "ema"}, validate={**measure, "weights": "ema"},
        )
    )  # fmt: skip
    pictures = [path.relative_to(tmp_path / "ema/samples").as_posix() for path in (tmp_path / "ema").rglob("0*.png")]
    assert sorted(name for name in pictures if name.startswith("step")) == [
        "step-000000/000.png",
        "step-000003/000_ema.png",
    ]
    one, other = (tmp_path / name / "samples/step-000003/000_ema.png" for name in ("both", "ema"))
    assert one.read_bytes() == other.read_bytes()
    assert not kinds(tmp_path / "ema", "validation")
    [alone], [beside] = kinds(tmp_path / "ema", "validation_ema"), kinds(tmp_path / "both", "validation_ema")
    assert alone["adapted"] == beside["adapted"] != kinds(tmp_path / "both", "validation")[0]["adapted"]
    assert "averaged weights" in (tmp_path / "both/report.html").read_text(encoding="utf-8")


def test_files_say_what_they_hold(make_config, tmp_path):
    train(make_config(ema={**EMA, "warmup": "updates"}, train__steps=2))
    raw, ema = metadata(tmp_path / "out/out.safetensors"), metadata(tmp_path / "out/ema_out.safetensors")
    assert (raw["ss_ema_weights"], ema["ss_ema_weights"]) == ("False", "True")
    assert (ema["ss_ema_decay"], ema["ss_ema_warmup"], ema["ss_ema_every"]) == ("0.7", "updates", "1")


def test_no_file_of_the_average_is_written_when_it_is_not_wanted(make_config, tmp_path):
    train(make_config(
        ema=EMA, checkpoint__save_ema=False, train__steps=2, validate={"split": 0.2, "every": None, "weights": "ema"}
    ))  # fmt: skip
    assert [path.name for path in tmp_path.rglob("*.safetensors") if path.name.startswith("ema_")] == []


@pytest.mark.parametrize("key_format", ["comfyui", "sd-scripts"])
def test_the_average_can_start_from_a_file(make_config, tmp_path, key_format):
    """With a decay next to 1 the average stays where it began, in spite of the training and of a resume."""
    network = {"rank": 4, "alpha": 6.0}
    options = {"checkpoint__format": key_format, "network": network}
    train(make_config(checkpoint__dir=str(tmp_path / "first"), optimizer__lr=2e-2, **options))
    start = tmp_path / "first/first.safetensors"
    ema = {"enabled": True, "decay": 0.9999999, "init_from": str(start)}
    config = make_config(checkpoint__dir=str(tmp_path / "second"), ema=ema, train__steps=4, **options)
    stop_after(config, 2)
    train(config, resume="auto")
    begun, kept = load_file(start), load_file(tmp_path / "second/ema_second.safetensors")
    assert all(torch.allclose(kept[name], value, atol=1e-5) for name, value in begun.items())
    raw = load_file(tmp_path / "second/second.safetensors")
    assert any(not torch.allclose(raw[name], value, atol=1e-3) for name, value in begun.items())
    assert losses(tmp_path / "second") == losses(plain(make_config, tmp_path, network))


def plain(make_config, tmp_path: Path, network: dict[str, Any]) -> Path:
    train(make_config(checkpoint__dir=str(tmp_path / "plain"), network=network, train__steps=4))
    return tmp_path / "plain"


def test_a_file_of_another_shape_is_no_start(make_config, tmp_path):
    train(make_config(checkpoint__dir=str(tmp_path / "first"), train__steps=1))
    ema = {"enabled": True, "init_from": str(tmp_path / "first/first.safetensors")}
    with pytest.raises(UsageError, match="does not hold an average of the adapter that trains"):
        train(make_config(checkpoint__dir=str(tmp_path / "second"), ema=ema, network={"rank": 3}))


def test_an_optimizer_that_averages_by_itself_is_refused(make_config):
    optimizer = {"name": "adamw_schedulefree", "lr": 2e-3}
    with pytest.raises(UsageError, match="cannot be averaged"):
        train(make_config(ema=EMA, optimizer=optimizer, schedule={"name": "constant"}))
