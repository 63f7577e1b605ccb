"""Pictures in tiles: never more at once than a tile, and the same picture where an autoencoder sees no further."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tuner.core.config.text import LatentsConfig
from tuner.core.registry.facade import ModelFacade
from tuner.core.rng import Rng
from tuner.core.types import Models

FACTOR = 8


class Hooks:
    """An autoencoder whose values depend on their own patch alone."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []
        self.draws: list[float] = []

    def encode_latents(self, pixels: Tensor, rng: Rng | None, **_: Any) -> Tensor:
        self.seen.append((pixels.shape[-1], pixels.shape[-2]))
        if rng is not None:
            self.draws.append(float(rng.normal((1,))))
        return F.avg_pool2d(pixels[:, :2], FACTOR)

    def decode_latents(self, latents: Tensor, **_: Any) -> Tensor:
        self.seen.append((latents.shape[-1], latents.shape[-2]))
        return F.interpolate(latents[:, [0, 1, 0]], scale_factor=FACTOR)


def facade(tiling: int | None) -> tuple[ModelFacade, Hooks]:
    hooks = Hooks()
    config: Any = SimpleNamespace(latents=LatentsConfig(tiling=tiling))
    facts: Any = SimpleNamespace(spatial_factor=FACTOR, latent_channels=2)
    return ModelFacade(title="a toy", config=config, facts=facts, files={}, _hooks=hooks), hooks


@pytest.mark.parametrize("size", [(64, 64), (128, 64), (72, 200), (256, 312)])
def test_tiles_give_the_picture_and_the_latents_that_the_whole_gives(size: tuple[int, int]) -> None:
    plain, tiled = facade(None)[0], facade(64)[0]
    pixels = torch.randn(2, 3, size[1], size[0], generator=torch.Generator().manual_seed(1))
    latents = plain.encode_latents(Models(), pixels)
    torch.testing.assert_close(tiled.encode_latents(Models(), pixels), latents)
    torch.testing.assert_close(tiled.decode_latents(Models(), latents), plain.decode_latents(Models(), latents))


def test_no_more_than_a_tile_is_worked_on_at_once() -> None:
    model, hooks = facade(64)
    latents = model.encode_latents(Models(), torch.zeros(1, 3, 200, 72), Rng(1))
    # Columns begin at 0 and 8, rows at 0, 48, 96 and 136: tiles of full size, moved inwards at the border.
    assert hooks.seen == [(64, 64)] * 8
    assert len(set(hooks.draws)) == 8
    hooks.seen.clear()
    model.decode_latents(Models(), latents)
    assert hooks.seen == [(8, 8)] * 8


def test_a_picture_that_is_one_tile_takes_the_plain_way() -> None:
    model, hooks = facade(64)
    model.encode_latents(Models(), torch.zeros(1, 3, 64, 48))
    assert hooks.seen == [(48, 64)]


def test_neighbours_go_over_into_each_other_without_a_step() -> None:
    model, hooks = facade(64)
    values = iter((0.0, 1.0))
    hooks.decode_latents = lambda latents, **_: torch.full(  # type: ignore[method-assign]
        (1, 3, latents.shape[-2] * FACTOR, latents.shape[-1] * FACTOR), next(values)
    )
    row = model.decode_latents(Models(), torch.zeros(1, 2, 8, 14))[0, 0, 0]
    assert row[:48].eq(0).all() and row[64:].eq(1).all()
    steps = row.diff()
    assert float(steps.min()) >= 0 and float(steps.max()) < 0.1
