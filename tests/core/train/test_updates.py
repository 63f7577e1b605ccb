"""Ways to apply the optimizer, through whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tuner.core.errors import UsageError
from tuner.core.optim import FusedUpdate
from tuner.core.registry import open_run
from tuner.core.track.events import read_events
from tuner.core.train.run import train
from tuner.core.train.step import total_norm

FREE = {"train__clip_grad": None, "schedule": {"name": "constant"}}


def steps(folder: Path) -> list[tuple[float, float]]:
    events = read_events(folder / "events.jsonl")
    return [(each["loss"], each["grad_norm"]) for each in events if each["kind"] == "step"]


@pytest.mark.parametrize("fuse", ["parameter", "block"])
def test_fused_updates_train_the_same_and_go_on_exactly(make_config, tmp_path, fuse):
    def config(name, optimizer, **options):
        return make_config(
            checkpoint__dir=str(tmp_path / name),
            optimizer={"lr": 1e-3, "args": {"fused": False}, **optimizer},
            memory__checkpointing="block",
            **FREE,
            **options,
        )

    plain, fused = config("plain", {}, train__steps=4), config("fused", {"fuse": fuse}, train__steps=4)
    train(plain)
    train(config("fused", {"fuse": fuse}, train__steps=2))
    train(fused, resume="auto")
    for one, other in zip(steps(tmp_path / "fused"), steps(tmp_path / "plain"), strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    [path], [expected] = ((tmp_path / name).glob("*.safetensors") for name in ("fused", "plain"))
    before, after = load_file(expected), load_file(path)
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)


def test_gradients_of_one_block_at_a_time_are_in_memory(make_config, monkeypatch):
    most, original = [0], FusedUpdate._apply

    def apply(self, parameters):
        most.append(sum(parameter.grad.numel() for parameter in self.update.name_of if parameter.grad is not None))
        original(self, parameters)

    monkeypatch.setattr(FusedUpdate, "_apply", apply)
    options = {"optimizer": {"lr": 1e-3, "fuse": "block"}, "network": {}, "memory__checkpointing": "block"}
    train(make_config(train__mode="full", train__steps=1, **options, **FREE))
    run = open_run(make_config(train__mode="full", network={}))
    [block, *others] = run.model.load_models(["denoiser"]).denoiser.blocks
    assert others and max(most) <= sum(parameter.numel() for parameter in block.parameters())


def test_rounding_state_in_host_memory_and_a_bfloat16_adapter_go_on_exactly(make_config, tmp_path):
    options = {
        "precision": {"compute": "bf16", "adapter": "bf16"},
        "optimizer": {"name": "adamw_bf16", "lr": 1e-3, "rounding": "stochastic", "offload": True},
        "schedule": {"name": "constant"},
    }
    train(make_config(checkpoint__dir=str(tmp_path / "whole/run"), train__steps=4, **options))
    train(make_config(checkpoint__dir=str(tmp_path / "parts/run"), train__steps=2, **options))
    train(make_config(checkpoint__dir=str(tmp_path / "parts/run"), train__steps=4, **options), resume="auto")
    whole, parts = (next((tmp_path / name / "run").glob("*.safetensors")) for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


@pytest.mark.parametrize(
    ("mode", "precision"),
    [("lora", {"compute": "bf16", "adapter": "bf16"}), ("full", {"compute": "bf16"})],
    ids=["lora", "full"],
)
def test_bfloat16_gradients_added_up_in_float32_go_on_exactly(make_config, tmp_path, mode, precision):
    options = {
        "train__mode": mode,
        "train__accumulate": 3,
        "precision": {**precision, "gradients": "fp32"},
        "optimizer": {"name": "adamw", "lr": 1e-3, "rounding": "stochastic"},
        "schedule": {"name": "constant"},
        "memory__checkpointing": "block",
    }
    if mode == "full":
        options |= {"network": {}, "compile": {"enabled": True, "backend": "eager"}}
    for name, lengths in (("whole", (4,)), ("parts", (2, 4)), ("sums in bfloat16", (4,))):
        if name.startswith("sums"):
            options["precision"] = precision
        for length in lengths:
            config = make_config(checkpoint__dir=str(tmp_path / name / "run"), train__steps=length, **options)
            train(config, resume="auto" if length > lengths[0] else None)
    whole, parts, other = (
        next((tmp_path / name / "run").glob("*.safetensors")) for name in ("whole", "parts", "sums in bfloat16")
    )
    assert whole.read_bytes() == parts.read_bytes()
    assert whole.read_bytes() != other.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_gradients_is_not_rounded_to_their_dtype(dtype):
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(30, 40, generator=generator).to(dtype) for _ in range(3)]
    exact = torch.cat([each.double().flatten() for each in gradients]).norm()
    torch.testing.assert_close(total_norm(gradients).double(), exact, rtol=1e-6, atol=0)
    assert total_norm([]) == 0


@pytest.fixture
def tf32():
    """The flags of this process, which come back afterwards."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [each.allow_tf32 for each in flags]
    yield flags
    for each, value in zip(flags, before, strict=True):
        each.allow_tf32 = value


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_allowed_or_not_as_the_configuration_says(make_config, tf32, allowed):
    for each in tf32:
        each.allow_tf32 = not allowed
    train(make_config(precision={"compute": "fp32", "tf32": allowed}, train__steps=1))
    assert [each.allow_tf32 for each in tf32] == [allowed, allowed]


def test_a_torch_scheduler_sets_the_rates_and_goes_on_where_it_was(make_config, tmp_path):
    options = {
        "optimizer": {"lr": 1e-3, "lr_scale": "sqrt"},
        "train__batch_size": 2,
        "train__accumulate": 2,
        "schedule": {"class": "torch.optim.lr_scheduler.ExponentialLR", "args": {"gamma": 0.5}},
    }
    train(make_config(train__steps=2, **options))
    folder = train(make_config(train__steps=4, **options), resume="auto").folder
    rates = [next(iter(each["lr"].values())) for each in read_events(folder / "events.jsonl") if each["kind"] == "step"]
    assert rates == pytest.approx([2e-3, 1e-3, 5e-4, 2.5e-4])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": {"lr": 1, "fuse": "block"}}, "the norm of all gradients is known only after"),
        ({"optimizer": {"lr": 1, "fuse": "block"}, "train__accumulate": 2, **FREE}, "an update of its own"),
        ({"optimizer": {"lr": 1, "lr_scale": "linear"}}, "every update has one sample"),
        ({"optimizer": {"lr": 1, "rounding": "kahan"}}, "kahan rounding has no effect"),
        ({"precision": {"compute": "bf16", "adapter": "bf16", "gradients": "fp32"}}, "nothing is added up"),
        ({"precision": {"compute": "bf16", "gradients": "fp32"}, "train__accumulate": 2}, "is kept in float32"),
        ({"schedule": {"class": "torch.optim.lr_scheduler.StepLR", "warmup": 3}}, "warmup is not used with a class"),
        ({"schedule": {"class": "torch.optim.lr_scheduler.StepLR"}}, "refuses its settings"),
        ({"schedule": {"class": "torch.optim.lr_scheduler.ReduceLROnPlateau"}}, "follows a measured value"),
        ({"schedule": {"class": "nowhere"}}, "is no import path"),
        ({"schedule": {"args": {"gamma": 1}}}, "args is not used by the schedule"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_has_no_effect_or_cannot_work_is_an_error(make_config, options, words):
    with pytest.raises(UsageError, match=words):
        train(make_config(**options))
