"""The order of an epoch is a pure function of plan, seed and epoch, and treats every item alike."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest

from tests.core.data.toy import source, toy_config, toy_plan
from tuner.core.data.order import epoch_order, validation_order
from tuner.core.data.plan import DataPlan

SQUARE, WIDE = (64, 64), (128, 64)


def make_plan(
    tmp_path: Path, sizes: dict[str, list[tuple[int, int]]], batch_size: int = 2, repeats: dict[str, int] | None = None,
    weights: dict[str, float] | None = None, **data,
) -> DataPlan:  # fmt: skip
    sources = [
        source(name, repeats=(repeats or {}).get(name, 1), weight=(weights or {}).get(name, 1.0)) for name in sizes
    ]
    sets = [{"resolution": 64, "batch_size": batch_size, "buckets": {"step": 16, "min": 16}, "sources": sources}]
    return toy_plan(toy_config(tmp_path, sets, data=data), sizes)


def duplicates(order) -> int:
    return sum(len(batch) - len({visit.item for visit in batch}) for batch in order)


def test_every_item_comes_exactly_its_number_of_repeats(tmp_path: Path):
    plan = make_plan(tmp_path, {"a": [SQUARE, WIDE] * 5, "b": [SQUARE] * 3}, repeats={"a": 1, "b": 4}, batch_size=3)
    for epoch in range(3):
        order = epoch_order(plan, 7, epoch)
        counts = Counter(visit.item for batch in order for visit in batch)
        assert all(counts[index] == item.repeats for index, item in enumerate(plan.items))
        assert len(order) == plan.batches_per_epoch


def test_visits_of_an_item_are_numbered_in_the_order_of_the_epoch(tmp_path: Path):
    plan = make_plan(tmp_path, {"a": [SQUARE] * 4}, repeats={"a": 3})
    seen: Counter[int] = Counter()
    for batch in epoch_order(plan, 1, 0):
        for visit in batch:
            assert visit.visit == seen[visit.item]
            seen[visit.item] += 1


def test_a_batch_holds_one_bucket_and_at_most_its_size(tmp_path: Path):
    plan = make_plan(tmp_path, {"a": [SQUARE] * 7 + [WIDE] * 4}, batch_size=4)
    order = epoch_order(plan, 3, 0)
    for batch in order:
        assert len({plan.items[visit.item].fit.bucket for visit in batch}) == 1
    assert sorted(map(len, order)) == [3, 4, 4]


def test_batches_of_all_buckets_are_mixed(tmp_path: Path):
    plan = make_plan(tmp_path, {"a": [SQUARE] * 40 + [WIDE] * 40})
    buckets = [plan.items[batch[0].item].fit.bucket for batch in epoch_order(plan, 3, 0)]
    changes = sum(left != right for left, right in itertools.pairwise(buckets))
    assert changes > 8


def test_the_order_is_the_same_for_the_same_seed_and_epoch_only(tmp_path: Path):
    plan = make_plan(tmp_path, {"a": [SQUARE] * 30})
    assert epoch_order(plan, 5, 2) == epoch_order(plan, 5, 2)
    others = [epoch_order(plan, 5, 3), epoch_order(plan, 6, 2), epoch_order(plan, 5, 0)]
    assert all(other != epoch_order(plan, 5, 2) for other in others)


def test_adding_images_to_one_bucket_keeps_the_plan_of_the_others_intact(tmp_path: Path):
    before = make_plan(tmp_path, {"a": [SQUARE] * 9})
    after = make_plan(tmp_path, {"a": [SQUARE] * 9 + [WIDE] * 2})

    def squares(plan: DataPlan) -> list[tuple[str, ...]]:
        batches = [[plan.items[visit.item] for visit in batch] for batch in epoch_order(plan, 1, 0)]
        return [tuple(item.id for item in batch) for batch in batches if batch[0].fit.bucket == SQUARE]

    assert squares(before) == squares(after)


@pytest.mark.parametrize(
    ("images", "repeats", "size"), [(2, 6, 2), (5, 4, 4), (9, 10, 8), (3, 50, 2), (30, 3, 8), (4, 5, 3), (8, 7, 7)]
)
def test_repeats_share_no_batch_when_that_can_be_avoided(tmp_path: Path, images, repeats, size):
    plan = make_plan(tmp_path, {"a": [SQUARE] * images}, repeats={"a": repeats}, batch_size=size)
    assert sum(duplicates(epoch_order(plan, seed, epoch)) for seed in range(3) for epoch in range(4)) == 0


def test_uneven_repeats_share_no_batch_when_that_can_be_avoided(tmp_path: Path):
    plan = make_plan(tmp_path, {"a": [SQUARE] * 20, "b": [SQUARE]}, repeats={"a": 1, "b": 9}, batch_size=3)
    assert plan.batches_per_epoch == 10
    assert sum(duplicates(epoch_order(plan, 0, epoch)) for epoch in range(20)) == 0


def test_unavoidable_repeats_in_a_batch_do_not_stop_the_run(tmp_path: Path):
    plan = make_plan(tmp_path, {"a": [SQUARE]}, repeats={"a": 10}, batch_size=4)
    assert [len(batch) for batch in epoch_order(plan, 0, 0)].count(4) == 2


def test_repeats_are_spread_over_the_epoch(tmp_path: Path):
    """With r repeats every r-th part of the epoch has about one visit, so the gap between two is bounded."""
    plan = make_plan(tmp_path, {"a": [SQUARE] * 100}, repeats={"a": 4}, batch_size=1)
    order = epoch_order(plan, 11, 0)
    for item in range(100):
        places = [index for index, batch in enumerate(order) if batch[0].item == item]
        assert all(100 * turn <= place < 100 * (turn + 1) for turn, place in enumerate(places))


def test_dropped_batches_differ_between_epochs(tmp_path: Path):
    plan = make_plan(tmp_path, {"a": [SQUARE] * 5}, short_batches="drop", batch_size=2)
    left_out = {
        frozenset(range(5)) - {visit.item for batch in epoch_order(plan, 0, epoch) for visit in batch}
        for epoch in range(8)
    }
    assert all(len(each) == 1 for each in left_out)
    assert len(left_out) > 1


def test_filled_batches_are_full_without_repeating_an_item_in_them(tmp_path: Path):
    plan = make_plan(tmp_path, {"a": [SQUARE] * 5}, short_batches="fill", batch_size=4)
    for epoch in range(5):
        order = epoch_order(plan, 0, epoch)
        assert [len(batch) for batch in order] == [4, 4]
        assert duplicates(order) == 0
        assert {visit.item for batch in order for visit in batch} == set(range(5))


def test_weighted_sampling_draws_sources_by_weight_times_size(tmp_path: Path):
    sizes = {"a": [SQUARE] * 60, "b": [SQUARE] * 20}
    plan = make_plan(tmp_path, sizes, batch_size=1, weights={"b": 3.0}, sampling="weighted")
    assert shares(plan)["b"] == pytest.approx(0.5, abs=0.06)
    assert len(epoch_order(plan, 0, 0)) == plan.batches_per_epoch == 80


def test_uniform_sampling_ignores_the_sizes(tmp_path: Path):
    sizes = {"a": [SQUARE] * 60, "b": [SQUARE] * 20}
    plan = make_plan(tmp_path, sizes, batch_size=1, weights={"a": 3.0}, sampling="uniform")
    assert shares(plan)["a"] == pytest.approx(0.75, abs=0.06)


def test_weighted_batches_hold_one_source_and_use_its_images_evenly(tmp_path: Path):
    plan = make_plan(tmp_path, {"a": [SQUARE] * 6, "b": [SQUARE] * 30}, sampling="uniform")
    order = epoch_order(plan, 2, 0)
    assert all(len({plan.items[visit.item].source for visit in batch}) == 1 for batch in order)
    uses = Counter(visit.item for batch in order for visit in batch if plan.items[visit.item].source == "a")
    assert max(uses.values()) - min(uses.values()) <= 1
    numbered = Counter((visit.item, visit.visit) for batch in order for visit in batch)
    assert max(numbered.values()) == 1


@pytest.mark.parametrize("sampling", ["weighted", "uniform"])
def test_a_bucket_without_a_full_batch_is_not_drawn_when_short_batches_are_dropped(tmp_path: Path, sampling):
    sizes = {"a": [SQUARE] * 6 + [WIDE], "b": [WIDE]}
    plan = make_plan(tmp_path, sizes, batch_size=2, sampling=sampling, short_batches="drop")
    order = [batch for epoch in range(10) for batch in epoch_order(plan, 0, epoch)]
    assert {plan.items[visit.item].fit.bucket for batch in order for visit in batch} == {SQUARE}
    assert len(order) == 10 * plan.batches_per_epoch == 30
    assert [note.partition(":")[0] for note in plan.notes] == ["bucket 80x48 is never trained"] * 2


def shares(plan: DataPlan) -> dict[str, float]:
    drawn = Counter(
        plan.items[visit.item].source for epoch in range(20) for batch in epoch_order(plan, 0, epoch) for visit in batch
    )
    return {name: count / drawn.total() for name, count in drawn.items()}


def test_validation_batches_come_in_a_fixed_order(tmp_path: Path):
    sets = [
        {
            "resolution": 64,
            "batch_size": 2,
            "buckets": {"step": 16, "min": 16},
            "sources": [source("a"), source("v", role="validation")],
        }
    ]
    plan = toy_plan(toy_config(tmp_path, sets), {"a": [SQUARE], "v": [SQUARE, WIDE, SQUARE, SQUARE]})
    assert validation_order(plan) == [(0, 2), (3,), (1,)]
