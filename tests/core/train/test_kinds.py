"""Whole runs with other kinds of adapters: services together, exact resumption, an average, a start from a file."""

from __future__ import annotations

from typing import Any

import pytest
from safetensors.torch import load_file

from tests.core.train.test_modes import losses, stop_after
from tuner.core.errors import UsageError
from tuner.core.train.run import train

EMA = {"enabled": True, "decay": 0.7}
RUNS: dict[str, dict[str, Any]] = {
    "dora on int8": {"network": {"type": "dora", "rank": 2}, "quantize": {"denoiser": "int8"}},
    "lokr with norms": {"network": {"type": "lokr", "rank": 2, "train_norms": True, "module_dropout": 0.3}},
}


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_stopped_it_goes_on_exactly_with_its_average(make_config, tmp_path, changes):
    options = {"train__steps": 4, "ema": EMA, **changes}
    train(make_config(checkpoint__dir=str(tmp_path / "whole/run"), **options))
    config = make_config(checkpoint__dir=str(tmp_path / "parts/run"), **options)
    stop_after(config, 2)
    train(config, resume="auto")
    assert losses(tmp_path / "parts/run") == losses(tmp_path / "whole/run")
    for name in ("run.safetensors", "ema_run.safetensors"):
        assert (tmp_path / "parts/run" / name).read_bytes() == (tmp_path / "whole/run" / name).read_bytes()


@pytest.mark.parametrize("kind", ["oft", "full"])
def test_a_run_can_start_from_the_file_of_another(make_config, tmp_path, kind):
    network = {"type": kind, "train_norms": kind == "full"}
    first = tmp_path / "first"
    train(make_config(checkpoint__dir=str(first), network=network, train__steps=2))
    start = {"type": kind, "rank": "from_file", "init_from": str(first / "first.safetensors")}
    if kind == "full":
        start["train_norms"] = True
    average = {"enabled": True, "decay": 0.9, "init_from": str(first / "first.safetensors")}
    options = {"network": start, "ema": average, "train__steps": 1, "optimizer__lr": 1e-9}
    train(make_config(checkpoint__dir=str(tmp_path / "second"), **options))
    before, after = (load_file(tmp_path / name / f"{name}.safetensors") for name in ("first", "second"))
    assert before.keys() == after.keys()
    assert all((value - after[name]).abs().max() < 1e-6 for name, value in before.items())


def test_a_format_whose_readers_do_not_know_the_kind_is_refused_before_anything_is_loaded(make_config):
    with pytest.raises(UsageError) as error:
        train(make_config(network={"type": "lokr"}, checkpoint__format="diffusers"))
    assert "does not hold lokr" in str(error.value) and "comfyui, comfyui-alpha, sd-scripts" in str(error.value)


def test_a_ratio_for_matrices_that_a_kind_does_not_have_is_refused(make_config):
    config = make_config(network={"type": "lokr", "rank": 2}, optimizer={"lr": 1e-3, "loraplus": {"denoiser": 4}})
    with pytest.raises(UsageError, match="loraplus"):
        train(config)
