"""Embedded guidance in training and in previews, and preview shifts that follow the size of the picture."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from tuner.core.config import GuidanceConfig, LossConfig, SampleConfig
from tuner.core.flow import shift_value
from tuner.core.train.draws import StepDraws, draw_guidance
from tuner.core.train.prompts import resolve_prompts
from tuner.core.types import Item, SampleDefaults

ITEMS = [Item(id=str(number), source="s", caption="") for number in range(64)]
DEFAULTS = SampleDefaults(steps=20, cfg=1.0, shift="auto", size=(1024, 1024), multiple=16, guidance=3.5)
GUIDED = SimpleNamespace(guidance_input=True, spatial_factor=8, sample=DEFAULTS)


def test_a_model_without_the_input_gets_none():
    assert draw_guidance(GuidanceConfig(), StepDraws(0, 1, ITEMS)) is None


def test_a_number_is_given_to_every_sample():
    assert torch.equal(draw_guidance(GuidanceConfig(embedded=2.5), StepDraws(0, 1, ITEMS)), torch.full((64,), 2.5))


def test_a_range_is_drawn_evenly_by_sample_and_step():
    config = GuidanceConfig(embedded=(1.0, 3.0))
    drawn = draw_guidance(config, StepDraws(0, 1, ITEMS))
    assert 1.0 <= float(drawn.min()) < 1.3 and 2.7 < float(drawn.max()) <= 3.0
    assert torch.equal(drawn[:8], draw_guidance(config, StepDraws(0, 1, ITEMS[:8])))
    assert not torch.equal(drawn, draw_guidance(config, StepDraws(0, 2, ITEMS)))


def test_a_range_must_not_fall():
    with pytest.raises(ValidationError, match="min not above max"):
        GuidanceConfig(embedded=(3.0, 1.0))


def test_scaled_predictions_are_compared_as_clean_latents_and_nothing_else():
    with pytest.raises(ValidationError, match="sigma_scaled"):
        LossConfig(prediction="sigma_scaled", target="velocity")


@pytest.mark.parametrize(
    ("line", "embedded", "wanted"), [("a", None, 3.5), ("a", 2.0, 2.0), ("a --g 5", 2.0, 5.0), ("a --g 0", None, 0.0)]
)
def test_a_preview_takes_its_guidance_from_the_prompt_else_the_configuration_else_the_model(line, embedded, wanted):
    [prompt] = resolve_prompts(SampleConfig(prompts=(line,), embedded_guidance=embedded), GUIDED)
    assert prompt.guidance == wanted


@pytest.mark.parametrize(
    ("line", "shift", "wanted"),
    [
        ("a", None, shift_value("auto", (128, 128))),
        ("a --w 512 --h 256", None, shift_value("auto", (32, 64))),
        ("a --w 512 --h 256", 2.0, 2.0),
        ("a --fs 4", "auto", 4.0),
        ("a --fs auto --w 512 --h 512", 2.0, shift_value("auto", (64, 64))),
    ],
)
def test_an_automatic_shift_goes_by_the_size_of_the_picture(line, shift, wanted):
    [prompt] = resolve_prompts(SampleConfig(prompts=(line,), shift=shift), GUIDED)
    assert prompt.shift == pytest.approx(wanted)
