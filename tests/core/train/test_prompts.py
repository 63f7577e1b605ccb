"""Prompt lines and files mean what users of sd-scripts wrote them to mean; what cannot be honoured is said."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from tests.helpers import golden
from tuner.core.config import SampleConfig
from tuner.core.errors import UsageError
from tuner.core.train.prompts import parse_line, read_prompt_file, resolve_prompts, texts_of
from tuner.core.types import SampleDefaults

GOLDEN = golden("core/sample_prompts.json")
FACTS = SimpleNamespace(
    guidance_input=False,
    sample=SampleDefaults(steps=30, cfg=4.0, shift=3.0, size=(512, 512), multiple=16),
)


@pytest.mark.parametrize("case", GOLDEN["lines"], ids=lambda case: case["line"])
def test_a_line_is_read_as_the_reference_reads_it(case):
    assert parse_line(case["line"]) == case["expected"]


@pytest.mark.parametrize("case", GOLDEN["files"], ids=lambda case: case["name"])
def test_a_file_is_read_as_the_reference_reads_it(case, tmp_path):
    path = tmp_path / case["name"]
    path.write_text(case["text"], encoding="utf-8")
    entries = [{**fields, "enum": number} for number, fields in enumerate(read_prompt_file(path))]
    assert entries == case["expected"]


def test_a_flag_that_carries_nothing_is_reported(caplog):
    with caplog.at_level(logging.WARNING):
        parse_line("a cat --w512")
    assert "--w512" in caplog.text


def test_defaults_come_from_config_then_model():
    sample = SampleConfig(prompts=("a cat --w 250 --l 2", "a dog --n blurry --d 7"), steps=12, seed=5)
    cat, dog = resolve_prompts(sample, FACTS)
    assert (cat.width, cat.height, cat.steps, cat.cfg, cat.shift, cat.seed) == (240, 512, 12, 2.0, 3.0, 5)
    assert (dog.negative, dog.seed, dog.cfg) == ("blurry", 7, 4.0)
    assert texts_of([cat, dog]) == ["a cat", "", "a dog", "blurry"]


def test_several_pictures_of_a_prompt_get_their_own_seeds():
    assert [p.seed for p in resolve_prompts(SampleConfig(prompts=("x", "y --d 9"), count=2, seed=3), FACTS)] == [
        3,
        4,
        9,
        10,
    ]


def test_a_flag_that_previews_cannot_honour_is_refused():
    with pytest.raises(UsageError, match="sample_sampler"):
        resolve_prompts(SampleConfig(prompts=("a cat --ss euler_a",)), FACTS)


def test_sampler_and_rescaling_come_from_the_line_and_the_configuration():
    sample = SampleConfig(prompts=("a cat", "a cat --ss euler"), sampler="heun", cfg_rescale=0.5)
    found = resolve_prompts(sample, FACTS)
    assert [(prompt.sampler, prompt.cfg_rescale) for prompt in found] == [("heun", 0.5), ("euler", 0.5)]
    with pytest.raises(UsageError, match="cfg_rescale has no effect"):
        resolve_prompts(sample.model_copy(update={"cfg": 1.0}), FACTS)


def test_a_flow_shift_that_is_no_number_is_refused():
    with pytest.raises(UsageError, match="--fs"):
        resolve_prompts(SampleConfig(prompts=("a cat --fs fast",)), FACTS)


def test_a_missing_prompt_file_is_named(tmp_path):
    with pytest.raises(UsageError) as error:
        resolve_prompts(SampleConfig(prompts=str(tmp_path / "none.txt")), FACTS)
    assert "none.txt" in str(error.value)
