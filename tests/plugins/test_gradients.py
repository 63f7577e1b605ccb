"""The gradient of what may train beside frozen parts, against the change of a loss, with blocks as a run prepares them.

A shortcut for frozen weights that cuts the graph of something else leaves a gradient that looks healthy and is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.fixtures.tiny_anima import make_tiny_anima
from tests.fixtures.tiny_flux import make_tiny_flux
from tests.fixtures.tiny_sd3 import make_tiny_sd3
from tuner.core.rng import Rng
from tuner.core.testing.bench import Bench
from tuner.core.train.blocks import prepare_blocks
from tuner.core.train.measure import shake

FAMILIES: dict[str, Callable[[Path], object]] = {
    "anima": make_tiny_anima,
    "flux": lambda folder: make_tiny_flux(folder, "dev"),
    "sd3": lambda folder: make_tiny_sd3(folder, flavour="sd35m"),
}
SIZE = 2e-3
"""Of the step whose change of the loss is compared; rounding and curvature are far below the tolerance."""


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_time_embedders_train_beside_frozen_modulation(family: str, tmp_path: Path) -> None:
    bench = Bench(family, {"model": FAMILIES[family](tmp_path / "model")}, tmp_path, lr=1e-3)
    network = {"targets": [".*(time_text_embed|t_embedder).*"], "train_norms": True}
    run = bench.open(network=network, memory={"checkpointing": "block"})
    models, trained = bench.adapted(run)
    prepare_blocks(models, trained.module, run.config, run.facts, torch.device("cpu"))
    shake(trained, seed=1)
    batch = bench.batch()
    noise = Rng(2, "noise").normal(batch.latents.shape)
    target = run.model.noise_target(batch.latents, noise, torch.full((len(noise),), 0.6))

    def loss() -> Tensor:
        found = run.model.predict(models, target.noisy, target.timesteps, batch.text)
        return (found.double() * Rng(3, "probe").normal(found.shape)).sum()

    params = {name: value for group in trained.param_groups for name, value in group.params.items()}
    for part in (".w_norm", ".down", ".up"):
        chosen = {name: value for name, value in params.items() if name.endswith(part)}
        steps = {name: Rng(4, name).normal(value.shape) for name, value in chosen.items()}
        gradients = torch.autograd.grad(loss(), list(chosen.values()))
        expected = sum(float((one * step).sum()) for one, step in zip(gradients, steps.values(), strict=True))
        sides = []
        with torch.no_grad():
            for sign in (1, -1):
                for name, value in chosen.items():
                    value.add_(steps[name], alpha=sign * SIZE)
                sides.append(float(loss()))
                for name, value in chosen.items():
                    value.sub_(steps[name], alpha=sign * SIZE)
        assert (sides[0] - sides[1]) / (2 * SIZE) == pytest.approx(expected, rel=0.02), part
