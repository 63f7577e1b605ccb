"""Training the weights themselves, through whole runs."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.core.train.test_modes import stop_after
from tuner.core.adapters import checkpoints
from tuner.core.config.optimizer import OptimizerConfig
from tuner.core.errors import UsageError
from tuner.core.optim.names import BUILTIN, keeps_rests
from tuner.core.registry import open_run
from tuner.core.track.events import read_events
from tuner.core.train.run import train

PARTS = ["denoiser", "llm_adapter"]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(folder / "events.jsonl") if event["kind"] == kind]


def full(make_config, **options: Any) -> dict[str, Any]:
    steady = {"optimizer": {"lr": 1e-3}, "schedule": {"name": "constant"}, "network": {}}
    return make_config(**{"train__mode": "full", **steady, **options})


MODES: dict[str, dict[str, Any]] = {
    "float32": {"train__components": PARTS},
    "bfloat16, fused, rounded at random": {
        "precision": {"compute": "bf16"},
        "optimizer": {"name": "adamw_bf16", "lr": 1e-3, "rounding": "stochastic", "fuse": "block", "offload": True},
        "train__clip_grad": None,
        "memory__checkpointing": "block",
    },
    "averaged": {"ema": {"enabled": True, "decay": 0.5}, "sample": {"prompts": ["a --w 64 --h 64 --s 1"], "every": 2}},
    "one part stops": {"train__components": PARTS, "train__stop_component_at": {"llm_adapter": 3}},
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_stopped_in_the_middle_it_goes_on_exactly(make_config, tmp_path, mode):
    for name, stops in (("whole", ()), ("parts", (1, 4))):
        options = {"train__steps": 6, "validate": {"split": 0.3, "every": 2}, **mode}
        config = full(make_config, checkpoint__dir=str(tmp_path / name / "run"), **options)
        for stop in stops:
            stop_after(config, stop)
        train(config, resume="auto" if stops else None)
    whole, parts = tmp_path / "whole/run", tmp_path / "parts/run"
    for file in whole.glob("*.safetensors"):
        assert (parts / file.name).read_bytes() == file.read_bytes()
    for kind in ("step", "validation"):
        one, other = (
            {event["step"]: (event.get("loss"), event.get("base"), event.get("adapted"))}
            for folder in (whole, parts)
            for event in events(folder, kind)[-1:]
        )
        assert one == other
    losses = [event["adapted"] - event["base"] for event in events(whole, "validation")]
    assert losses[-1] < 0


def test_the_file_keeps_names_and_what_did_not_train(make_config, model_files):
    folder = train(full(make_config, train__freeze=[r"denoiser:blocks\.0\..*"])).folder
    before, after = load_file(model_files["path"]), load_file(folder / "out.safetensors")
    assert list(before) == list(after)
    moved = {name for name in before if not torch.equal(before[name], after[name].to(before[name].dtype))}
    assert any("blocks.1." in name for name in moved)
    assert not any("blocks.0." in name or "llm_adapter" in name for name in moved)
    with safe_open(folder / "out.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and metadata["modelspec.architecture"].startswith("anima-")
    assert not any("network" in name for name in metadata)


def test_groups_have_their_own_rates_and_zero_freezes(make_config):
    rules = [{"group": "self_attn", "lr": 5e-4}, {"group": "mod", "lr": 0}]
    optimizer = {"lr": 1e-3, "lr_rules": rules, "lr_by_component": {"llm_adapter": 2e-4}}
    config = full(make_config, optimizer=optimizer, train__components=PARTS, train__steps=1)
    [step] = events(train(config).folder, "step")
    assert step["lr"] == {
        "denoiser base": 1e-3,
        "denoiser self_attn": 5e-4,
        "denoiser cross_attn": 1e-3,
        "denoiser mlp": 1e-3,
        "llm_adapter": 2e-4,
    }


@pytest.mark.parametrize("frozen", ["base", "llm_adapter"])
def test_every_group_can_be_frozen_by_its_name_and_no_other_with_it(make_config, frozen):
    optimizer = {"lr": 1e-3, "lr_rules": [{"group": frozen, "lr": 0}]}
    config = full(make_config, optimizer=optimizer, train__components=PARTS, train__steps=1)
    [step] = events(train(config).folder, "step")
    names = {name.removeprefix("denoiser ") for name in step["lr"]}
    assert names == {"base", "self_attn", "cross_attn", "mlp", "mod", "llm_adapter"} - {frozen}


def test_bitfit_trains_biases_alone(make_config):
    run = open_run(full(make_config, train__components=PARTS, train__freeze=["bitfit"]))
    network = run.model.build_network(run.model.load_models(PARTS))
    names = [name for group in network.param_groups for name in group.params]
    assert names and all(name.endswith(".bias") for name in names)


def test_a_component_that_stops_moves_no_more(make_config, tmp_path):
    files = []
    for steps in (2, 4):
        config = full(
            make_config,
            checkpoint__dir=str(tmp_path / str(steps)),
            train__steps=steps,
            train__components=PARTS,
            train__stop_component_at={"llm_adapter": 2},
            ema={"enabled": True, "decay": 0.95, "feedback": True},
        )
        files.append(load_file(train(config).folder / f"{steps}.safetensors"))
    short, long = files
    adapter = [name for name in short if "llm_adapter" in name]
    assert adapter and all(torch.equal(short[name], long[name]) for name in adapter)
    assert any(not torch.equal(short[name], long[name]) for name in short)


def test_an_average_starts_from_a_file_of_whole_weights(make_config, tmp_path):
    first = train(full(make_config, ema={"enabled": True, "decay": 0.5})).folder / "ema_out.safetensors"
    ema = {"enabled": True, "decay": 0.9999, "init_from": str(first)}
    config = full(make_config, checkpoint__dir=str(tmp_path / "second"), train__steps=1, ema=ema)
    second = load_file(train(config).folder / "ema_second.safetensors")
    for name, value in load_file(first).items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-4)


def test_no_more_than_one_tensor_is_held_beside_the_model(make_config, monkeypatch):
    """While a file is written; what is put together for it is the only copy."""
    alive: list[int] = []
    most: list[int] = []
    original = checkpoints.assembled

    def watched(*arguments):
        value = original(*arguments)
        alive.append(value.nbytes)
        weakref.finalize(value, alive.remove, value.nbytes)
        most.append(sum(alive))
        return value

    monkeypatch.setattr(checkpoints, "assembled", watched)
    folder = train(full(make_config, train__steps=1)).folder
    largest = max(value.nbytes for value in load_file(folder / "out.safetensors").values())
    # The one before lives until its name is given to the next.
    assert max(most) <= 2 * largest


def test_a_file_that_does_not_say_what_was_trained_is_noticed(make_config, monkeypatch):
    original = checkpoints.assembled
    calls = []

    def wrong(*arguments):
        calls.append(0)
        value = original(*arguments)
        return value + 1 if len(calls) == 3 else value

    monkeypatch.setattr(checkpoints, "assembled", wrong)
    with pytest.raises(UsageError, match="differs from the trained weights"):
        train(full(make_config, train__steps=1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"network": {"rank": 4}}, "network.rank: has no effect with train.mode 'full'"),
        ({"quantize": {"denoiser": "int8"}}, "quantized weights cannot train"),
        ({"train__components": ["denoiser", "qwen3"]}, "no program loads"),
        ({"train__freeze": ["denoiser:nothing"]}, "freezes nothing"),
        ({"train__freeze": [".*"]}, "everything is frozen"),
        ({"train__stop_component_at": {"denoiser": 2}}, "nothing would train in the end"),
        ({"train__stop_component_at": {"qwen3": 2}, "train__components": PARTS}, "it does not train"),
        ({"optimizer": {"lr": 1, "lr_rules": [{"group": "head", "lr": 1}]}}, "no parameter that trains is in a group"),
        ({"optimizer": {"lr": 1, "lr_rules": [{"lr": 1}]}}, "give match or group"),
        ({"precision": {"weights": "bf16"}}, "kept in precision.compute"),
        ({"checkpoint__format": "comfyui"}, "keep the layout"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_refused_by_name(make_config, options, words):
    with pytest.raises(UsageError, match=words):
        train(full(make_config, **options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train__freeze": ["bitfit"]}, "has no effect on an adapter"),
        ({"optimizer": {"lr": 1, "lr_rules": [{"group": "mod", "lr": 1}]}}, "adapters have no such groups"),
    ],
)
def test_what_belongs_to_whole_models_is_refused_for_adapters(make_config, options, words):
    with pytest.raises(UsageError, match=words):
        train(make_config(**options))


def test_rounding_to_the_nearest_is_warned_of(make_config, caplog):
    train(full(make_config, precision={"compute": "bf16"}, train__steps=1))
    assert "updates below 1/256 of a weight are lost" in caplog.text


def test_an_optimizer_that_keeps_what_rounding_loses_is_not_warned_of(make_config, caplog, monkeypatch):
    monkeypatch.setitem(BUILTIN, "adamw", replace(BUILTIN["adamw"], rounds=BUILTIN["optimi_adamw"].rounds))
    train(full(make_config, precision={"compute": "bf16"}, train__steps=1))
    assert "are lost" not in caplog.text


@pytest.mark.parametrize(
    ("name", "args", "kept"),
    [
        ("optimi_adamw", {}, True),
        ("optimi.StableAdamW", {}, True),
        ("stableadamw", {"kahan_sum": False}, False),
        ("adan", {}, False),
        ("adamw", {}, False),
    ],
)
def test_which_optimizers_keep_what_rounding_loses(name, args, kept):
    assert keeps_rests(OptimizerConfig(name=name, lr=1e-4, args=args)) is kept


def test_the_base_cannot_be_measured_again_in_another_way(make_config):
    train(full(make_config, validate={"split": 0.3, "timesteps": [500]}, train__steps=2))
    config = full(make_config, validate={"split": 0.3, "timesteps": [400, 500]}, train__steps=3)
    with pytest.raises(UsageError, match="was measured in another way when this run began"):
        train(config, resume="auto")
