"""Prompt lines and files mean what users of sd-scripts wrote them to mean; what cannot be honoured is said."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace

import pytest

from tests.helpers import golden
from tuner.core.config import SampleConfig
from tuner.core.errors import UsageError
from tuner.core.train.prompt_files import parse_line, read_prompt_file
from tuner.core.train.prompts import resolve_prompts, texts_of
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


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "# a comment\n\n", "holds no prompt"),
        ("a.json", "[]", "holds no prompt"),
        ("a.json", '"a cat"', "list of prompts, or an object of names"),
        ("a.json", "[5]", r"text or an object, not 5\n  at: .*a.json, prompt 1"),
        ("a.json", '["a dog", {"text": "a cat"}]', r"no field 'text'\n  at: .*a.json, prompt 2"),
        ("a.json", '[{"prompt": "x", "widht": 64}]', "did you mean 'width'"),
        ("a.json", '[{"prompt": "x", "width": "64"}]', "width of a prompt: expected a whole number above 0, got '64'"),
        ("a.json", '[{"prompt": "x", "sample_steps": 0}]', "sample_steps of a prompt: expected a whole number above 0"),
        ("a.json", '[{"prompt": "x", "seed": -1}]', "seed of a prompt: expected a whole number, 0 or more"),
        ("a.json", '[{"prompt": "x", "scale": NaN}]', "scale of a prompt: expected a number"),
        ("a.json", '[{"width": 64}]', "no field 'prompt'"),
        ("a.toml", "[prompt]\nwidth = 64\n", r"\[\[prompt.subset\]\]"),
        ("a.toml", "[[prompt.subset]]\nwidth = 64\n", "no field 'prompt'"),
    ],
)
def test_a_file_that_is_no_prompt_file_is_refused_with_the_place(name, text, message, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        read_prompt_file(tmp_path / name)
    assert re.search(message, str(caught.value))


def test_files_of_other_editors_and_trainers_hold_the_same_prompts(tmp_path):
    marked = tmp_path / "marked.txt"
    marked.write_text("\ufeff# a comment\na cat --s 3\n", encoding="utf-8")
    assert read_prompt_file(marked) == [{"prompt": "a cat", "sample_steps": 3}]
    library = tmp_path / "library.json"
    library.write_text('{"one": "a cat --s 3", "two": {"prompt": "a dog", "seed": null}}', encoding="utf-8")
    assert read_prompt_file(library) == [{"prompt": "a cat", "sample_steps": 3}, {"prompt": "a dog"}]


@pytest.mark.parametrize("line", ["x --d 18446744073709551616", "x --fs nan", "x --fs inf", "x --fs 0"])
def test_a_number_that_no_picture_can_be_drawn_with_is_refused(line):
    with pytest.raises(UsageError, match=r"too large|--fs must be a number above 0"):
        resolve_prompts(SampleConfig(prompts=(line,)), FACTS)


def test_what_has_no_effect_on_a_picture_is_said(caplog):
    caplog.set_level(logging.INFO)
    resolve_prompts(SampleConfig(prompts=("a cat --n fur --l 1 --w 100", "a dog --l 2 --n fur")), FACTS)
    assert "--n of the prompt 'a cat' has no effect" in caplog.text and "'a dog'" not in caplog.text
    assert "96x512 instead of 100x512" in caplog.text
    caplog.clear()
    resolve_prompts(SampleConfig(prompts=("a cat",), negative="fur", cfg=1.0), FACTS)
    assert "sample.negative has no effect" in caplog.text


def test_embedded_guidance_is_a_fraction_wherever_it_was_written(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"prompt": "x", "guidance_scale": 5}]', encoding="utf-8")
    facts = SimpleNamespace(guidance_input=True, sample=FACTS.sample)
    [prompt] = resolve_prompts(SampleConfig(prompts=str(path)), facts)
    assert isinstance(prompt.guidance, float)
