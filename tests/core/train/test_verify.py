"""``tuner verify``: what saves time or memory is compared with plain execution, and a wrong one is found."""

from __future__ import annotations

import json

import pytest
import torch

from tuner.cli.main import main
from tuner.core.train import verify as module
from tuner.core.train.verify import verify

LEVERS = {
    "memory": {"checkpointing": "block", "offload_activations": "sync"},
    "attention__split": True,
    "precision": {"compute": "fp32"},
}


def test_every_lever_is_compared_alone_and_then_all_together(make_config):
    found = verify(make_config(**LEVERS))
    assert [row.name for row in found.rows] == ["recomputed blocks", "attention", "all as configured"]
    assert found.ok and found.batches == 2
    assert all(4e-7 < each < 1e-4 for each in found.floor)


def test_streamed_blocks_are_compared(make_config, six_blocks):
    found = verify(make_config(model=six_blocks, memory={"swap_blocks": 4, "checkpointing": "block"}))
    assert [row.name for row in found.rows] == ["streamed blocks", "recomputed blocks", "all as configured"]
    assert found.ok


def test_without_any_lever_the_run_as_it_is_is_compared(make_config):
    found = verify(make_config())
    assert [row.name for row in found.rows] == ["all as configured"] and found.ok


def test_quantized_arithmetic_has_the_limits_of_its_own_check(make_config):
    quantize = {"denoiser": "int8", "activations": "int8", "parity": {"loss": 0.5, "gradient": 0.9}}
    [row] = verify(make_config(quantize=quantize)).rows
    assert row.allowed == (0.5, 0.9) and row.ok and row.gradient > 0


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_one_is_found_and_the_exit_code_says_so(make_config, monkeypatch, tmp_path, capsys, factor):
    original = module.prepare_blocks

    def damaged(models, *arguments):
        with torch.no_grad():
            next(models.denoiser.blocks[0].parameters()).mul_(factor)
        return original(models, *arguments)

    monkeypatch.setattr(module, "prepare_blocks", damaged)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(make_config(**LEVERS)), encoding="utf-8")
    assert main(["verify", str(path)]) == 1
    assert "DIFFERS" in capsys.readouterr().out


def test_the_result_is_json_for_scripts(make_config, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(make_config(**LEVERS)), encoding="utf-8")
    assert main(["verify", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and [row["name"] for row in found["rows"]][-1] == "all as configured"


def test_plain_execution_that_does_not_fit_is_told(make_config, monkeypatch):
    from tuner.core.errors import UsageError

    def full(*arguments, **named):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(module, "losses_and_gradient", full)
    with pytest.raises(UsageError, match="plain execution does not fit"):
        verify(make_config())
