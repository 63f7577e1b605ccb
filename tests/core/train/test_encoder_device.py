"""Text encoders that stay on the CPU while captions are encoded: placed there, with the same entries of the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.core.train.test_modes import losses
from tuner.core.errors import UsageError
from tuner.core.registry import open_run
from tuner.core.registry.facade import ModelFacade
from tuner.core.track.events import read_events
from tuner.core.train.quantizing import load_components
from tuner.core.train.run import train
from tuner.core.types import Models

HOME = {"text_encoder__device": {"qwen3": "cpu"}}


def test_only_the_named_encoder_stays_on_the_cpu(make_config, monkeypatch):
    asked: dict[str, str] = {}

    def load(self: ModelFacade, components: Any, placement: Any) -> Models:
        asked.update(dict.fromkeys(components, placement.device))
        return Models()

    monkeypatch.setattr(ModelFacade, "load_models", load)
    run = open_run(make_config(**HOME))
    load_components(run, ["denoiser", "qwen3", "llm_adapter", "vae"], torch.device("cuda:0"))
    assert asked == {"denoiser": "cuda:0", "qwen3": "cpu", "llm_adapter": "cuda:0", "vae": "cuda:0"}


def test_where_captions_are_encoded_changes_no_entry_and_may_change_on_resume(make_config, tmp_path):
    cache = {"cache__dir": str(tmp_path / "cache"), "train__steps": 2}
    train(make_config(checkpoint__dir=str(tmp_path / "plain"), **cache))
    train(make_config(checkpoint__dir=str(tmp_path / "cpu"), **cache, **HOME))
    assert losses(tmp_path / "cpu") == losses(tmp_path / "plain")
    stages = [event for event in read_events(tmp_path / "cpu/events.jsonl") if event["kind"] == "stage"]
    assert {event["items"] for event in stages} == {0}
    train(make_config(checkpoint__dir=str(tmp_path / "cpu"), **cache | {"train__steps": 3}), resume="auto")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3", {"cache__text": "off"}),
        ("qwen3", {"train__components": ["denoiser", "qwen3"]}),
        ("llm_adapter", {"train__components": ["denoiser", "llm_adapter"]}),
        ("llm_adapter", {"train__components": ["denoiser", "qwen3"]}),
    ],
)
def test_an_encoder_that_every_step_runs_is_refused(make_config, name, changes):
    with pytest.raises(UsageError, match=f"{name} runs in every step") as caught:
        train(make_config(**changes, text_encoder__device={name: "cpu"}))
    assert f"text_encoder.device.{name}" in str(caught.value)


def test_an_encoder_that_the_model_does_not_have_is_refused(make_config):
    with pytest.raises(UsageError, match=r"text_encoder\.device\.t5: this model has no 't5'"):
        train(make_config(text_encoder__device={"t5": "cpu"}))
