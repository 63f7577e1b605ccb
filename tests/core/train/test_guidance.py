"""Whole runs with guidance in the target: neutral scales change no bit, others change the training and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.core.train.test_modes import losses, stop_after
from tuner.core.config import GuidanceConfig, GuidanceDistill
from tuner.core.train.empty import EmptyCaption, stacked
from tuner.core.train.run import train
from tuner.core.types import Field, TextEmbeds

CASES: dict[str, dict[str, Any]] = {
    "distilled": {"guidance": {"distill": {"scale": 3}}},
    "zero star, recomputed": {
        "guidance": {"distill": {"scale": 3, "zero_star": True}}, "memory__checkpointing": "block",
    },
    "differential": {"guidance": {"differential": 3}},
    "both, with dropout": {
        "guidance": {"distill": {"scale": 2}, "differential": 2}, "network__dropout": 0.3, "train__accumulate": 2,
    },
    "live text": {
        "guidance": {"distill": {"scale": 2}}, "train__components": ["denoiser", "llm_adapter", "qwen3"],
    },
}  # fmt: skip


def test_scales_of_one_leave_every_loss_as_it_is(make_config, tmp_path):
    train(make_config(checkpoint__dir=str(tmp_path / "plain")))
    neutral = {"distill": {"scale": 1}, "differential": 1}
    train(make_config(checkpoint__dir=str(tmp_path / "neutral"), guidance=neutral))
    assert losses(tmp_path / "neutral") == losses(tmp_path / "plain")


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_guided_runs_go_on_exactly(make_config, tmp_path, changes):
    options = {"train__steps": 4, **changes}
    train(make_config(checkpoint__dir=str(tmp_path / "whole/run"), **options))
    config = make_config(checkpoint__dir=str(tmp_path / "parts/run"), **options)
    stop_after(config, 2)
    train(config, resume="auto")
    assert losses(tmp_path / "parts/run") == losses(tmp_path / "whole/run")
    options.pop("guidance")
    train(make_config(checkpoint__dir=str(tmp_path / "plain/run"), **options))
    assert all(losses(tmp_path / "plain/run")[step] != loss for step, loss in losses(tmp_path / "whole/run").items())


def test_differential_guidance_multiplies_the_first_loss_by_its_square(make_config, tmp_path):
    for name, guidance in (("plain", {}), ("sharper", {"differential": 3})):
        train(make_config(checkpoint__dir=str(tmp_path / name), train__steps=1, guidance=guidance))
    assert losses(tmp_path / "sharper")[1] == pytest.approx(9 * losses(tmp_path / "plain")[1], rel=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("components", [["denoiser"], ["denoiser", "qwen3"]])
def test_one_doubled_batch_equals_two_passes(make_config, tmp_path, components, dropout):
    for name, batched in (("two", False), ("one", True)):
        guidance = {"distill": {"scale": 2, "batched": batched}}
        train(
            make_config(
                checkpoint__dir=str(tmp_path / name), train__steps=3, train__components=components,
                network__dropout=dropout, guidance=guidance,
            )
        )  # fmt: skip
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-4)


def test_a_recomputed_doubled_batch_equals_a_kept_one(make_config, tmp_path):
    for level in ("off", "block"):
        options = {"memory__checkpointing": level, "network__dropout": 0.4, "train__steps": 3}
        guidance = {"distill": {"scale": 2, "batched": True}}
        train(make_config(checkpoint__dir=str(tmp_path / level), guidance=guidance, **options))
    assert losses(tmp_path / "off") == pytest.approx(losses(tmp_path / "block"), rel=1e-5)


def test_a_file_says_which_guidance_it_was_trained_with(make_config, tmp_path):
    guidance = {"distill": {"scale": 2.5, "zero_star": True}, "differential": 2}
    train(make_config(train__steps=1, guidance=guidance))
    with safe_open(tmp_path / "out/out.safetensors", framework="pt") as file:
        told = {key: value for key, value in file.metadata().items() if key.startswith("ss_guidance")}
    assert told == {
        "ss_guidance_distill_scale": "2.5", "ss_guidance_zero_star": "True", "ss_guidance_differential": "2.0",
    }  # fmt: skip


FIELDS = {"states": Field(shape=("L", 2), trim="mask", pad=0.0), "mask": Field(shape=("L",), dtype="bool", trim="mask")}


def caption(length: int) -> TextEmbeds:
    states, mask = torch.randn(1, length, 2), torch.ones(1, length, dtype=torch.bool)
    return TextEmbeds(tensors={"states": states, "mask": mask})


def test_the_shorter_text_is_padded_as_the_loader_pads() -> None:
    long, short = caption(5), caption(2)
    for first, second in ((long, short), (short, long)):
        both = stacked(first, second, FIELDS).tensors
        assert both["states"].shape == (2, 5, 2)
        for row, one in enumerate((first, second)):
            length = one.tensors["mask"].shape[1]
            assert torch.equal(both["states"][row, :length], one.tensors["states"][0])
            assert both["mask"][row].sum() == length and not both["states"][row, length:].any()


def test_the_extra_pass_sees_the_same_noise_and_keeps_no_graph() -> None:
    weight = torch.ones((), requires_grad=True)
    seen = []

    def predict(noisy: torch.Tensor, timesteps: torch.Tensor, text: TextEmbeds) -> torch.Tensor:
        seen.append((noisy, timesteps, text.tensors["states"].shape[1], torch.is_grad_enabled()))
        return noisy * weight

    reads = []

    def cached(texts: list[str]) -> TextEmbeds:
        reads.append(texts)
        return caption(1)

    empty = EmptyCaption(
        GuidanceConfig(distill=GuidanceDistill(scale=2)), FIELDS, cached=cached,
        live=lambda texts: TextEmbeds(tensors={}),
    )  # fmt: skip
    noisy, timesteps = torch.randn(3, 1, 2, 2), torch.rand(3)
    for _ in range(2):
        prediction, unconditional = empty.predict(predict, noisy, timesteps, lambda: caption(4))
        assert prediction.requires_grad and unconditional is not None and not unconditional.requires_grad
    assert reads == [[""]]
    assert [entry[2:] for entry in seen] == [(1, False), (4, True)] * 2
    assert all(entry[0] is noisy and entry[1] is timesteps for entry in seen)
