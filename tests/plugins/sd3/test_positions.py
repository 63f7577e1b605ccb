"""Position tables and their windows against recorded ones."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import golden
from tuner.core.errors import UsageError
from tuner.core.rng import Rng
from tuner.plugins.sd3.hooks import random_corner
from tuner.plugins.sd3.positions import PatchEmbed, ScaledTables, sincos_table, training_size, window

WIDTH, SIDE = 128, 10


@pytest.fixture(scope="module")
def recorded():
    return golden("sd3/sampler_and_pos_embed.safetensors")


def patches(key: str) -> tuple[int, int]:
    rows, columns = key.rpartition(".")[2].split("x")
    return int(rows) // 2, int(columns) // 2


def test_the_plain_table_and_its_centred_windows(recorded):
    table = sincos_table(WIDTH, SIDE)
    torch.testing.assert_close(table[:, :64], recorded["plain.table"], rtol=0, atol=1e-6)
    for key in (key for key in recorded if key.startswith("plain.crop")):
        torch.testing.assert_close(window(table, *patches(key)), recorded[key], rtol=0, atol=1e-6)


def test_scaled_tables_are_chosen_by_area_and_give_the_recorded_windows(recorded):
    tables = ScaledTables(WIDTH, [4, 8])
    assert tables.thresholds() == [tuple(row) for row in recorded["scaled.thresholds"].tolist()]
    for key in (key for key in recorded if key.startswith("scaled.crop")):
        rows, columns = patches(key)
        made = window(tables.table(rows, columns, torch.device("cpu")), rows, columns)
        torch.testing.assert_close(made, recorded[key], rtol=0, atol=1e-6)


def test_an_image_that_is_longer_than_its_table_gets_a_table_of_its_own():
    tables = ScaledTables(WIDTH, [4])
    assert tables.size_for(2, 9) == 9
    assert tables.table(2, 9, torch.device("cpu")).shape == (1, 13 * 13, WIDTH)


def test_a_picture_larger_than_the_stored_table_is_refused_in_words():
    embed = PatchEmbed(torch.nn.Conv2d(4, 8, 2, stride=2), torch.zeros(1, 36, 8))
    assert embed(torch.zeros(1, 4, 12, 12)).shape == (1, 36, 8)
    with pytest.raises(UsageError, match="7x6 patches is larger than the model's table"):
        embed(torch.zeros(1, 4, 12, 14))


def test_a_training_size_is_the_square_of_the_same_area():
    assert training_size((1024, 1024), 16) == 64
    assert training_size((1344, 768), 16) == 63


def test_a_random_window_moves_in_training_alone():
    embed = PatchEmbed(torch.nn.Conv2d(16, WIDTH, 2, 2), sincos_table(WIDTH, SIDE))
    noisy = torch.zeros(1, 16, 8, 12)
    assert random_corner(embed, noisy, 1.0, None) is None
    assert random_corner(embed, noisy, 0.0, Rng(0)) is None
    corners = {random_corner(embed, noisy, 1.0, Rng(seed)) for seed in range(200)}
    assert corners == {(top, left) for top in range(7) for left in range(5)}
    drawn = [random_corner(embed, noisy, 0.25, Rng(seed)) for seed in range(400)]
    assert 60 < sum(corner is not None for corner in drawn) < 140


@torch.no_grad()
def test_the_corner_decides_which_part_of_the_table_is_added():
    embed = PatchEmbed(torch.nn.Conv2d(16, WIDTH, 2, 2), sincos_table(WIDTH, SIDE))
    noisy = torch.randn(1, 16, 8, 12)
    centred = embed(noisy)
    embed.corner = (0, 4)
    moved = embed(noisy)
    expected = window(embed.pos_embed, 4, 6, (0, 4)) - window(embed.pos_embed, 4, 6)
    torch.testing.assert_close(moved - centred, expected, rtol=0, atol=1e-5)
