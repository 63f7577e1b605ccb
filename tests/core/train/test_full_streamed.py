"""Training the weights of blocks that live in host memory, through whole runs: nothing shows that they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.core.train.test_full import full
from tests.core.train.test_modes import stop_after
from tuner.core.errors import UsageError
from tuner.core.optim import FusedUpdate
from tuner.core.track.events import read_events
from tuner.core.train import trainer
from tuner.core.train.run import train

BUSY: dict[str, Any] = {
    "train__steps": 3,
    "validate": {"split": 0.2, "every": 2, "weights": "both"},
    "sample": {"prompts": ["a red dog --w 64 --h 64 --s 2 --n grass"], "every": 2, "weights": "both"},
    "ema": {"enabled": True, "decay": 0.95, "feedback": True},
    "checkpoint__every": 2,
}
"""Every kind of look at the weights, and something besides the optimizer that changes them."""
SERVICES: dict[str, dict[str, Any]] = {
    "clipped, in parts": {
        "train__components": ["denoiser", "llm_adapter"],
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "train__clip_grad": {"norm": 0.01},
        "train__accumulate": 2,
        "guidance": {"distill": {"scale": 2}},
    },
    "recomputed, fused, rounded at random, offloaded": {
        "precision": {"compute": "bf16"},
        "optimizer": {"name": "adafactor", "lr": 1e-3, "rounding": "stochastic", "fuse": "block", "offload": True},
        "train__clip_grad": None,
        "memory": {"checkpointing": "block"},
    },
    "partly frozen, added up in float32": {
        "precision": {"compute": "bf16", "gradients": "fp32"},
        "train__freeze": [r"denoiser:blocks\.1\..*", r"denoiser:.*norm\.weight"],
        "train__accumulate": 2,
        "optimizer": {"name": "lion", "lr": 1e-3, "rounding": "kahan", "lr_rules": [{"group": "mlp", "lr": 0}]},
        "memory": {"checkpointing": "selective", "checkpoint_every": 2},
    },
}


def with_streams(options: dict[str, Any], count: int) -> dict[str, Any]:
    return options | {"memory": options.get("memory", {}) | {"swap_blocks": count}}


def files(folder: Path) -> dict[str, bytes]:
    """Weights, averages, states and pictures, at the end and of every checkpoint."""
    found = (path for path in folder.rglob("*") if path.suffix in (".safetensors", ".png"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def numbers(folder: Path) -> dict[tuple[str, int], tuple[Any, ...]]:
    """Of the last time that each step was made, and each validation."""
    return {
        (each["kind"], each["step"]): (each.get("loss"), each.get("grad_norm"), each.get("adapted"), each.get("base"))
        for each in read_events(folder / "events.jsonl")
        if each["kind"] == "step" or each["kind"].startswith("validation")
    }


def compute_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates are computed on a device that no parameter is on; here it is the same memory under another name."""

    def elsewhere(*args: Any) -> Any:
        update = original(*args)
        inner = update.update if isinstance(update, FusedUpdate) else update
        inner.device, inner.away = torch.device("cpu", 0), set(inner.group_of)
        return update

    original = trainer.build_update
    monkeypatch.setattr(trainer, "build_update", elsewhere)


@pytest.mark.parametrize("options", SERVICES.values(), ids=SERVICES)
def test_a_run_has_the_same_outcome_also_in_parts(make_config, six_blocks, tmp_path, monkeypatch, streamings, options):
    options = {"model": six_blocks, **BUSY, **options}
    train(full(make_config, checkpoint__dir=str(tmp_path / "plain/run"), **options))
    if options["optimizer"]["name"] != "adamw":
        # Two kinds of it are different arithmetic; the others have one.
        compute_elsewhere(monkeypatch)
    config = full(make_config, checkpoint__dir=str(tmp_path / "streamed/run"), **with_streams(options, 4))
    stop_after(config, 1)
    train(config, resume="auto")
    plain, streamed = files(tmp_path / "plain/run"), files(tmp_path / "streamed/run")
    assert len([name for name in plain if name.endswith(".png")]) >= 2
    for name, content in plain.items():
        assert streamed[name] == content, name
    one, other = numbers(tmp_path / "plain/run"), numbers(tmp_path / "streamed/run")
    assert len(one) == 3 + 2 + 2 and one == other
    assert [len(each.blocks) for each in streamings] == [4, 4]
    assert all(each.loans and each.transfers.to_host > 0 for each in streamings)


def test_frozen_blocks_of_a_whole_model_are_never_copied_back(make_config, six_blocks, streamings):
    options = {"model": six_blocks, "train__components": ["llm_adapter"], "train__steps": 2}
    train(full(make_config, **with_streams(options, 4)))
    [streaming] = streamings
    assert not streaming.loans
    assert streaming.transfers.to_host == sum(
        piece.view(flat).nbytes
        for layout, flat in zip(streaming.layouts, streaming.host, strict=True)
        for piece in layout.pieces
    )


@pytest.mark.parametrize("name", ["prodigy", "adamw_schedulefree", "torch.optim.NAdam"])
def test_optimizers_that_need_all_weights_at_once_are_refused(make_config, six_blocks, name):
    options = {"model": six_blocks, "optimizer": {"name": name, "lr": 1.0}, "memory": {"swap_blocks": 4}}
    with pytest.raises(UsageError, match="cannot train streamed blocks"):
        train(full(make_config, **options))
