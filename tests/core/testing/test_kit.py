"""The conformance kit notices what it is there to notice: each test makes one mistake and expects to be told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.fixtures.tiny_anima import make_tiny_anima
from tuner.core.errors import UsageError
from tuner.core.files import safetensors_header
from tuner.core.registry.facade import ModelFacade
from tuner.core.testing import ModelConformance, fact_problems, write_empty_weights
from tuner.core.testing.bench import Bench
from tuner.core.testing.plugin_checks import on_meta
from tuner.core.types import Blocks, Field, Fused, ModelFacts, TextEmbeds


class Kit(ModelConformance):
    """Not called Test...: pytest must not run it by itself."""

    plugin = "anima"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("kit")
    return Bench("anima", {"model": make_tiny_anima(folder / "model")}, folder, lr=1e-2)


@pytest.fixture(scope="module")
def meta(bench: Bench) -> Any:
    return on_meta(bench)


# --- facts ------------------------------------------------------------------------------------------------------------


def lora(**changes: Any) -> Callable[[ModelFacts], ModelFacts]:
    return lambda facts: replace(facts, lora=replace(facts.lora, **changes))


MISTAKES = {
    "components lacks 'vae'": lambda facts: replace(facts, components=("denoiser", "llm_adapter", "qwen3")),
    "trainable names 'clip'": lambda facts: replace(facts, trainable=(*facts.trainable[:1], "clip")),
    "files does not say what makes 'vae'": lambda facts: replace(facts, files={"denoiser": ()}),
    "is no multiple of spatial_factor": lambda facts: replace(facts, resolution_multiple=12),
    "sample.size 1000 is no multiple": lambda facts: replace(facts, sample=replace(facts.sample, size=(1000, 1024))),
    "has 2 blocks, not 3": lambda facts: replace(facts, block_lists=(Blocks(path="blocks", count=3),)),
    "the denoiser has no module 'layers'": lambda facts: replace(facts, block_lists=(Blocks(path="layers", count=2),)),
    "is a Linear, not a ModuleList": lambda facts: replace(
        facts, block_lists=(Blocks(path="final_layer.linear", count=1),)
    ),
    "block_lists is empty": lambda facts: replace(facts, block_lists=()),
    "lora.exclude: '.*_modulatoin.*' matches no module": lora(exclude=(".*_modulatoin.*",)),
    "preset 'mlp': 'mlp' matches no module": lora(presets={"mlp": (("mlp",), ())}),
    "preset 'none' adapts nothing": lora(presets={"none": ((".*",), (".*",))}),
    "nothing adaptable lies below 'layers' of group 'all'": lora(groups={"all": "layers"}),
    "lora.include names 'vae', which cannot train": lora(include={"denoiser": (".*",), "vae": (".*",)}),
    "trim must name a bool field": lambda facts: replace(
        facts, text_fields={"context": Field(shape=("L", 4), of=("qwen3",), trim="mask")}
    ),
    "kind 'mpl': '.*mpl' matches no module": lora(kinds={"mpl": ".*mpl"}),
    "'.*attn' matches no module with 'query' below it": lora(
        fused=(Fused(parent=".*attn", members=("query",), rows=(1,)),)
    ),
    "output_proj is not a linear with 2 times as many rows": lora(
        fused=(Fused(parent=r"blocks\.\d+\.self_attn", members=("q_proj", "output_proj"), rows=(1, 2)),)
    ),
    "does not lie in ('L', 4)": lambda facts: replace(
        facts, text_fields={"context": Field(shape=("L", 4), of=("qwen3",), parts={"qwen3": (2, 6)})}
    ),
    "modulation: 'blocks.0.nrom' matches no module": lambda facts: replace(facts, modulation=(r"blocks.0.nrom",)),
    "modulation: 'blocks.0.self_attn' is a SelfAttention, not a Linear": lambda facts: replace(
        facts, modulation=(r"blocks\.0\.self_attn",)
    ),
    "lies outside the blocks": lambda facts: replace(facts, modulation=(r"final_layer\.linear",)),
    "sample.guidance must be given exactly when": lambda facts: replace(facts, guidance_input=True),
    "there is no component 'clip'": lambda facts: replace(
        facts, text_fields={"context": Field(shape=("L", 4), of=("clip",))}
    ),
    "of is empty": lambda facts: replace(facts, text_fields={"context": Field(shape=("L", 4))}),
}


@pytest.mark.parametrize(("words", "mistake"), MISTAKES.items(), ids=list(MISTAKES))
def test_a_fact_that_is_not_true_is_told(words, mistake, bench, meta):
    assert fact_problems(bench.facts, meta) == []
    assert any(words in problem for problem in fact_problems(mistake(bench.facts), meta))


# --- behaviour --------------------------------------------------------------------------------------------------------


def changed(monkeypatch: pytest.MonkeyPatch, hook: str, change: Callable[..., Any]) -> None:
    """Put ``change(result, *arguments)`` in the place of a hook's result."""
    original = getattr(ModelFacade, hook)

    def wrapped(self: ModelFacade, *arguments: Any, **named: Any) -> Any:
        return change(original(self, *arguments, **named), *arguments)

    monkeypatch.setattr(ModelFacade, hook, wrapped)


def first_row_for_all(result: Any, *arguments: Any) -> Any:
    return result[:1].expand_as(result)


def texts_of_other_length(result: TextEmbeds, models: Any, captions: Any, *rest: Any) -> TextEmbeds:
    return TextEmbeds(tensors={name: value * (1 + 0.5 * len(captions)) for name, value in result.tensors.items()})


BEHAVIOUR = {
    "samples that see each other": (
        "predict", first_row_for_all, "test_samples_of_a_batch_do_not_see_each_other",
    ),
    "pictures that see each other": (
        "encode_latents", first_row_for_all, "test_a_picture_encodes_the_same_alone_and_in_a_batch",
    ),
    "a prediction that is not finite": (
        "predict", lambda result, *rest: result / 0, "test_prediction_has_the_shape_of_its_input",
    ),
    "the other direction of the target": (
        "noise_target", lambda result, *rest: replace(result, target=-result.target),
        "test_noise_starts_at_the_picture_and_ends_at_noise",
    ),
    "a field that nobody declared": (
        "encode_text", lambda result, *rest: TextEmbeds(tensors={**result.tensors, "more": torch.zeros(3)}),
        "test_text_fields_are_as_declared",
    ),
    "values behind the mask": (
        "encode_text", lambda result, *rest: TextEmbeds(
            tensors={n: v + 1 if v.is_floating_point() else v for n, v in result.tensors.items()}
        ),
        "test_what_a_mask_cuts_off_is_exactly_the_padding",
    ),
    "a network that cannot learn": (
        "predict", lambda result, *rest: result.detach() + 0 * result, "test_the_loss_falls_on_one_batch_in_20_steps",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("hook", "change", "check"), BEHAVIOUR.values(), ids=list(BEHAVIOUR))
def test_a_hook_that_does_wrong_fails_its_check(hook, change, check, bench, monkeypatch):
    getattr(Kit(), check)(bench)
    changed(monkeypatch, hook, change)
    with pytest.raises((AssertionError, UsageError)):
        getattr(Kit(), check)(bench)


def test_text_that_the_cache_would_change_fails_its_check(bench, monkeypatch):
    Kit().test_text_from_the_cache_acts_as_live_text(bench)
    changed(monkeypatch, "encode_text", texts_of_other_length)
    with pytest.raises(AssertionError):
        Kit().test_text_from_the_cache_acts_as_live_text(bench)


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_a_class_without_a_tiny_model_is_told_what_to_define(tmp_path):
    with pytest.raises(TypeError, match=r"must define tiny_config"):
        Kit().tiny_config(tmp_path)


def test_empty_weights_have_a_true_header_and_take_no_room(tmp_path):
    path = write_empty_weights(tmp_path / "below" / "big.safetensors", {"a": (1 << 20, 1 << 12), "b": (3,)})
    header = safetensors_header(path)
    assert {name: (info.dtype, info.shape) for name, info in header.items()} == {
        "a": ("BF16", (1 << 20, 1 << 12)), "b": ("BF16", (3,)),
    }  # fmt: skip


def test_the_core_and_the_program_never_import_pytest():
    script = (
        "import sys, tuner.core.train.run, tuner.core.testing, tuner.core.lifecycle.check, tuner.cli.main\n"
        "from tuner.core.testing import write_empty_weights\n"
        "sys.exit('pytest' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
