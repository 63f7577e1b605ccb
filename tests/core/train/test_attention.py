"""Whole runs with other ways to attend: equal losses, and the kernel of samples is that of samples alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from tuner.core.compute import attention as module
from tuner.core.errors import UsageError
from tuner.core.track.events import read_events
from tuner.core.train import trainer
from tuner.core.train.run import train

BUSY: dict[str, Any] = {"train__steps": 2, "sample": {"prompts": ["a red dog --w 64 --h 64 --s 1"]}}


def losses(folder: Path) -> list[float]:
    return [each["loss"] for each in read_events(folder / "events.jsonl") if each["kind"] == "step"]


def test_samples_use_their_own_kernel(make_config, tmp_path, monkeypatch):
    plain, used = module.run_kernel, Counter[tuple[str, bool]]()

    def recorded(name: str, q: Tensor, *rest: Any) -> Tensor:
        used[name, q.requires_grad] += 1
        return plain(name, q, *rest)

    monkeypatch.setattr(module, "run_kernel", recorded)
    train(make_config(attention={"sample_backend": "math"}, **BUSY))
    # Caching texts and pixels attends without gradients as well.
    assert set(used) - {("sdpa", False)} == {("sdpa", True), ("math", False)}


def test_projections_of_their_own_train_the_same(make_config, tmp_path, monkeypatch):
    groups: list[int] = []
    plain = trainer.prepare_blocks

    def counted(models: Any, *rest: Any) -> Any:
        made = plain(models, *rest)
        linears = [each for each in models.denoiser.modules() if isinstance(each, nn.Linear)]
        groups.append(sum("storage_group" in each.__dict__ and "_proj" in name(models, each) for each in linears))
        return made

    def name(models: Any, linear: nn.Linear) -> str:
        return next(path for path, each in models.denoiser.named_modules() if each is linear)

    monkeypatch.setattr(trainer, "prepare_blocks", counted)
    found = []
    for fused in (True, False):
        folder = tmp_path / str(fused) / "run"
        train(make_config(checkpoint__dir=str(folder), train__steps=2, attention={"fuse_qkv": fused}))
        found.append(losses(folder))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert groups[0] > 0 and groups[1] == 0


def test_a_kernel_that_is_not_there_is_refused_before_anything_is_loaded(make_config, tmp_path):
    with pytest.raises(UsageError, match="NVIDIA GPUs only"):
        train(make_config(attention={"backend": "cudnn"}, precision={"compute": "bf16"}))
