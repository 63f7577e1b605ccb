"""What a plan says, and that every lever that costs or saves memory is in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from tests.core.plan.plans import document, planned, prepared
from tuner.core.adapters.targets import Options
from tuner.core.compute.low_bits import encode, stored_bytes
from tuner.core.config.optimizer import LrRule
from tuner.core.errors import UsageError
from tuner.core.memory import streaming, transfers
from tuner.core.optim import update
from tuner.core.plan import memory, weights
from tuner.core.plan.devices import CPU, DEVICES, device_like, device_named, parse_size
from tuner.core.plan.plan import predict
from tuner.core.plan.prepare import prepare
from tuner.core.plan.search import changed_config
from tuner.core.plan.trained import values_of

SAMPLES = {"sample": {"prompts": ["a red dog"]}}


def step(model: str = "anima", **sections: Any) -> float:
    return planned(model, **sections).phase("step").device


def test_the_phases_of_a_run_are_planned_in_their_order():
    plan = planned("anima", **SAMPLES)
    assert [each.name for each in plan.phases] == ["captions", "latents", "loading", "step", "preview", "save"]
    assert plan.peak == plan.phase("step").device
    assert planned("anima").phases[-1].name == "save"


def test_weights_and_pictures_that_are_not_here_are_told_and_assumed():
    plan = planned("flux")
    assert "sizes are those of the published model 'dev'" in " ".join(plan.notes)
    assert "one size per resolution is assumed" in " ".join(plan.notes)
    assert plan.updates == 1000 and plan.run_seconds == pytest.approx(1000 * plan.seconds)
    assert planned("flux", train={"epochs": 2, "steps": None}).run_seconds is None


def test_sizes_of_models_that_were_never_published_come_from_weights_alone():
    with pytest.raises(UsageError, match="no plan without weights: no published model has the flavour 'huge'"):
        prepared("anima", model={"flavour": "huge"})
    with pytest.raises(UsageError, match="which published model"):
        prepared("sd35-medium", model={"flavour": None})


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"memory": {"checkpointing": "block"}}, {"memory": {"checkpointing": "block", "checkpoint_every": 2}}),
        ({"memory": {"checkpointing": "block"}}, {"memory": {"checkpointing": "keep_attention"}}),
        ({"memory": {"checkpointing": "keep_attention"}}, {"memory": {"checkpointing": "selective"}}),
        ({"memory": {"checkpointing": "selective"}}, {}),
        (
            {"memory": {"checkpointing": "block", "offload_activations": "async"}},
            {"memory": {"checkpointing": "block"}},
        ),
        ({"memory": {"swap_blocks": 20}}, {"memory": {"swap_blocks": 10}}),
        ({"quantize": {"denoiser": "nf4"}}, {"quantize": {"denoiser": "int4"}}),
        ({"quantize": {"denoiser": "int4"}}, {"quantize": {"denoiser": "int8"}}),
        ({"quantize": {"denoiser": "int8"}}, {}),
        ({}, {"quantize": {"denoiser": "int8", "exclude": [".*mlp.*"]}, "train": {"batch_size": 2}}),
        ({}, {"precision": {"compute": "fp32"}}),
        ({}, {"network": {"rank": 64}}),
        ({"network": {"preset": "attention"}}, {}),
        ({"optimizer": {"name": "lion"}}, {}),
        ({}, {"optimizer": {"name": "prodigy", "lr": 1.0}}),
        ({}, {"ema": {"enabled": True, "device": "accelerator"}}),
        ({}, {"guidance": {"distill": {"scale": 3, "batched": True}}}),
    ],
)
def test_a_lever_changes_what_a_step_needs(less: dict[str, Any], more: dict[str, Any]):
    assert step(**less) < step(**more)


def test_what_leaves_the_device_is_found_in_host_memory():
    plain = planned("anima", memory={"checkpointing": "block"})
    for sections in (
        {"memory": {"checkpointing": "block", "swap_blocks": 20}},
        {"memory": {"checkpointing": "block", "offload_activations": "sync"}},
    ):
        plan = planned("anima", **sections)
        moved = plan.phase("step").host - plain.phase("step").host
        assert moved > 0.4e9 and plan.phase("step").device <= plain.phase("step").device - moved + 0.5e9
    cpu = planned("anima", device="cpu")
    assert cpu.peak == 0 and cpu.seconds is None
    assert cpu.phase("step").host > planned("anima").phase("step").device


def test_larger_pictures_and_batches_take_more_of_everything():
    small, large = planned("anima", resolution=512), planned("anima", resolution=1024)
    assert large.seconds > 3 * small.seconds and large.peak > 2 * small.peak
    double = planned("anima", train={"batch_size": 2})
    assert double.seconds == pytest.approx(2 * large.seconds, rel=0.05)


def test_streaming_costs_time_when_copies_take_longer_than_blocks():
    assert planned("anima", memory={"swap_blocks": 14}).seconds == planned("anima").seconds
    waiting = planned("anima", resolution=256, memory={"swap_blocks": 26})
    assert waiting.seconds > 1.5 * planned("anima", resolution=256).seconds


def test_full_fine_tuning_counts_weights_gradients_state_and_rounding():
    config, facts, work = prepared("anima", memory={"checkpointing": "block"})

    def found(**changes: Any) -> float:
        keys = {"train.mode": "full", **{key.replace("__", "."): value for key, value in changes.items()}}
        return predict(changed_config(config, keys), facts, work, CPU).phase("step").parts.copy()

    values = facts.costs.parameters
    plain = found()
    assert plain["optimizer"] == 8 * values and "adapter" not in plain
    assert plain["activations and gradients"] == 2 * values
    assert found(optimizer__name="adamw8bit")["optimizer"] == 2 * values
    assert found(optimizer__rounding="kahan")["optimizer"] == 10 * values
    assert found(precision__gradients="fp32", train__accumulate=2)["activations and gradients"] > 4 * values
    assert "optimizer" not in found(optimizer__offload=True)
    fused = found(optimizer__fuse="block")["activations and gradients"]
    assert fused < found(optimizer__fuse="off")["activations and gradients"] / 2
    assert found(optimizer__fuse="parameter")["activations and gradients"] < fused


def test_frozen_parts_of_a_whole_model_need_no_gradients_and_no_state():
    config, facts, work = prepared("anima", memory={"checkpointing": "block"})

    def plan(**changes: Any) -> Any:
        keys = {"train.mode": "full", **{key.replace("__", "."): value for key, value in changes.items()}}
        return predict(changed_config(config, keys), facts, work, device_named("4090"))

    mlp = sum(layer.size for path, layer in facts.costs.layers().items() if ".mlp." in path)
    whole, frozen = plan(), plan(train__freeze=(r"denoiser:.*\.mlp\..*",))
    assert whole.trained - frozen.trained == mlp
    assert whole.phase("step").parts["optimizer"] - frozen.phase("step").parts["optimizer"] == 8 * mlp
    assert plan(optimizer__lr_rules=(LrRule(group="mlp", lr=0),)).trained == frozen.trained
    assert plan(train__freeze=("bitfit",)).trained < 0.01 * whole.trained
    # A file holds the whole model all the same.
    assert whole.disk["checkpoints"] - frozen.disk["checkpoints"] == 8 * mlp
    streamed = plan(train__freeze=("bitfit",), memory__swap_blocks=20).phase("step")
    assert all(size >= 0 for size in streamed.parts.values()) and streamed.device < frozen.phase("step").device


def test_what_trains_in_streamed_blocks_is_counted_in_host_memory():
    config, facts, work = prepared("anima", memory={"checkpointing": "block"})

    def step(**changes: Any) -> Any:
        keys = {"train.mode": "full", **{key.replace("__", "."): value for key, value in changes.items()}}
        return predict(changed_config(config, keys), facts, work, device_named("4090")).phase("step")

    plain, streamed = step(), step(memory__swap_blocks=20)
    gone = plain.parts["weights"] - streamed.parts["weights"]
    values = gone / 2
    assert streamed.parts["optimizer"] == plain.parts["optimizer"] - 8 * values
    # Weights, gradients and state of what is streamed; three blocks have their gradients on the device for a while.
    assert streamed.host == pytest.approx(plain.host + (2 + 2 + 8) * values)
    least = plain.parts["activations and gradients"] - 2 * values
    assert least < streamed.parts["activations and gradients"] < least + 1.2e9
    assert step(memory__swap_blocks=20, optimizer__fuse="block").host < streamed.host - values
    frozen = step(memory__swap_blocks=20, train__components=("llm_adapter",))
    assert frozen.host == pytest.approx(plain.host + gone)


def test_streamed_blocks_that_train_cost_transfers():
    config, facts, work = prepared("anima", memory={"checkpointing": "block"})

    def seconds(count: int) -> float:
        changes = {"train.mode": "full", "memory.swap_blocks": count}
        found = predict(changed_config(config, changes), facts, work, device_named("4090")).seconds
        assert found is not None
        return found

    assert seconds(0) < seconds(10) < seconds(20)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("lora", {}, 4 * (96 + 64)),
        ("dora", {}, 4 * (96 + 64) + 96),
        ("loha", {}, 8 * (96 + 64)),
        ("lokr", {}, 8 * 8 + 4 * (12 + 8)),
        ("lokr", {"full_matrix": True}, 8 * 8 + 12 * 8),
        ("lokr", {"factor": 4}, 4 * 4 + 4 * (24 + 16)),
        ("ia3", {}, 96),
        ("ia3", {"on_input": True}, 64),
        ("full", {}, 96 * 64),
        ("oft", {"block_size": 32}, 96 * 32),
        ("oft", {"block_size": 40}, 96 * 32),
        ("oft", {"block_count": 2}, 96 * 48),
        ("boft", {"block_size": 12}, 4 * 96 * 12),
    ],
)
def test_values_of_an_adapter_are_those_of_its_kind(kind: str, options: dict[str, Any], expected: int):
    assert values_of(kind, 96, 64, 4, Options(**options)) == expected


def test_pictures_that_are_here_give_sizes_length_and_disk(tmp_path):
    for number, size in enumerate(((1024, 1024), (1024, 1024), (1280, 768))):
        Image.new("RGB", size, (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a square", encoding="utf-8")
    raw = document("anima", train={"epochs": 4, "steps": None}, cache={"dir": str(tmp_path / "cache")})
    raw["data"]["sets"][0]["sources"][0]["path"] = str(tmp_path)
    raw["data"]["workers"] = {"scan": 0}
    config, facts, work = prepare(raw)
    plan = predict(config, facts, work, device_named("4090"))
    assert work.seen and work.updates == plan.updates == 12 and len(work.shapes) == 2
    assert plan.disk["encoded images"] == pytest.approx(3 * 2 * 16 * 128**2, rel=0.1)
    assert plan.disk["encoded captions"] == 2 * 512 * (2 * 1024 + 1)


def test_more_checkpoints_take_more_disk():
    few = planned("anima").disk["checkpoints"]
    many = planned("anima", checkpoint={"every": 100}).disk["checkpoints"]
    assert planned("anima", checkpoint={"every": 100, "keep_last": 2}).disk["checkpoints"] < many
    assert planned("anima", checkpoint={"every": "10%"}).disk["checkpoints"] == many > few
    config, facts, work = prepared("anima", checkpoint={"state": "none"})
    changes = {"train.mode": "full", "checkpoint.dtype": None}
    full = predict(changed_config(config, changes), facts, work, CPU)
    assert full.disk["checkpoints"] == 2 * 2 * facts.costs.parameters


def test_devices_are_found_by_short_names_and_by_what_drivers_call_them():
    assert device_named("RTX 4090") is DEVICES["4090"]
    assert device_like("NVIDIA GeForce RTX 5070 Ti", 16e9).products == DEVICES["5070ti"].products
    assert not device_like("Some Accelerator", 16e9).is_timed
    with pytest.raises(UsageError, match="did you mean '4090'"):
        device_named("409")


def test_amounts_of_memory_are_read_with_their_units():
    assert (parse_size("12GB", ""), parse_size("8 GiB", ""), parse_size("6", "")) == (12e9, 8 * 2**30, 6e9)
    for text in ("much", "0GB", "-3"):
        with pytest.raises(UsageError, match="no amount of memory"):
            parse_size(text, "--vram")


def test_state_that_cannot_come_over_in_parts_is_there_as_a_whole_for_the_update():
    config, facts, work = prepared("anima")

    def peak(name: str) -> float:
        changes = {"train.mode": "full", "optimizer.name": name, "optimizer.offload": True}
        plan = predict(changed_config(config, changes), facts, work, device_named("h200"))
        return plan.phase("step").parts["activations and gradients"]

    assert peak("prodigy") == pytest.approx((2 + 16) * facts.costs.parameters)
    assert peak("adamw") < peak("prodigy") / 2


def test_an_encoder_on_the_cpu_takes_host_memory_instead_of_the_device() -> None:
    plain = {each.name: each for each in planned("flux").phases}
    moved = {each.name: each for each in planned("flux", text_encoder={"device": {"t5": "cpu"}}).phases}
    assert moved["captions"].device < 0.1 * plain["captions"].device
    assert moved["captions"].host > 0.9 * plain["captions"].device
    assert moved["step"] == plain["step"]


def test_pages_of_the_open_file_are_told_apart_from_memory_that_has_to_be_there() -> None:
    mapped = planned("flux", memory={"checkpointing": "block", "swap_blocks": 20})
    read = planned("flux", memory={"checkpointing": "block", "swap_blocks": 20}, model={"mmap": False})
    assert mapped.host_needed == read.host_needed == read.host == mapped.host - mapped.phase("loading").mapped
    assert mapped.phase("loading").mapped > 23e9


def test_the_plan_counts_with_the_numbers_of_the_services_that_it_plans():
    assert weights.SLOTS == streaming.SLOTS
    assert memory.IN_FLIGHT == 1 + transfers.FETCHES
    assert memory.OPTIMIZER_CHUNK == update.CHUNK_BYTES


@pytest.mark.parametrize("method", weights.QUANTIZED)
def test_the_plan_knows_the_bytes_of_quantized_weights(method: str):
    matrix = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    size = stored_bytes(encode(method, matrix.bfloat16()))
    assert size / matrix.numel() == pytest.approx(weights.QUANTIZED[method], rel=0.01)
