"""Keys that need another key, or that another key leaves without effect, are refused; defaults never are."""

from __future__ import annotations

from typing import Any

import pytest

from tests.core.config.samples import build, minimal, refusal
from tuner.core.config import build_config
from tuner.core.errors import UsageError


def source(**settings: Any) -> dict[str, Any]:
    return {"data": {"sets": [{"sources": [{"id": "a", "path": "a"} | settings]}]}}


def a_set(**settings: Any) -> dict[str, Any]:
    return {"data": {"sets": [{"sources": [{"id": "a", "path": "a"}]} | settings]}}


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            {"data": {"sets": [{"sources": [{"id": "a", "path": "a"}, {"id": "a", "path": "b"}]}]}},
            "the id 'a' is taken",
        ),
        (source(weight=2), "weight: has no effect with data.sampling 'epoch'"),
        (source(role="regularisation"), "no enabled source has the role 'train'"),
        (source(enabled=False), "no enabled source has the role 'train'"),
        ({"data": {"regularisation_weight": 0.5}}, "no source has the role 'regularisation'"),
        ({"loss": {"mask": {"enabled": True}}}, "loss.mask.enabled: no source has a mask"),
        ({"loss": {"mask": {"floor": 0.1}}}, "loss.mask.floor: has no effect without masks"),
        ({"validate": {"max_batches": 3}}, "validate.max_batches: has no effect: nothing is held out"),
        (
            {"validate": {"split": 0.5, "pool": False}},
            "validate.pool: has no effect: images of one source are held out",
        ),
        (a_set(crop={"style": "random"}), "changes at every visit, so latents cannot be cached"),
        (source(augment={"color": True}), "changes at every visit, so latents cannot be cached"),
        (source(captions={"from": "fixed"}), "'fixed' needs captions.fixed"),
        (source(captions={"fixed": "x"}), "captions.fixed: has no effect with from 'file'"),
        ({"network": {"rank": "from_file"}}, "network.rank: 'from_file' needs network.init_from"),
        ({"network": {"preset": "x", "targets": ["y"]}}, "network.preset: is replaced by network.targets"),
        ({"network": {"rules": [{"match": "x"}]}}, "network.rules[0]: sets nothing but match"),
        ({"network": {"type": "oft", "rank": 4}}, "network.rank: has no effect with network.type 'oft'"),
        ({"network": {"type": "ia3", "alpha": 4}}, "network.alpha: has no effect with network.type 'ia3'"),
        ({"network": {"type": "lokr", "dropout": 0.1}}, "network.dropout: has no effect with network.type 'lokr'"),
        ({"network": {"factor": 8}}, "network.factor: has no effect with network.type 'lora', only with 'lokr'"),
        (
            {"network": {"type": "lokr", "full_matrix": True, "rank": 4}},
            "network.rank: has no effect with network.full_matrix",
        ),
        (
            {"network": {"type": "oft", "block_size": 8, "block_count": 4}},
            "network.block_size: is replaced by network.block_count",
        ),
        (
            {"network": {"type": "oft", "rank": "from_file", "init_from": "x", "block_size": 4}},
            "network.block_size: comes from the file",
        ),
        (
            {"network": {"rank": "from_file", "init_from": "x", "rules": [{"match": "x", "rank": 4}]}},
            "network.rules[0].rank: comes from the file",
        ),
        (
            {"network": {"type": "loha", "rules": [{"match": "x", "block_size": 4}]}},
            "network.rules[0].block_size: has no effect with network.type 'loha', only with 'oft', 'boft'",
        ),
        (
            {"network": {"init_norm": 1e-3}},
            "network.init_norm: has no effect with network.type 'lora', only with 'lokr'",
        ),
        ({"network": {"type": "lokr", "init_norm": 1e-3}}, "network.init_norm: needs whole matrices"),
        (
            {"network": {"type": "lokr", "full_matrix": True, "init_norm": 1e-3, "init_from": "x"}},
            "network.init_norm: has no effect: every value comes from network.init_from",
        ),
        ({"network": {"dropout": 1}}, "network.dropout: at 1 nothing would be trained"),
        ({"sample": {"every": 5}}, "sample.every: has no effect without sample.prompts"),
        ({"log": {"dir": "x"}}, "log.dir: has no effect without trackers"),
        ({"checkpoint": {"dir": "x", "start_at": 100}}, "checkpoint.start_at: nothing is left to do: the run has 100"),
        ({"log": {"run": "x"}}, "log.run: has no effect without wandb in log.to"),
        ({"log": {"to": ["tensorboard"], "project": "x"}}, "log.project: has no effect without wandb in log.to"),
        ({"log": {"config": False}}, "log.config: has no effect without tensorboard or wandb in log.to"),
        ({"log": {"args": {"wandb": {"entity": "us"}}}}, "log.args.wandb: has no effect without wandb in log.to"),
        ({"log": {"to": ["tensorboard"], "args": {"tensorboard": {}}}}, "log.args.tensorboard: has no effect: only"),
        ({"checkpoint": {"keep_last": 3}}, "checkpoint.keep_last: has no effect without checkpoint.every"),
        (
            {"checkpoint": {"dir": "x", "every": 5, "rolling": {"every": {"steps": 5}}}},
            "checkpoint.rolling: has no effect: checkpoint.every is due whenever this is",
        ),
        ({"noise": {"timesteps": "uniform", "sigmoid_scale": 2}}, "sigmoid_scale is not used by timesteps 'uniform'"),
        ({"sample": {"adapter_strength": 0.5}}, "sample.adapter_strength: has no effect without sample.prompts"),
        (
            {"train": {"mode": "full", "steps": 5}, "sample": {"prompts": ["x"], "adapter_strength": 0.5}},
            "sample.adapter_strength: has no effect with train.mode 'full'",
        ),
        ({"sample": {"negative": "blurry"}}, "sample.negative: has no effect without sample.prompts"),
        (
            {"checkpoint": {"metadata": {"embed": False, "title": "x"}}},
            "checkpoint.metadata.title: has no effect while metadata.embed is off",
        ),
        ({"extensions": ["x", "y", "x"]}, "extensions[2]: 'x' is listed twice"),
        ({"train": {"batch_size": 4}} | a_set(batch_size=2), "train.batch_size: has no effect: every set names its"),
        ({"cache": {"latents": "off", "vae_batch_size": 2}}, "cache.vae_batch_size: has no effect with cache.latents"),
        ({"cache": {"text": "off", "max_text_variants": 2}}, "cache.max_text_variants: has no effect with cache.text"),
        ({"cache": {"text": "off", "text_batch_size": 2}}, "cache.text_batch_size: has no effect with cache.text"),
        (
            {"cache": {"latents": "off", "text": "off", "dtype": "fp32"}},
            "cache.dtype: has no effect when nothing is cached",
        ),
        ({"memory": {"checkpoint_every": 2}}, "memory.checkpoint_every: has no effect without memory.checkpointing"),
        ({"memory": {"offload_activations": "sync"}}, "memory.offload_activations: needs memory.checkpointing 'block'"),
        (
            {"memory": {"offload_activations": "async", "checkpointing": "selective"}},
            "memory.offload_activations: needs memory.checkpointing 'block'",
        ),
        (
            {"memory": {"offload_activations": "sync", "checkpointing": "block", "swap_blocks": 4}},
            "memory.offload_activations: does not work with memory.swap_blocks: weights and activations would",
        ),
        ({"memory": {"swap_blocks": 1}}, "memory.swap_blocks: at 1 frees nothing"),
        ({"ema": {"decay": 0.9}}, "ema.decay: has no effect while ema.enabled is off"),
        ({"sample": {"prompts": ["x"], "weights": "both"}}, "sample.weights: 'both' needs an average"),
        ({"ema": {"enabled": True}, "sample": {"weights": "ema"}}, "sample.weights: has no effect without"),
        ({"checkpoint": {"save_ema": False}}, "checkpoint.save_ema: has no effect while ema.enabled is off"),
        (
            {"ema": {"enabled": True}, "checkpoint": {"save_ema": False}},
            "ema.enabled: has no effect: the average is neither saved nor looked at",
        ),
        ({"ema": {"enabled": True, "start": 100}}, "ema.start: nothing is ever averaged: the run has 100 steps"),
        ({"ema": {"enabled": True, "every": 101}}, "ema.every: nothing is ever averaged: the run has 100 steps"),
        ({"guidance": {"distill": {"scale": 1, "zero_star": True}}}, "zero_star has no effect with scale 1"),
        ({"loss": {"huber_c": 0.2}}, "huber_c is not used by type 'l2'"),
    ],
)
def test_a_key_without_effect_or_without_what_it_needs_is_refused(sections: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(**sections)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"repeats": 2}, "repeats"),
        ({"augment": {"flip": True}}, "augment.flip"),
        ({"captions": {"dropout": 0.1}}, "captions.dropout"),
        ({"captions": {"variants": 2, "shuffle": True}}, "captions.variants"),
    ],
)
def test_what_a_validation_source_does_not_use_is_refused_where_it_stands_alone(
    settings: dict[str, Any], key: str
) -> None:
    held_out = {"id": "v", "path": "v", "role": "validation"}
    with pytest.raises(UsageError) as caught:
        build(data={"sets": [{"sources": [{"id": "a", "path": "a"}, held_out | settings]}]})
    assert f"data.sets[0].sources[1].{key}: has no effect with the role 'validation'" in str(caught.value)
    config = build(data={"defaults": settings, "sets": [{"sources": [{"id": "a", "path": "a"}, held_out]}]})
    assert len(config.data.sets[0].sources) == 2


def test_an_inherited_key_is_refused_only_when_nobody_uses_it() -> None:
    fixed = {"id": "b", "path": "b", "captions": {"from": "fixed", "fixed": "x"}}
    data = {"defaults": {"captions": {"extension": ".cap"}}, "sets": [{"sources": [{"id": "a", "path": "a"}, fixed]}]}
    assert build(data=data).data.sets[0].sources[0].captions.extension == ".cap"
    data["sets"] = [{"sources": [fixed | {"role": "train"}]}]
    with pytest.raises(UsageError) as caught:
        build(data=data)
    assert "data.defaults.captions.extension: has no effect with from 'fixed'" in str(caught.value)


def test_random_crops_and_colour_are_fine_without_cached_latents() -> None:
    sections = a_set(crop={"style": "random"}, augment={"color": True})
    assert build(cache={"latents": "off"}, **sections).data.sets[0].crop.style == "random"


def test_a_document_that_spells_out_every_default_is_accepted() -> None:
    config = build()
    assert build_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("fp8_scaled", "that is 'fp8' here"), ("int8-quanto", "use 'int8'"), ("int4-quanto", "use 'int4'"),
        ("int2-quanto", "a third of the output"), ("int4-torchao", "has no backward"), ("nf4-bnb", "use 'nf4'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["denoiser", "text_encoder"])
def test_quantization_under_other_names_is_answered_with_ours(tmp_path, key: str, name: str, advice: str) -> None:
    quantize = {"denoiser": name} if key == "denoiser" else {"text_encoder": {"text": name}}
    assert advice in refusal(minimal(quantize=quantize), tmp_path)


@pytest.mark.parametrize(
    ("quantize", "message"),
    [
        ({"activations": "int8"}, "quantize.activations: 'int8' needs weights in int8"),
        ({"denoiser": "fp8", "activations": "int8"}, "quantize.activations: 'int8' needs weights in int8"),
        ({"exclude": ["a"]}, "quantize.exclude: has no effect: nothing is quantized"),
        ({"denoiser": "int8", "exclude": ["("]}, "is no regular expression"),
        ({"denoiser": "int8", "parity": {"loss": 0.1}}, "quantize.parity.loss: has no effect without"),
    ],
)
def test_quantization_that_makes_no_sense_is_refused(tmp_path, quantize, message: str) -> None:
    assert message in refusal(minimal(quantize=quantize), tmp_path)


def test_fp8_products_need_bfloat16(tmp_path) -> None:
    quantize = {"denoiser": "fp8", "activations": "fp8"}
    assert "bfloat16 results only" in refusal(minimal(quantize=quantize, precision={"compute": "fp32"}), tmp_path)
