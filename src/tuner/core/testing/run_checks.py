"""Checks of whole trainings: the ways to run one agree, and what it leaves behind is what it trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tuner.core.adapters.checkpoints import stored_files
from tuner.core.adapters.network import load_network_tensors, network_tensors
from tuner.core.errors import UsageError
from tuner.core.files import safetensors_header
from tuner.core.testing.bench import STEPS, Bench, assert_near, losses
from tuner.core.track.events import read_events
from tuner.core.train.checkpoint import STATE_TENSORS, list_checkpoints
from tuner.core.train.folder import RunFolder

NEAR = 1e-3
"""Relative: encoders and blocks see other batch shapes in the variants of a run."""

QUANTIZED = 0.1
"""Relative: what int8 weights change about a loss; random weights have errors as large as they get."""
SAME: Mapping[str, Mapping[str, Any]] = {
    "attention kept": {"memory": {"checkpointing": "keep_attention"}},
    "products kept": {"memory": {"checkpointing": "selective", "checkpoint_every": 2}},
    "inputs offloaded": {"memory": {"checkpointing": "block", "offload_activations": "async"}},
    "neutral": {
        "guidance": {"distill": {"scale": 1}, "differential": 1},
        "ema": {"enabled": True},
        "optimizer": {"offload": True},
    },
}
"""Settings by service."""


class RunChecks:
    """Trainings of a few steps on six pictures."""

    def test_two_aspect_ratios_train_in_one_run(self, bench: Bench) -> None:
        events = list(read_events(bench.trained / "events.jsonl"))
        plan = next(event["plan"] for event in events if event["kind"] == "run_start")
        assert len(plan["buckets"]) == 2
        assert len(losses(bench.trained)) == STEPS
        assert all(loss is not None for loss in losses(bench.trained).values())

    def test_a_run_without_caches_trains_the_same(self, bench: Bench) -> None:
        folder = bench.train("live", cache={"latents": "off", "text": "off"})
        assert losses(folder) == pytest.approx(losses(bench.trained), rel=NEAR)

    def test_a_checkpointed_run_trains_the_same(self, bench: Bench) -> None:
        folder = bench.train("recomputed", memory={"checkpointing": "block"})
        assert losses(folder) == pytest.approx(losses(bench.trained), rel=NEAR)

    @pytest.mark.parametrize("name", SAME)
    def test_services_that_compute_otherwise_train_to_the_same_bits(self, bench: Bench, name: str) -> None:
        """As do those that are on and change nothing."""
        folder = bench.train(name.replace(" ", "-"), train={"steps": 2}, **SAME[name])
        expected = {step: loss for step, loss in losses(bench.trained).items() if step <= 2}
        assert losses(folder) == expected

    def test_attention_of_one_sample_at_a_time_trains_the_same(self, bench: Bench) -> None:
        folder = bench.train("split", train={"steps": 2}, attention={"backend": "math", "split": True})
        expected = {step: loss for step, loss in losses(bench.trained).items() if step <= 2}
        assert losses(folder) == pytest.approx(expected, rel=NEAR)

    def test_an_adapter_learns_on_quantized_weights(self, bench: Bench) -> None:
        if "quantize.int8" in bench.facts.capabilities:
            return
        folder = bench.train("quantized", train={"steps": 2}, quantize={"denoiser": "int8"})
        expected = {step: loss for step, loss in losses(bench.trained).items() if step <= 2}
        assert losses(folder) != expected
        assert losses(folder) == pytest.approx(expected, rel=QUANTIZED)

    def test_a_streamed_run_trains_the_same(self, bench: Bench) -> None:
        """Blocks in host memory, as many as may be; more than that are refused."""
        limit = max(0, sum(each.count for each in bench.facts.block_lists) - 2)
        with pytest.raises(UsageError, match="swap_blocks"):
            bench.train("too-many", memory={"checkpointing": "block", "swap_blocks": max(2, limit + 1)})
        if limit >= 2:
            folder = bench.train("streamed", memory={"checkpointing": "block", "swap_blocks": limit})
            assert losses(folder) == pytest.approx(losses(bench.trained), rel=NEAR)

    def test_a_run_in_two_parts_is_one_run(self, bench: Bench) -> None:
        """Stopped inside an epoch and resumed: the same losses and the same bytes."""
        bench.train("parts", train={"steps": 2})
        folder = bench.train("parts", resume="auto")
        assert losses(folder) == losses(bench.trained)
        assert adapter(folder).read_bytes() == adapter(bench.trained).read_bytes()

    def test_an_exported_adapter_predicts_what_was_trained(self, bench: Bench) -> None:
        """The final file, opened as a user would, against the exact state of the run."""
        batch = bench.batch()
        models, network = bench.adapted(bench.run)
        state = load_file(list_checkpoints(RunFolder(bench.trained, "adapter"))[-1] / STATE_TENSORS)
        own = {name.removeprefix("network/"): value for name, value in state.items() if name.startswith("network/")}
        load_network_tensors(network, own)
        reopened = bench.open(network={"init_from": str(adapter(bench.trained)), "rank": "from_file"})
        others, _ = bench.adapted(reopened)
        expected = bench.predict(bench.run, models, batch)
        assert_near(bench.predict(reopened, others, batch), expected)

    def test_whole_weights_train_and_their_file_is_the_model(self, bench: Bench) -> None:
        """Every tensor under its old name; opened as the model, it predicts what was trained."""
        if not bench.facts.stored:
            with pytest.raises(UsageError, match=r"train\.mode"):
                bench.open(train={"mode": "full"})
            return
        folder = bench.train("whole", train={"mode": "full"}, optimizer={"lr": 1e-3})
        run = bench.open(train={"mode": "full"})
        models, network = bench.adapted(run)
        state = load_file(list_checkpoints(RunFolder(folder, "adapter"))[-1] / STATE_TENSORS)
        before = {name: value.clone() for name, value in network_tensors(network).items()}
        load_network_tensors(network, {name: state[f"network/{name}"] for name in before})
        assert any(not value.equal(before[name]) for name, value in network_tensors(network).items())
        assert list(safetensors_header(adapter(folder))) == list(stored_files(run.config, run.facts)[0].header)
        reopened = bench.open(model={"path": str(adapter(folder))})
        others = reopened.model.load_models(["denoiser"])
        batch = bench.batch()
        assert_near(bench.predict(reopened, others, batch), bench.predict(run, models, batch))
        limit = sum(each.count for each in bench.facts.block_lists) - 2
        if limit >= 2:
            memory = {"checkpointing": "block", "swap_blocks": limit}
            streamed = bench.train("whole-streamed", train={"mode": "full"}, optimizer={"lr": 1e-3}, memory=memory)
            assert losses(streamed) == losses(folder)
            one, other = load_file(adapter(folder)), load_file(adapter(streamed))
            assert all(value.equal(other[name]) for name, value in one.items())


def adapter(folder: Path) -> Path:
    """The final file of a run."""
    [path] = folder.glob("*.safetensors")
    return path
