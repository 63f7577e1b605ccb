"""The plan: repeats, balance, buckets, filters, hold-out, report and fingerprint."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.data.toy import source, toy_config, toy_plan
from tests.helpers import golden
from tuner.core.data.report import report_plan
from tuner.core.data.split import split_validation
from tuner.core.errors import UsageError

SIZES = [(64, 64), (64, 64), (96, 48), (48, 96), (128, 64)]
SMALL = {"resolution": 64, "buckets": {"step": 16, "min": 16}}


@pytest.mark.parametrize("case", golden("core/dataset_counts.json")["datasets"])
def test_counts_agree_with_the_reference(case, tmp_path: Path):
    """Repeats after balancing, images per bucket and batches per epoch; short batches are kept."""
    sources = [source("train", repeats=case["num_repeats"])]
    sizes = {"train": [tuple(size) for size in case["train_sizes"]]}
    if case["reg_sizes"]:
        sources.append(source("reg", role="regularisation", repeats=case["reg_num_repeats"]))
        sizes["reg"] = [tuple(size) for size in case["reg_sizes"]]
    buckets = {"step": 64, "min": 256, "max": 1024}
    config = toy_config(
        tmp_path, [{"resolution": 512, "batch_size": case["batch_size"], "buckets": buckets, "sources": sources}]
    )
    plan = toy_plan(config, sizes, multiple=16)

    assert {f"{item.source}/{item.record.key}": item.repeats for item in plan.items} == case["effective_repeats"]
    counts = [[list(group.bucket), sum(plan.items[i].repeats for i in group.items)] for group in plan.groups]
    assert sorted(counts) == sorted(case["bucket_counts"])
    assert plan.batches_per_epoch == case["batches_per_epoch"]


def test_regularisation_images_carry_the_weight_and_training_images_do_not(tmp_path: Path):
    config = toy_config(
        tmp_path,
        [{**SMALL, "sources": [source("a"), source("reg", role="regularisation")]}],
        data={"regularisation_weight": 0.25},
    )
    plan = toy_plan(config, {"a": SIZES, "reg": SIZES[:2]})
    assert {(item.source, item.loss_weight) for item in plan.items} == {("a", 1.0), ("reg", 0.25)}


def test_a_drawn_ratio_belongs_to_the_image_and_is_the_same_in_every_run_and_resolution(tmp_path: Path):
    crop = {"aspect": "random", "aspect_list": [0.5, 1.0, 1.0, 2.0]}
    sets = {"resolution": [128, 64], "batch_size": 1, "buckets": {"rule": "simpletuner", "step": 16}, "crop": crop}
    config = toy_config(tmp_path, [{**sets, "sources": [source("a")]}])
    plan = toy_plan(config, {"a": [(200, 200)] * 60})
    ratios = [[round(item.fit.bucket[0] / item.fit.bucket[1], 1) for item in plan.items if item.tier == tier]
              for tier in (0, 1)]  # fmt: skip
    shapes = sorted(set(ratios[0]))
    assert len(shapes) == 3 and shapes[1] == 1.0
    assert [(a > 1) - (a < 1) for a in ratios[0]] == [(a > 1) - (a < 1) for a in ratios[1]]
    counts = [ratios[0].count(shape) for shape in shapes]
    assert 5 <= counts[0] <= 25 and 20 <= counts[1] <= 40 and 5 <= counts[2] <= 25
    assert toy_plan(config, {"a": [(200, 200)] * 60}).items == plan.items
    # More images change nothing about those that are there.
    assert toy_plan(config, {"a": [(200, 200)] * 61}).items[:60] == plan.items[:60]


def test_unused_regularisation_images_are_listed(tmp_path: Path):
    config = toy_config(tmp_path, [{**SMALL, "sources": [source("a"), source("reg", role="regularisation")]}])
    plan = toy_plan(config, {"a": SIZES[:2], "reg": SIZES})
    assert [(entry.source, entry.key) for entry in plan.left_out] == [("reg", f"{n:03}.png") for n in (2, 3, 4)]


def test_several_resolutions_make_one_tier_each_of_the_same_images(tmp_path: Path):
    config = toy_config(
        tmp_path,
        [{"resolution": [64, 32], "batch_size": [1, 4], "buckets": {"step": 16, "min": 16}, "sources": [source("a")]}],
    )
    plan = toy_plan(config, {"a": SIZES})
    assert [(tier.name, tier.batch_size) for tier in plan.tiers] == [("64x64", 1), ("32x32", 4)]
    assert len(plan.items) == 2 * len(SIZES)
    assert len({(item.source, item.id) for item in plan.items}) == len(plan.items)


def test_a_resolution_that_is_listed_twice_is_refused_with_the_pair_spelling(tmp_path: Path):
    config = toy_config(tmp_path, [{"resolution": [64, 64], "buckets": SMALL["buckets"], "sources": [source("a")]}])
    with pytest.raises(UsageError, match="listed twice"):
        toy_plan(config, {"a": SIZES})


def test_filters_leave_images_out_with_a_reason(tmp_path: Path):
    filters = {"min_size": 66, "max_aspect": 1.9}
    config = toy_config(tmp_path, [{**SMALL, "sources": [source("a", filters=filters)]}])
    plan = toy_plan(config, {"a": [(70, 70), (64, 64), (150, 50)]})
    assert [item.record.key for item in plan.items] == ["000.png"]
    assert [entry.reason for entry in plan.left_out] == [
        "64x64 is below filters.min_size 66",
        "150x50 is wider than filters.max_aspect 1.9",
    ]


def test_a_limit_keeps_a_fixed_subset_and_names_the_rest(tmp_path: Path):
    config = toy_config(tmp_path, [{**SMALL, "sources": [source("a", limit=2)]}])
    plan, again = toy_plan(config, {"a": SIZES}), toy_plan(config, {"a": SIZES})
    assert [item.id for item in plan.items] == [item.id for item in again.items]
    assert (len(plan.items), len(plan.left_out)) == (2, 3)


def test_a_disabled_source_is_not_looked_at(tmp_path: Path):
    config = toy_config(tmp_path, [{**SMALL, "sources": [source("a"), source("b", enabled=False)]}])
    assert {item.source for item in toy_plan(config, {"a": SIZES}).items} == {"a"}


def test_short_batches_can_be_dropped_or_filled(tmp_path: Path):
    def batches(rule: str) -> int:
        config = toy_config(
            tmp_path, [{**SMALL, "batch_size": 2, "sources": [source("a")]}], data={"short_batches": rule}
        )
        return toy_plan(config, {"a": [(64, 64)] * 5}).batches_per_epoch

    assert (batches("keep"), batches("fill"), batches("drop")) == (3, 3, 2)


def test_dropping_every_batch_is_an_error(tmp_path: Path):
    config = toy_config(
        tmp_path, [{**SMALL, "batch_size": 8, "sources": [source("a")]}], data={"short_batches": "drop"}
    )
    with pytest.raises(UsageError, match="nothing to train on"):
        toy_plan(config, {"a": SIZES})


def test_steps_follow_from_epochs_batches_and_accumulation(tmp_path: Path):
    config = toy_config(tmp_path, [{**SMALL, "sources": [source("a")]}], train={"epochs": 3, "accumulate": 2})
    plan = toy_plan(config, {"a": SIZES})
    assert plan.batches_per_epoch == 5
    assert plan.steps_per_epoch(accumulate=2) == 3
    assert plan.total_steps(config.train) == 9
    assert plan.steps_per_epoch(accumulate=1, ranks=2) == 3


# --- validation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", golden("core/dataset_counts.json")["validation_split_reference"])
def test_the_split_is_disjoint_and_complete(row):
    samples = [("a", f"{number:032x}") for number in range(row["n"])]
    held_out = split_validation(samples, row["split"], row["seed"])
    training = set(samples) - held_out
    assert held_out <= set(samples)
    assert len(held_out) + len(training) == row["n"]
    assert held_out
    assert training or row["split"] == 1.0


def test_the_share_is_met_on_average():
    samples = [("a", f"{number:032x}") for number in range(2000)]
    assert len(split_validation(samples, 0.2, 7)) == pytest.approx(400, abs=90)


def test_adding_images_moves_no_image_to_the_other_side():
    samples = [("a", f"{number:032x}") for number in range(60)]
    before, after = split_validation(samples[:40], 0.25, 3), split_validation(samples, 0.25, 3)
    assert after & set(samples[:40]) == before


def test_the_split_does_not_depend_on_the_order():
    samples = [("a", f"{number:032x}") for number in range(30)]
    assert split_validation(samples, 0.3, 1) == split_validation(samples[::-1], 0.3, 1)


def test_held_out_images_are_held_out_at_every_resolution_and_seen_once(tmp_path: Path):
    sets = [{"resolution": [64, 32], "buckets": {"step": 16, "min": 16}, "sources": [source("a", repeats=3)]}]
    config = toy_config(tmp_path, sets, validate={"split": 0.4, "seed": 5})
    plan = toy_plan(config, {"a": SIZES * 4})
    held_out = {item.record.key for item in plan.validation}
    assert held_out
    assert not held_out & {item.record.key for item in plan.items}
    assert len(plan.validation) == 2 * len(held_out)
    assert {item.repeats for item in plan.validation} == {1}


def test_a_validation_source_is_held_out_whole_and_regularisation_never_is(tmp_path: Path):
    sources = [source("a"), source("v", role="validation"), source("reg", role="regularisation")]
    config = toy_config(tmp_path, [{**SMALL, "sources": sources}], validate={"split": 0.5})
    plan = toy_plan(config, {"a": SIZES, "v": SIZES, "reg": SIZES})
    assert sum(item.source == "v" for item in plan.validation) == len(SIZES)
    assert "v" not in {item.source for item in plan.items}
    assert "reg" not in {item.source for item in plan.validation}


def test_regularisation_is_balanced_to_what_is_left_for_training(tmp_path: Path):
    sources = [source("a"), source("reg", role="regularisation")]
    config = toy_config(tmp_path, [{**SMALL, "sources": sources}], validate={"split": 0.5})
    plan = toy_plan(config, {"a": SIZES * 2, "reg": SIZES})
    training = sum(item.repeats for item in plan.items if item.source == "a")
    assert training < 10
    assert sum(item.repeats for item in plan.items if item.source == "reg") == training


def test_a_split_of_one_image_is_refused(tmp_path: Path):
    config = toy_config(tmp_path, [{**SMALL, "sources": [source("a")]}], validate={"split": 0.5})
    with pytest.raises(UsageError, match="both trained on and held out"):
        toy_plan(config, {"a": SIZES[:1]})


# --- report and fingerprint -------------------------------------------------------------------------------------------


def test_the_report_counts_buckets_crops_and_reasons(tmp_path: Path):
    config = toy_config(
        tmp_path, [{**SMALL, "batch_size": 2, "sources": [source("a", repeats=2, filters={"max_aspect": 1.5})]}]
    )
    report = report_plan(toy_plan(config, {"a": [(64, 64), (32, 32), (64, 70), (96, 48), (128, 64)]}), config.train)
    rows = {row.bucket: row for row in report.buckets}
    assert (rows["64x64"].images, rows["64x64"].visits, rows["64x64"].batches) == (3, 6, 3)
    assert rows["64x64"].largest_scale == 2.0
    assert rows["64x64"].enlarged == 1
    assert rows["64x64"].cropped == pytest.approx((6 / 70) / 3)
    assert [len(images) for images in report.left_out.values()] == [2]
    assert report.left_out_lines()[0].startswith("2 left out: is wider than filters.max_aspect 1.5 (")
    assert (report.images, report.visits_per_epoch, report.batches_per_epoch) == (3, 6, 3)
    assert (report.steps_per_epoch, report.total_steps) == (3, 10)


def test_the_fingerprint_changes_with_the_data_and_not_with_the_machine(tmp_path: Path):
    def fingerprint(sizes: list[tuple[int, int]], folder: str = "x", **settings) -> str:
        config = toy_config(tmp_path / folder, [{**SMALL, "sources": [source("a", folder, **settings)]}])
        return toy_plan(config, {"a": sizes}).fingerprint

    base = fingerprint(SIZES)
    assert fingerprint(SIZES, "y") == base
    changed = [fingerprint(SIZES[:4]), fingerprint(SIZES, repeats=2), fingerprint(SIZES, captions={"shuffle": True})]
    assert base not in changed
    assert len(set(changed)) == 3
