"""The role ``preserve``: such samples pull towards the base model, whatever else the run does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.core.train.test_modes import losses, stop_after
from tuner.core.adapters.network import adapter_eval, adapter_strength
from tuner.core.data.plan import plan_data
from tuner.core.errors import UsageError
from tuner.core.registry import open_run
from tuner.core.train.caching import Caches
from tuner.core.train.run import train

CPU = torch.device("cpu")
HARD = {"optimizer__lr": 2e-2, "schedule": {"name": "constant"}}


@pytest.fixture
def with_role(make_config, pictures):
    """(role of the second source, changes) -> a configuration whose micro-batches mix two sources of the pictures."""

    def make(role: str, **changes: Any) -> dict[str, Any]:
        config = make_config(**changes)
        [entry] = config["data"]["sets"]
        second = {"id": "b", "path": str(pictures), "captions": {"prefix": "a photograph of "}, "role": role}
        entry["sources"] = [{"id": "a", "path": str(pictures)}, second]
        entry["batch_size"] = 3
        return config

    return make


@torch.no_grad()
def distance(config: dict[str, Any], file) -> float:
    """How far the adapter of a file moves predictions for the second source, relative to them."""
    run = open_run({**config, "network": {"rank": "from_file", "init_from": str(file)}})
    caches = Caches(run, plan_data(run.config, run.facts), CPU, None)
    caches.fill()
    models = caches.load_for_steps()
    network = run.model.build_network(models)
    moved = size = 0.0
    for batch in caches.data.loader().batches(0):
        rows = [index for index, item in enumerate(batch.items) if item.source == "b"]
        if not rows:
            continue
        sigmas = torch.linspace(0.2, 0.9, len(batch.items))
        noisy = run.model.noise_target(batch.latents, torch.ones_like(batch.latents), sigmas).noisy
        text = caches.text(models, [item.caption for item in batch.items])
        with adapter_eval(network):
            adapted = run.model.predict(models, noisy, sigmas, text)[rows]
            with adapter_strength(network, 0.0):
                base = run.model.predict(models, noisy, sigmas, text)[rows]
        moved, size = moved + float((adapted - base).square().sum()), size + float(base.square().sum())
    return (moved / size) ** 0.5


def test_preserved_pictures_stay_close_to_what_the_base_model_makes_of_them(with_role, tmp_path):
    """Closer than when they are trained on, and closer than when they are left out."""
    far = {}
    for name in ("train", "preserve", "nothing"):
        config = with_role("train" if name == "nothing" else name, train__steps=30, **HARD)
        config["checkpoint"]["dir"] = str(tmp_path / name)
        config["data"]["sets"][0]["sources"][1]["enabled"] = name != "nothing"
        train(config)
        config["data"]["sets"][0]["sources"][1]["enabled"] = True
        far[name] = distance(config, tmp_path / name / f"{name}.safetensors")
    assert far["preserve"] < 0.8 * min(far["train"], far["nothing"]), far


def test_before_anything_is_learnt_they_lose_nothing_and_the_others_lose_as_always(with_role, tmp_path):
    options = {"train__steps": 4, "optimizer__lr": 1e-30, "data__short_batches": "drop", "train__accumulate": 4}
    found = {}
    for role in ("train", "preserve"):
        train(with_role(role, checkpoint__dir=str(tmp_path / role), **options))
        found[role] = losses(tmp_path / role)
    alone = with_role("preserve", checkpoint__dir=str(tmp_path / "alone"), **options)
    [entry] = alone["data"]["sets"]
    entry["sources"][1]["enabled"] = False
    entry["sources"][1]["role"] = "train"
    train(alone)
    assert found["preserve"][1] < found["train"][1]
    assert found["preserve"][1] == pytest.approx(losses(tmp_path / "alone")[1] / 2, rel=1e-5)


SERVICES: dict[str, dict[str, Any]] = {
    "guided, with dropout and live text": {
        "guidance": {"distill": {"scale": 2, "batched": True}, "differential": 2},
        "network__dropout": 0.3,
        "train__components": ["denoiser", "llm_adapter", "qwen3"],
    },
    "an average, recomputed, two batches an update": {
        "ema": {"enabled": True, "decay": 0.5},
        "memory__checkpointing": "block",
        "train__accumulate": 2,
    },
}


@pytest.mark.parametrize("changes", SERVICES.values(), ids=SERVICES)
def test_with_other_services_it_goes_on_exactly(with_role, tmp_path, changes):
    options = {"train__steps": 3, **HARD, **changes}
    train(with_role("preserve", checkpoint__dir=str(tmp_path / "whole/run"), **options))
    config = with_role("preserve", checkpoint__dir=str(tmp_path / "parts/run"), **options)
    stop_after(config, 2)
    train(config, resume="auto")
    assert losses(tmp_path / "parts/run") == losses(tmp_path / "whole/run")


def test_streamed_blocks_survive_the_pass_without_gradients(with_role, six_blocks, tmp_path):
    options = {"model": dict(six_blocks), "train__steps": 2, **HARD}
    train(with_role("preserve", checkpoint__dir=str(tmp_path / "plain"), **options))
    train(with_role("preserve", checkpoint__dir=str(tmp_path / "streamed"), memory__swap_blocks=4, **options))
    assert losses(tmp_path / "plain") == losses(tmp_path / "streamed")


def test_full_fine_tuning_has_no_base_to_preserve(with_role):
    config = with_role("preserve", train__mode="full")
    del config["network"]
    with pytest.raises(UsageError, match="needs the base model"):
        train(config)
