"""Whole runs on quantized weights: they learn, stop and go on exactly, export plain adapters, and say what they do."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.core.train.test_modes import losses, stop_after
from tests.fixtures.tiny_anima import DENOISER, make_tiny_anima
from tuner.core.compute.quantized import QuantizedLinear, quantized_linears
from tuner.core.errors import UsageError
from tuner.core.track.events import read_events
from tuner.core.train import quantizing, trainer
from tuner.core.train.check import check
from tuner.core.train.run import train

INT8 = {"denoiser": "int8", "activations": "int8"}
METHODS = ("int8", "fp8", "int4", "nf4")
PROMPT = "a red dog --w 64 --h 64 --s 1 --l 1"
BF16 = {"compute": "bf16", "text_encoder": {"qwen3": "fp32", "llm_adapter": "fp32"}}


def events(folder, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(folder / "events.jsonl") if event["kind"] == kind]


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_learns_on_quantized_weights_much_as_on_plain_ones(make_config, tmp_path, method):
    options = {"train__steps": 12, "optimizer__lr": 2e-2, "schedule": {"name": "constant"}}
    train(make_config(checkpoint__dir=str(tmp_path / "plain"), **options))
    train(make_config(quantize={"denoiser": method}, **options))
    plain, quantized = (list(losses(tmp_path / name).values()) for name in ("plain", "out"))
    assert plain != quantized
    assert sum(quantized[-4:]) < sum(quantized[:4])
    assert sum(quantized[-4:]) == pytest.approx(sum(plain[-4:]), rel=0.1)


@pytest.mark.parametrize(
    ("quantize", "compute"),
    [
        (INT8, "bf16"),
        ({"denoiser": "nf4", "text_encoder": {"qwen3": "int8"}}, "bf16"),
        ({"denoiser": "int4"}, "fp32"),
        ({"denoiser": "fp8"}, "fp32"),
    ],
    ids=str,
)
def test_stopped_it_goes_on_exactly(make_config, tmp_path, quantize, compute):
    options = {"train__steps": 5, "quantize": quantize, "precision": {**BF16, "compute": compute}}
    train(make_config(checkpoint__dir=str(tmp_path / "whole/run"), **options))
    config = make_config(checkpoint__dir=str(tmp_path / "parts/run"), **options)
    stop_after(config, 2)
    train(config, resume="auto")
    assert losses(tmp_path / "parts/run") == losses(tmp_path / "whole/run")
    one, other = (tmp_path / part / "run/run.safetensors" for part in ("whole", "parts"))
    assert one.read_bytes() == other.read_bytes()


def test_the_exported_adapter_is_that_of_a_plain_run(make_config, tmp_path):
    """Same names, shapes and dtypes; it starts another run, and every module was read back when it was written."""
    train(make_config(checkpoint__dir=str(tmp_path / "plain"), train__steps=1))
    train(make_config(checkpoint__dir=str(tmp_path / "nf4"), train__steps=1, quantize={"denoiser": "nf4"}))
    plain, quantized = (load_file(tmp_path / name / f"{name}.safetensors") for name in ("plain", "nf4"))
    assert {name: (value.shape, value.dtype) for name, value in plain.items()} == {
        name: (value.shape, value.dtype) for name, value in quantized.items()
    }
    assert events(tmp_path / "nf4", "export")[0]["keys"] == len(quantized)
    with safe_open(tmp_path / "nf4/nf4.safetensors", framework="pt") as file:
        assert "nf4" not in {name for name in file.metadata() if name.startswith("ss_base")}
    start = str(tmp_path / "nf4/nf4.safetensors")
    train(make_config(checkpoint__dir=str(tmp_path / "next"), network={"rank": 4, "init_from": start}, train__steps=1))


def test_pictures_and_validation_use_the_quantized_base(make_config, tmp_path):
    looks = {"sample": {"prompts": [PROMPT], "at_start": True}, "validate": {"split": 0.2, "every": None}}
    for name, quantize in (("plain", {}), ("int4", {"denoiser": "int4"})):
        train(make_config(checkpoint__dir=str(tmp_path / name), quantize=quantize, train__steps=2, **looks))
    base = [events(tmp_path / name, "validation")[0]["base"] for name in ("plain", "int4")]
    assert base[0] != base[1] == pytest.approx(base[0], rel=0.1)
    pictures = [tmp_path / name / "samples/step-000000/000.png" for name in ("plain", "int4")]
    assert pictures[0].read_bytes() != pictures[1].read_bytes()


def test_a_quantized_encoder_has_cache_entries_of_its_own(make_config, tmp_path):
    options = {"train__steps": 2, "cache": {"dir": str(tmp_path / "cache")}}

    def encoded(name: str, **changes: Any) -> int:
        train(make_config(checkpoint__dir=str(tmp_path / name), **options, **changes))
        return next(each["items"] for each in events(tmp_path / name, "stage") if each["name"] == "captions")

    quantize = {"text_encoder": {"qwen3": "int8"}}
    assert encoded("plain") > 0
    assert encoded("quantized", quantize=quantize) > 0
    assert encoded("again", quantize=quantize) == 0
    assert encoded("other", quantize={**quantize, "exclude": [r"layers\.0\..*"]}) > 0
    assert encoded("plain-again") == 0
    assert losses(tmp_path / "plain") != losses(tmp_path / "quantized")


def test_an_encoder_that_trains_can_be_quantized(make_config, tmp_path):
    train(make_config(
        train__components=["denoiser", "qwen3"], train__steps=8, optimizer__lr=2e-2,
        quantize={"denoiser": "int8", "text_encoder": {"qwen3": "nf4"}},
    ))  # fmt: skip
    assert any("lora_B" in name and "text_model" not in name for name in load_file(tmp_path / "out/out.safetensors"))
    seen = list(losses(tmp_path / "out").values())
    assert sum(seen[-3:]) < sum(seen[:3])


@pytest.mark.parametrize("quantize", [{"denoiser": "nf4"}, INT8, {"denoiser": "fp8"}], ids=str)
def test_memory_services_give_the_same_run(make_config, tmp_path, quantize):
    """Recomputed, streamed and both: codes travel like any weight, and are read back again in the backward pass."""
    model = {"family": "anima", **make_tiny_anima(tmp_path / "model", denoiser=replace(DENOISER, blocks=6))}
    looks = {"sample": {"prompts": [PROMPT]}, "validate": {"split": 0.2, "every": None}}
    options = {"model": model, "quantize": quantize, "precision": BF16, "train__steps": 3, **looks}
    train(make_config(checkpoint__dir=str(tmp_path / "plain/run"), **options))
    for name, memory in (
        ("recomputed", {"checkpointing": "block"}),
        ("streamed", {"swap_blocks": 4}),
        ("both", {"swap_blocks": 4, "checkpointing": "selective"}),
    ):
        train(make_config(checkpoint__dir=str(tmp_path / name / "run"), memory=memory, **options))
        assert losses(tmp_path / name / "run") == losses(tmp_path / "plain/run")
        for file in ("run.safetensors", "samples/step-000003/000.png"):
            one, other = (load(tmp_path / each / "run" / file) for each in (name, "plain"))
            assert one == other


def load(path) -> Any:
    if path.suffix == ".png":
        return path.read_bytes()
    return {name: value.numpy().tobytes() for name, value in load_file(path).items()}


# --- the order --------------------------------------------------------------------------------------------------------


def test_quantization_comes_after_loading_and_before_adapters(make_config, monkeypatch):
    """Loaded weights are plain; adapters find quantized linears, which compute below them."""
    seen: list[str] = []
    real = quantizing.quantize_component

    def watched(module, *arguments, **options):
        assert not any("adapter" in each.__dict__ for each in module.modules())
        assert not list(quantized_linears(module))
        assert not any(weight.is_meta for weight in module.parameters())
        seen.append("quantize")
        return real(module, *arguments, **options)

    monkeypatch.setattr(quantizing, "quantize_component", watched)
    prepare = trainer.prepare_blocks

    def checked(models, *arguments):
        adapted = [each for each in models.denoiser.modules() if "adapter" in each.__dict__]
        assert adapted and all(isinstance(each, QuantizedLinear) for each in adapted)
        assert not any("forward" in block.__dict__ for block in models.denoiser.blocks)
        seen.append("adapters")
        return prepare(models, *arguments)

    monkeypatch.setattr(trainer, "prepare_blocks", checked)
    train(make_config(quantize={"denoiser": "int8"}, train__steps=1, memory={"checkpointing": "block"}))
    assert seen == ["quantize", "adapters"]


# --- quantized arithmetic ---------------------------------------------------------------------------------------------


def test_quantized_arithmetic_is_measured_before_it_is_used(make_config, tmp_path):
    """At random weights, where errors are as large as they get, it stays within the default limits."""
    train(make_config(quantize=INT8, precision=BF16, train__steps=2))
    [told] = events(tmp_path / "out", "parity")
    assert told["passed"] and told["arithmetic"] == "int8"
    assert 0 < told["loss"] < 0.02
    assert 0 < told["gradient"] < 0.1
    assert told["linears"] > 0 == told["others"]
    assert told["faster"] > 0
    train(make_config(checkpoint__dir=str(tmp_path / "weights"), quantize={"denoiser": "int8"}, precision=BF16,
                      train__steps=2))  # fmt: skip
    assert losses(tmp_path / "weights") != losses(tmp_path / "out")


def test_a_failed_check_refuses_with_the_numbers(make_config, tmp_path):
    with pytest.raises(UsageError, match="too far from plain arithmetic") as caught:
        train(make_config(quantize={**INT8, "parity": {"loss": 1e-9}}))
    assert "the loss differs by" in str(caught.value)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_failed_check_can_fall_back_and_says_so(make_config, tmp_path):
    parity = {"loss": 1e-9, "on_failure": "weights_only"}
    train(make_config(quantize={**INT8, "parity": parity}, train__steps=2))
    assert any("int8 arithmetic is not used" in each["message"] for each in events(tmp_path / "out", "warning"))
    train(make_config(checkpoint__dir=str(tmp_path / "weights"), quantize={"denoiser": "int8"}, train__steps=2))
    assert losses(tmp_path / "out") == losses(tmp_path / "weights")


def test_a_gradient_that_is_cut_fails_the_check(make_config, monkeypatch):
    """The defect of dynamic activation quantization elsewhere: right outputs, no gradient to the input."""
    from tuner.core.compute import quantized

    real = quantized.multiply
    monkeypatch.setattr(quantized, "multiply", lambda x, *rest: real(x.detach(), *rest))
    with pytest.raises(UsageError, match="gradient by"):
        train(make_config(quantize=INT8, train__steps=1))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantize", "message"),
    [
        ({"denoiser": "fp8", "activations": "fp8"}, "fp8 arithmetic cannot be used here"),
        ({"denoiser": "fp8_unscaled"}, "offered the scaled form alone"),
        ({"text_encoder": {"clip": "int8"}}, "no text encoder 'clip'"),
        ({"activations": "int8"}, "needs weights in int8"),
        ({"denoiser": "nf4", "activations": "int8"}, "needs weights in int8"),
        ({"exclude": ["x"]}, "nothing is quantized"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_by_check_and_train_alike(make_config, quantize, message):
    config = make_config(quantize=quantize, precision=BF16)
    for command in (check, train):
        with pytest.raises(UsageError, match=message):
            command(copy.deepcopy(config))


def test_a_pattern_that_matches_nothing_is_refused(make_config):
    with pytest.raises(UsageError, match="matches no linear of denoiser"):
        train(make_config(quantize={"denoiser": "int8", "exclude": ["blocks.7"]}))


def test_another_method_is_another_run(make_config, tmp_path):
    stop_after(make_config(quantize={"denoiser": "int8"}), 2)
    with pytest.raises(UsageError, match="not the configuration"):
        train(make_config(quantize={"denoiser": "nf4"}), resume="auto")


def test_devices_are_told_apart():
    from types import SimpleNamespace

    from tests.core.config.samples import build

    int8 = build(quantize=INT8)
    quantizing.check_quantize(int8, torch.device("cpu"))
    with pytest.raises(UsageError, match="does not run on mps"):
        quantizing.check_quantize(int8, torch.device("mps"))
    with pytest.raises(UsageError, match="has no such numbers"):
        quantizing.check_quantize(build(quantize={"denoiser": "fp8"}), torch.device("mps"))
    for version, passes in (((8, 6), False), ((8, 9), True), ((9, 0), True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "cuda", SimpleNamespace(get_device_capability=lambda _device, v=version: v))
            config = build(quantize={"denoiser": "fp8", "activations": "fp8"})
            if passes:
                quantizing.check_quantize(config, torch.device("cuda"))
            else:
                with pytest.raises(UsageError, match=r"needs CUDA compute capability 8\.9"):
                    quantizing.check_quantize(config, torch.device("cuda"))
