"""The model's facts fill the open defaults in and judge names and sizes; a resolved configuration stays as it is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.core.config.samples import build, minimal, toy_facts
from tuner.core.adapters.targets import select_targets
from tuner.core.config import build_config, facts_problems, load_config, resolve_defaults, resolved_text
from tuner.core.config.defaults import separable
from tuner.core.types import Blocks, Field, LoraRules, NoiseDefaults

FORMATS = ("native", "other")
SOURCE = {"id": "a", "path": "a"}


def test_every_default_of_the_model_is_filled_in() -> None:
    config = resolve_defaults(build(train={"seed": 7}), toy_facts(), formats=FORMATS)
    assert (config.noise.timesteps, config.noise.shift) == ("shift", 3.0)
    assert (config.sample.size, config.sample.steps, config.sample.cfg, config.sample.shift) == (
        (1024, 1024),
        20,
        4.0,
        3.0,
    )
    assert (config.checkpoint.name, config.checkpoint.format, config.checkpoint.dtype) == ("hero", "native", "fp32")
    assert (config.network.alpha, config.model.flavour, config.validation.seed) == (16.0, "small", 7)
    assert (config.precision.vae, config.precision.text_encoder) == ("fp32", {"text": "bf16"})
    assert config.text_encoder.max_tokens == {"text": 77}
    assert config.latents.posterior == "mode"


def test_a_rule_with_a_rank_of_its_own_keeps_it_as_its_alpha() -> None:
    rules = [{"match": "a.*", "rank": 4}, {"match": "b.*", "rank": 0}]
    config = resolve_defaults(build(network={"rules": rules}), toy_facts(), formats=FORMATS)
    paths = {"denoiser": ("a1", "b1", "c1")}
    targets = {each.path: (each.rank, each.alpha) for each in select_targets(paths, config.network, toy_facts())}
    assert targets == {"a1": (4, 4), "c1": (16, 16)}
    config = resolve_defaults(build(network={"rules": rules, "alpha": 8}), toy_facts(), formats=FORMATS)
    targets = {each.path: (each.rank, each.alpha) for each in select_targets(paths, config.network, toy_facts())}
    assert targets == {"a1": (4, 8), "c1": (16, 8)}


def test_bands_of_the_autoencoder_are_refused_where_they_would_do_nothing() -> None:
    config = build(latents={"chunk_size": 64})
    [problem] = map(str, facts_problems(config, toy_facts(), formats=FORMATS))
    assert "latents.chunk_size" in problem and "bands" in problem
    assert facts_problems(config, toy_facts(banded_latents=True), formats=FORMATS) == []


def test_what_the_user_says_wins_over_the_model() -> None:
    config = build(
        noise={"timesteps": "uniform"},
        network={"alpha": 1},
        sample={"cfg": 0, "size": [512, 768]},
        validate={"seed": 0},
    )
    config = resolve_defaults(config, toy_facts(), formats=FORMATS)
    assert (config.noise.timesteps, config.noise.shift, config.network.alpha) == ("uniform", None, 1.0)
    assert (config.sample.cfg, config.sample.size, config.validation.seed) == (0, (512, 768), 0)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"noise": {"timesteps": "sigmoid"}},
        {"data": {"sets": [{"resolution": [1024, 512], "captions": {"prefix": "p"}, "sources": [SOURCE]}]}},
        {"train": {"steps": None, "epochs": 3, "clip_grad": None}, "checkpoint": {"every": {"epochs": 1}}},
        {"network": {"blocks": {"main": [0, "2-3"]}, "rules": [{"match": "x", "rank": 4}]}},
        {"schedule": {"warmup": "5%"}},
    ],
)
def test_resolving_a_resolved_configuration_changes_nothing(sections: dict[str, Any]) -> None:
    first = resolve_defaults(build_config(load_config(minimal(**sections), env={})), toy_facts(), formats=FORMATS)
    again = build_config(load_config(json.loads(resolved_text(first)), env={}))
    assert facts_problems(again, toy_facts(), formats=FORMATS) == []
    second = resolve_defaults(again, toy_facts(), formats=FORMATS)
    assert second == first
    assert resolved_text(second) == resolved_text(first)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"train": {"components": ["denoisr"]}}, "this model has no 'denoisr'\n  at: train.components[0], "),
        ({"train": {"components": ["vae"]}}, "'vae': this part of the model cannot train"),
        ({"optimizer": {"lr_by_component": {"text": 1e-5}}}, "has no effect: it does not train"),
        ({"text_encoder": {"max_tokens": {"txt": 5}}}, "did you mean 'text'?"),
        ({"network": {"preset": "atention"}}, "did you mean 'attention'?"),
        ({"network": {"blocks": {"side": "all"}}}, "this model has no 'side'\n  at: network.blocks.side"),
        ({"checkpoint": {"format": "nativ"}}, "did you mean 'native'?"),
        ({"model": {"flavour": "large"}}, "model.flavour: is 'large', but the weights are 'small'"),
        (
            {"data": {"sets": [{"resolution": 1000, "sources": [{"id": "a", "path": "a"}]}]}},
            "1000 is not a multiple of 16",
        ),
        ({"data": {"defaults": {"buckets": {"step": 24}}}}, "24 is not a multiple of 16"),
        ({"sample": {"size": 500, "prompts": ["x"]}}, "sample.size: 500 is not a multiple of 16"),
    ],
)
def test_names_and_sizes_that_the_model_does_not_have_are_refused(sections: dict[str, Any], expected: str) -> None:
    problems = facts_problems(build(**sections), toy_facts(), formats=FORMATS)
    assert len(problems) == 1
    assert expected.removesuffix(", ") in str(problems[0])


@pytest.mark.parametrize(
    ("noise", "fix"),
    [
        ({"shift": 3.0}, "set noise.timesteps to 'shift'"),
        ({"logit_mean": 1.0}, "name a distribution in noise.timesteps"),
    ],
)
def test_a_noise_key_that_the_default_of_the_model_does_not_use_is_refused(noise: dict[str, Any], fix: str) -> None:
    facts = toy_facts(noise=NoiseDefaults(timesteps="sigmoid", shift=1.0))
    [problem] = facts_problems(build(noise=noise), facts)
    assert problem.what == f"noise.{next(iter(noise))}: is not used by timesteps 'sigmoid', the default of this model"
    assert problem.fix == fix


@pytest.mark.parametrize(("count", "expected"), [(55, None), (56, "at most 55 blocks of this model")])
def test_streamed_blocks_have_a_limit_over_all_lists(count: int, expected: str | None) -> None:
    facts = toy_facts(block_lists=(Blocks(path="a", count=19), Blocks(path="b", count=38)))
    problems = facts_problems(build(memory={"swap_blocks": count}), facts)
    assert [expected in problem.what for problem in problems] == ([] if expected is None else [True])


def test_a_size_that_does_not_fit_names_the_nearest_ones() -> None:
    problems = facts_problems(build(sample={"size": 500, "prompts": ["x"]}), toy_facts())
    assert problems[0].fix == "use 496 or 512"


def test_only_encoders_that_stand_apart_can_be_dropped_or_zeroed() -> None:
    both = ("left", "right")
    fields = {"joint": Field(shape=(5,), of=both, parts={"left": (0, 2)}), "own": Field(shape=(2,), of=("third",))}
    facts = toy_facts(text_components=(*both, "third"), text_fields=fields)
    assert separable(facts) == ["left", "third"]
    encoder = {"dropout": {"left": 0.1, "right": 0.1}, "unconditional": {"third": "zero", "fourth": "zero"}}
    problems = [str(each) for each in facts_problems(build(text_encoder=encoder), facts, formats=FORMATS)]
    assert len(problems) == 2
    assert "text_encoder.dropout.right" in problems[0] and "text_encoder.unconditional.fourth" in problems[1]


def test_padding_options_need_a_model_that_honours_them() -> None:
    config = build(text_encoder={"mask_padding": {"text": True}, "zero_padding": True})
    problems = [str(each) for each in facts_problems(config, toy_facts(), formats=FORMATS)]
    assert len(problems) == 2
    assert "text_encoder.mask_padding.text" in problems[0] and "text_encoder.zero_padding" in problems[1]
    assert facts_problems(config, toy_facts(padding_masks=("text",), zero_padding=True), formats=FORMATS) == []


def test_a_name_for_a_kind_of_modules_becomes_its_pattern_everywhere() -> None:
    lora = LoraRules(include={"denoiser": (".*",)}, kinds={"mlp": r".*\.mlp\..*"})
    network = {
        "include": ["mlp", "other"],
        "exclude": ["mlp"],
        "targets": ["mlp"],
        "rules": [{"match": "mlp", "rank": 2}],
    }
    resolved = resolve_defaults(build(network=network), toy_facts(lora=lora), formats=FORMATS).network
    assert resolved.include == (r".*\.mlp\..*", "other")
    assert (resolved.exclude, resolved.targets) == ((r".*\.mlp\..*",), (r".*\.mlp\..*",))
    assert [rule.match for rule in resolved.rules] == [r".*\.mlp\..*"]


def test_the_model_chooses_what_is_compared_and_how_timesteps_are_cut() -> None:
    facts = toy_facts(loss_target="clean", noise=NoiseDefaults(timesteps="uniform", shift=1.0, truncate=True))
    config = resolve_defaults(build(), facts, formats=FORMATS)
    assert (config.loss.target, config.noise.truncate) == ("clean", True)
    config = resolve_defaults(build(loss={"target": "velocity"}, noise={"truncate": False}), facts, formats=FORMATS)
    assert (config.loss.target, config.noise.truncate) == ("velocity", False)
