"""Whole runs in every mode with state of its own: each continues exactly, and its file carries what was trained."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tuner.core.registry.extensions import Extensions
from tuner.core.track.events import read_events
from tuner.core.train import previews
from tuner.core.train.run import train

EVERY_COMPONENT = ["denoiser", "llm_adapter", "qwen3"]
STILL = {"optimizer__lr": 1e-12, "train__steps": 1, "schedule": {"name": "constant"}}
"""Changes that leave the weights where they are, to see what a run starts from."""
MODES: dict[str, dict[str, Any]] = {
    "the adapter's text side": {"train__components": ["llm_adapter"]},
    "the text encoder": {"train__components": ["qwen3"]},
    "everything, uncached": {"train__components": EVERY_COMPONENT, "cache__text": "off"},
    "everything in bfloat16": {
        "train__components": EVERY_COMPONENT,
        "precision": {"compute": "bf16"},
        "memory__checkpointing": "block",
    },
    "schedule-free": {
        "optimizer": {"name": "adamw_schedulefree", "lr": 2e-3},
        "schedule": {"name": "constant"},
        "train__accumulate": 2,
    },
    "several rates": {
        "train__components": ["denoiser", "llm_adapter"],
        "optimizer": {
            "lr": 1e-3, "lr_by_component": {"llm_adapter": 5e-4}, "loraplus": {"denoiser": 4.0},
            "lr_rules": [{"match": r"denoiser:blocks\.0\..*", "lr": 0}],
        },
    },
}  # fmt: skip


def losses(folder: Path) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in read_events(folder / "events.jsonl") if event["kind"] == "step"}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_stopped_in_the_middle_of_an_epoch_it_goes_on_exactly(make_config, tmp_path, mode):
    options = {
        "train__steps": 6,
        "validate": {"split": 0.2, "every": 2},
        "sample": {"prompts": ["a red dog --w 64 --h 64 --s 1 --n grass"], "every": 2},
        **mode,
    }
    for name, stops in (("whole", ()), ("parts", (1, 4))):
        config = make_config(checkpoint__dir=str(tmp_path / name / "run"), **options)
        for stop in stops:
            stop_after(config, stop)
        train(config, resume="auto" if stops else None)
    whole, parts = tmp_path / "whole/run", tmp_path / "parts/run"
    assert losses(parts) == losses(whole)
    assert (parts / "run.safetensors").read_bytes() == (whole / "run.safetensors").read_bytes()
    assert any(
        value.abs().max() > 0 for name, value in load_file(whole / "run.safetensors").items() if "lora_B" in name
    )


def stop_after(config: dict[str, Any], steps: int) -> None:
    """Run with an extension that interrupts after an update, as Ctrl+C would."""
    original = Extensions.on_step_end

    def interrupt(self: Extensions, step: int, metrics: dict[str, float]) -> None:
        original(self, step, metrics)
        if step == steps:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Extensions, "on_step_end", interrupt)
        train(config, resume="auto" if Path(config["checkpoint"]["dir"]).exists() else None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision__adapter": "bf16"}, "precision.adapter is bf16"),
        ({"noise__stratified": True, "data__sets__0__batch_size": 1}, "noise.stratified has no effect"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_is_hardly_ever_meant_is_told(make_config, tmp_path, changes, message):
    train(make_config(train__steps=1, **changes))
    told = [event["message"] for event in read_events(tmp_path / "out/events.jsonl") if event["kind"] == "warning"]
    assert any(each.startswith(message) for each in told)


# --- previews ---------------------------------------------------------------------------------------------------------

PROMPT = "a red dog --w 64 --h 64 --s 2 --l 3 --n grass"


def test_the_base_column_shows_the_base_model_also_when_the_text_side_trains(make_config, tmp_path):
    bases = []
    for name, at_start in (("early", True), ("late", False)):
        train(
            make_config(
                checkpoint__dir=str(tmp_path / name), train__components=["denoiser", "qwen3"], optimizer__lr=2e-2,
                train__steps=3, sample={"prompts": [PROMPT], "at_start": at_start},
            )
        )  # fmt: skip
        [base] = (tmp_path / name / "samples").glob("base-*/000.png")
        bases.append(base.read_bytes())
        assert (tmp_path / name / "samples/step-000003/000.png").read_bytes() != bases[-1]
    assert bases[0] == bases[1]


def test_a_failed_preview_costs_pictures_and_nothing_else(make_config, tmp_path, monkeypatch):
    options = {"network__dropout": 0.4, "train__steps": 5}
    train(make_config(checkpoint__dir=str(tmp_path / "plain"), **options))

    def no_memory(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(previews, "draw_latents", no_memory)
    train(make_config(checkpoint__dir=str(tmp_path / "failed"), sample={"prompts": [PROMPT], "every": 2}, **options))
    assert losses(tmp_path / "failed") == losses(tmp_path / "plain")
    warnings = [event for event in read_events(tmp_path / "failed/events.jsonl") if event["kind"] == "warning"]
    assert warnings[0]["message"] == "no samples at step 2: no memory left"


def test_a_sheet_shows_one_set_of_prompts_only(make_config, tmp_path):
    train(make_config(train__steps=2, sample={"prompts": [PROMPT]}))
    (tmp_path / "out/samples/step-mine").mkdir()
    train(make_config(train__steps=4, sample={"prompts": [f"a {PROMPT}"], "every": 3}), resume="auto")
    widths = {}
    for step in (2, 3, 4):
        with Image.open(tmp_path / f"out/samples/step-{step:06d}/sheet.png") as sheet:
            widths[step] = sheet.width
    column = widths[4] - widths[3]
    assert widths[2] == widths[3] == widths[4] - column and column > 0


# --- what was trained is in the file ----------------------------------------------------------------------------------


def adapted_loss(folder: Path) -> float:
    """The last validation's loss of the adapted model."""
    found = [event for event in read_events(folder / "events.jsonl") if event["kind"] == "validation"]
    value: float = found[-1]["adapted"]
    return value


@pytest.mark.parametrize("key_format", ["comfyui", "comfyui-alpha", "sd-scripts", "diffusers"])
def test_a_run_goes_on_from_an_exported_file_of_any_format(make_config, tmp_path, key_format):
    options = {"train__components": EVERY_COMPONENT, "validate": {"split": 0.4, "every": None}}
    train(
        make_config(
            checkpoint={"dir": str(tmp_path / "first"), "format": key_format}, optimizer__lr=2e-2,
            network={"rank": 4, "alpha": 6.0, "rules": [{"match": ".*mlp.*", "rank": 3}]}, **options,
        )
    )  # fmt: skip
    start = {"rank": "from_file", "init_from": str(tmp_path / "first/first.safetensors")}
    train(make_config(checkpoint__dir=str(tmp_path / "second"), network=start, **options, **STILL))
    train(make_config(checkpoint__dir=str(tmp_path / "fresh"), **options, **STILL))
    first, second, fresh = (adapted_loss(tmp_path / name) for name in ("first", "second", "fresh"))
    assert abs(first - fresh) > 1e-3
    assert second == pytest.approx(first, rel=1e-5)


# --- data that counts differently -------------------------------------------------------------------------------------


def test_regularisation_images_count_with_their_weight(make_config, tmp_path, pictures):
    first = {}
    for weight in (0.5, 1.0, 2.0):
        sources = [
            {"id": "dogs", "path": str(pictures)},
            {"id": "others", "path": str(pictures), "role": "regularisation"},
        ]
        folder = tmp_path / str(weight)
        train(
            make_config(
                checkpoint__dir=str(folder), train__steps=1, train__accumulate=12, data__sets__0__sources=sources,
                data__sets__0__batch_size=1, data__regularisation_weight=weight,
            )
        )  # fmt: skip
        first[weight] = losses(folder)[1]
    assert first[0.5] < first[1.0] < first[2.0]
    assert first[2.0] - first[1.0] == pytest.approx(2 * (first[1.0] - first[0.5]), rel=1e-4)


@pytest.mark.parametrize("sampling", ["epoch", "weighted", "uniform"])
def test_several_resolutions_and_ways_to_sample_go_on_exactly(make_config, tmp_path, pictures, sampling):
    sources = [{"id": "dogs", "path": str(pictures)}, {"id": "more", "path": str(pictures), "repeats": 2}]
    if sampling != "epoch":
        sources[1] |= {"weight": 3.0}
    options = {
        "data__sets__0__resolution": [64, 96], "data__sets__0__batch_size": [2, 1], "data__sampling": sampling,
        "data__sets__0__sources": sources, "train__steps": 5,
    }  # fmt: skip
    train(make_config(checkpoint__dir=str(tmp_path / "whole/run"), **options))
    config = make_config(checkpoint__dir=str(tmp_path / "parts/run"), **options)
    stop_after(config, 2)
    train(config, resume="auto")
    assert losses(tmp_path / "parts/run") == losses(tmp_path / "whole/run")
    buckets = {event["kind"]: event for event in read_events(tmp_path / "whole/run/events.jsonl")}["run_start"]
    assert len(buckets["plan"]["buckets"]) >= 2
