"""Joint matrices: groups, joining, cutting apart. The numbers that matter are products."""

from __future__ import annotations

import pytest
import torch

from tuner.core.adapters.fused import Part, exchange_halves, join_parts, split_joint
from tuner.core.adapters.members import member_of
from tuner.core.adapters.targets import Target, join_fused
from tuner.core.errors import UsageError
from tuner.core.types import Fused

WIDTH = 6
QKV = Fused(parent=r"blocks\.\d+\.attn", members=("q", "k", "v"), rows=(1, 1, 1))
WIDE = Fused(parent=r"wide\.\d+", members=("attn.q", "mlp"), rows=(1, 4))


def part(rank: int, alpha: float, rows: int = WIDTH, seed: int = 0) -> Part:
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, WIDTH, generator=generator), torch.randn(rows, rank, generator=generator)
    return Part(down, up, torch.tensor(alpha))


def product(each: Part) -> torch.Tensor:
    return each.scale * each.up @ each.down


def target(path: str, **values: object) -> Target:
    return Target(**{"component": "denoiser", "path": path, "rank": 2, "alpha": 2.0, **values})  # type: ignore[arg-type]


def test_a_member_is_found_by_its_parent_and_its_place():
    found = member_of((WIDE, QKV), "blocks.3.attn.k")
    assert found is not None and found.index == 1
    assert found.paths == ("blocks.3.attn.q", "blocks.3.attn.k", "blocks.3.attn.v")
    assert member_of((WIDE,), "wide.0.attn.q").parent == "wide.0"
    for alone in ("blocks.3.attn.out", "more.blocks.3.attn.k", "blocks.3.k", "q"):
        assert member_of((QKV, WIDE), alone) is None


def test_a_shared_down_stays_one_and_comes_back_to_every_member():
    down = part(3, 1.0).down
    parts = [Part(down, part(3, 1.0, seed=seed).up, torch.tensor(6.0)) for seed in (1, 2, 3)]
    joint = join_parts(parts, (1, 1, 1), "qkv")
    assert joint.down.shape == (3, WIDTH) and joint.up.shape == (3 * WIDTH, 3) and joint.scale == 2.0
    torch.testing.assert_close(product(joint), torch.cat([product(each) for each in parts]))
    for before, after in zip(parts, split_joint(joint, (1, 1, 1), "qkv"), strict=True):
        assert after is not None
        assert torch.equal(before.up, after.up) and torch.equal(before.down, after.down)


@pytest.mark.parametrize(
    "parts",
    [
        [part(2, 2.0, seed=1), part(2, 2.0, seed=2), part(2, 2.0, seed=3)],
        [part(1, 3.0, seed=1), part(2, 0.5, seed=2), part(4, 4.0, seed=3)],
        [None, part(2, 1.0, seed=2), part(3, 1.0, seed=3)],
        [part(2, 1.0, seed=1), None, None],
    ],
    ids=["equal ranks", "different ranks and alphas", "a missing part", "one part"],
)
def test_separate_parts_are_stacked_with_equal_products_and_come_back_small(parts):
    joint = join_parts(parts, (1, 1, 1), "qkv")
    assert joint.down.shape[0] == sum(each.down.shape[0] for each in parts if each is not None)
    rows = [torch.zeros(WIDTH, WIDTH) if each is None else product(each) for each in parts]
    torch.testing.assert_close(product(joint), torch.cat(rows))
    for before, after in zip(parts, split_joint(joint, (1, 1, 1), "qkv"), strict=True):
        assert (before is None) == (after is None)
        if before is not None and after is not None:
            assert before.down.shape == after.down.shape
            torch.testing.assert_close(product(before), product(after))


def test_members_of_different_widths_are_cut_by_their_rows():
    parts = [part(2, 2.0, seed=1), part(2, 2.0, rows=4 * WIDTH, seed=2)]
    found = split_joint(join_parts(parts, (1, 4), "wide"), (1, 4), "wide")
    assert [each.up.shape[0] for each in found if each is not None] == [WIDTH, 4 * WIDTH]


def test_an_untrained_joint_matrix_is_not_taken_for_block_diagonal():
    joint = Part(torch.randn(6, WIDTH), torch.zeros(3 * WIDTH, 6), torch.tensor(6.0))
    assert [each.down.shape[0] for each in split_joint(joint, (1, 1, 1), "qkv") if each is not None] == [6, 6, 6]


def test_a_dead_component_does_not_lower_the_rank():
    parts = [part(2, 2.0, seed=seed) for seed in (1, 2, 3)]
    parts[1].up[:, 0] = 0
    found = split_joint(join_parts(parts, (1, 1, 1), "qkv"), (1, 1, 1), "qkv")
    assert [each.down.shape[0] for each in found if each is not None] == [2, 2, 2]


def test_wrong_shapes_are_named():
    with pytest.raises(UsageError, match="does not fit into qkv"):
        join_parts([part(2, 1.0, rows=WIDTH + 1), None, None], (1, 1, 1), "qkv")
    with pytest.raises(UsageError, match="has 20 rows"):
        split_joint(part(2, 1.0, rows=20), (1, 1, 1), "qkv")


def test_halves_are_exchanged_only_where_there_are_two():
    down, two, six = torch.zeros(1, 2), torch.arange(4.0)[:, None], torch.arange(12.0)[:, None]
    assert exchange_halves(down, two).flatten().tolist() == [2, 3, 0, 1]
    assert exchange_halves(down, six) is six


def test_targets_with_equal_settings_are_joined_in_the_order_of_the_rows():
    targets = [target("blocks.0.attn.v"), target("blocks.0.attn.out"), target("blocks.0.attn.q")]
    first, second = join_fused(targets, (QKV,))
    assert first.path == "blocks.0.attn.q+v" and first.paths == ("blocks.0.attn.q", "blocks.0.attn.v")
    assert second.path == "blocks.0.attn.out" and second.paths == ("blocks.0.attn.out",)


@pytest.mark.parametrize("values", [{"rank": 3}, {"alpha": 1.0}, {"lr": 1e-4, "group": "x"}, {"component": "other"}])
def test_targets_with_settings_of_their_own_stay_apart(values):
    targets = [target("blocks.0.attn.q"), target("blocks.0.attn.k"), target("blocks.0.attn.v", **values)]
    assert [each.path for each in join_fused(targets, (QKV,))] == ["blocks.0.attn.q+k", "blocks.0.attn.v"]
    assert len(join_fused([target("blocks.0.attn.q"), target("blocks.1.attn.k")], (QKV,))) == 2
