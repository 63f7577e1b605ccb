"""Imported data sets give the sizes and the captions that the other trainers give, row by row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.core.data.test_buckets import fitted
from tests.core.data.test_captions import draw
from tests.core.data.toy import toy_config, toy_plan
from tests.core.importing.sources import backends, dataset, row, status
from tests.helpers import golden
from tuner.core.config import RunConfig, SetConfig, run_schema
from tuner.core.config.build import build_config
from tuner.core.data.buckets import set_geometry
from tuner.core.data.captions import caption_set
from tuner.core.data.records import Fit
from tuner.core.errors import UsageError
from tuner.core.importing.report import Imported

INHERITANCE = golden("core/dataset_config_inheritance.json")["cases"]
K_BUCKETS = {k: v for k, v in golden("core/buckets_sd_scripts.json").items() if k != "columns"}
S_BUCKETS = {k: v for k, v in golden("core/buckets_simpletuner.json").items() if k != "columns"}
K_CAPTIONS = golden("core/captions_sd_scripts.json")
S_CAPTIONS = golden("core/captions_simpletuner.json")
COUNTS = golden("core/dataset_counts.json")["datasets"]
REST = {
    "model": {"family": "x", "path": "x"},
    "optimizer": {"lr": 1e-4},
    "train": {"steps": 1},
    "checkpoint": {"dir": "out"},
}


def typed(result: Imported) -> RunConfig:
    """The imported data section as a run sees it."""
    assert run_schema()
    return build_config(REST | {key: result.config[key] for key in ("data", "validate") if key in result.config})


def only_set(result: Imported) -> SetConfig:
    (found,) = typed(result).data.sets
    return found


# --- sd-scripts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", [each for each in INHERITANCE if "datasets" in each["result"]], ids=lambda c: c["name"]
)
def test_every_subset_gets_what_it_inherits_there(case, tmp_path: Path):
    config = typed(dataset(tmp_path, case["toml"]))
    wanted = case["result"]["datasets"]
    assert len(config.data.sets) == len(wanted)
    for found, expected in zip(config.data.sets, wanted, strict=True):
        params = expected["params"]
        assert list(found.resolution[0]) == params["resolution"]
        assert (found.batch_size or (1,))[0] == params["batch_size"]
        assert found.buckets.enabled == params["enable_bucket"]
        if params["enable_bucket"]:
            limits = (found.buckets.min, found.buckets.max, found.buckets.step)
            assert limits == tuple(params[key] for key in ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps"))
        for source, subset in zip(found.sources, expected["subsets"], strict=True):
            captions = source.captions
            assert source.path.endswith(f"/{subset['image_dir']}")
            assert source.repeats == subset["num_repeats"]
            assert (source.role == "regularisation") == subset.get("is_reg", False)
            assert source.augment.flip == subset["flip_aug"]
            assert captions.shuffle == subset["shuffle_caption"]
            assert captions.keep_first == (subset["keep_tokens"] if captions.shuffle else 0)
            assert captions.prefix == subset["caption_prefix"]
            assert captions.fallback == subset.get("class_tokens")
            if expected["kind"] == "metadata":
                assert captions.metadata is not None and captions.metadata.path.endswith("c.json")
            else:
                assert captions.extension == subset["caption_extension"]
            assert (source.mask is None) == ("conditioning_data_dir" not in subset)


@pytest.mark.parametrize("case", [each for each in INHERITANCE if "refused" in each["result"]], ids=lambda c: c["name"])
def test_what_is_refused_there_is_named(case, tmp_path: Path):
    reason, path = (case["result"]["refused"][0][key] for key in ("reason", "path"))
    if reason in ("missing_key", "mixed_methods"):
        with pytest.raises(UsageError, match=r"datasets\[0\]"):
            dataset(tmp_path, case["toml"])
        return
    result = dataset(tmp_path, case["toml"])
    if case["name"] == "error_validation_split_in_subset":  # the manual there shows it, so it is meant
        assert result.config["validate"] == {"split": 0.1}
        return
    assert status(result, str(path[-1])) == {"unknown_key": "unknown", "wrong_type": "refused"}[reason]
    assert result.exit_code == 3


def test_a_whole_number_may_stand_for_a_fraction(tmp_path: Path):
    text = '[[datasets]]\nresolution = 512\nnetwork_multiplier = 1\n[[datasets.subsets]]\nimage_dir = "a"\n'
    result = dataset(tmp_path, text)
    assert status(result, "network_multiplier") == "mapped"
    assert result.exit_code == 0


@pytest.mark.parametrize("name", K_BUCKETS)
def test_buckets_of_an_imported_set_equal_the_table_of_sd_scripts(name, tmp_path: Path):
    table = K_BUCKETS[name]
    options = {key: value for key, value in table["config"].items() if key != "id"}
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in options.items())
    entry = only_set(dataset(tmp_path, f'[[datasets]]\n{lines}\n[[datasets.subsets]]\nimage_dir = "a"\n'))
    sizes = set_geometry(entry, entry.resolution[0], 8)
    for width, height, *expected, _ in table["rows"]:
        if None not in expected and 0 not in expected[:2]:
            assert fitted(sizes, width, height) == expected, (width, height)
        else:
            assert not isinstance(sizes.fit(width, height), Fit)


def caption_options(case: dict) -> str:
    named = K_CAPTIONS["defaults"] | case["options"]
    return "\n".join(f"{key} = {json.dumps(value)}" for key, value in named.items() if value is not None)


@pytest.mark.parametrize("case", [c for c in K_CAPTIONS["deterministic"] if "repl" not in c], ids=lambda c: c["note"])
def test_captions_of_an_imported_set_equal_those_of_sd_scripts(case, tmp_path: Path):
    text = (
        f'[general]\n{caption_options(case)}\n[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "a"\n'
    )
    captions = only_set(dataset(tmp_path, text)).sources[0].captions
    steps = {"step": case.get("step", 0), "max_steps": case.get("max_steps", 0)}
    assert draw(captions, case["caption"], epoch=case.get("epoch", 1), **steps) == case["expected"]


@pytest.mark.parametrize("case", [c for c in K_CAPTIONS["stochastic"] if "repl" not in c], ids=lambda c: c["note"])
def test_drawn_captions_of_an_imported_set_are_the_reachable_ones(case, tmp_path: Path):
    text = (
        f'[general]\n{caption_options(case)}\n[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "a"\n'
    )
    captions = only_set(dataset(tmp_path, text)).sources[0].captions
    seen = {draw(captions, case["caption"], visit, epoch=case.get("epoch", 1)) for visit in range(300)}
    assert seen <= set(case["reachable"])


@pytest.mark.parametrize("case", COUNTS)
def test_counts_of_an_imported_set_equal_those_of_sd_scripts(case, tmp_path: Path):
    regularisation = (
        f'[[datasets.subsets]]\nimage_dir = "reg"\nis_reg = true\nnum_repeats = {case["reg_num_repeats"]}\n'
    )
    text = (
        f"[[datasets]]\nresolution = 512\nbatch_size = {case['batch_size']}\nenable_bucket = true\n"
        f'[[datasets.subsets]]\nimage_dir = "train"\nnum_repeats = {case["num_repeats"]}\n'
    ) + (regularisation if case["reg_sizes"] else "")
    sizes = {
        name: [tuple(size) for size in case[f"{name}_sizes"]] for name in ("train", "reg") if case[f"{name}_sizes"]
    }
    plan = toy_plan(toy_config(tmp_path, dataset(tmp_path, text).config["data"]["sets"]), sizes, multiple=16)
    assert {f"{item.source}/{item.record.key}": item.repeats for item in plan.items} == case["effective_repeats"]
    counts = [[list(group.bucket), sum(plan.items[i].repeats for i in group.items)] for group in plan.groups]
    assert sorted(counts) == sorted(case["bucket_counts"])
    assert plan.batches_per_epoch == case["batches_per_epoch"]


def test_sets_that_differ_in_size_alone_become_one_with_lists(tmp_path: Path):
    subset = '[[datasets.subsets]]\nimage_dir = "a"\ncaption_extension = ".txt"\n'
    sizes = ((1024, 2), (512, 8))
    text = "".join(f"[[datasets]]\nresolution = {size}\nbatch_size = {batch}\n{subset}" for size, batch in sizes)
    result = dataset(tmp_path, text)
    entry = only_set(result)
    assert entry.tiers() == (((1024, 1024), 2), ((512, 512), 8))
    assert row(result, "datasets[1].batch_size").written == {"data.sets[0].batch_size": [2, 8]}


def test_subsets_with_another_crop_become_a_set_of_their_own(tmp_path: Path):
    text = (
        '[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "a"\n'
        '[[datasets.subsets]]\nimage_dir = "b"\nrandom_crop = true\n'
    )
    result = dataset(tmp_path, text)
    sets = result.config["data"]["sets"]
    assert [entry.get("crop") for entry in sets] == [None, {"style": "random"}]
    assert result.open == ["images or captions are drawn anew: set cache.latents to 'off'"]


def test_a_value_that_another_level_overrides_everywhere_is_still_a_row(tmp_path: Path):
    text = (
        "[general]\nnum_repeats = 5\n[[datasets]]\nresolution = 512\n"
        '[[datasets.subsets]]\nimage_dir = "a"\nnum_repeats = 1\n'
    )
    result = dataset(tmp_path, text)
    assert row(result, "general.num_repeats").keys == []
    assert row(result, "general.num_repeats").note == "every data set or subset says otherwise"
    assert result.config["data"]["sets"][0]["sources"][0].get("repeats", 1) == 1
    assert result.options == 4


# --- SimpleTuner ------------------------------------------------------------------------------------------------------


def images(**keys) -> dict:
    return {"id": "a", "type": "local", "instance_data_dir": "a", "crop_style": "center",
            "caption_strategy": "textfile"} | keys  # fmt: skip


@pytest.mark.parametrize("name", S_BUCKETS)
def test_buckets_of_an_imported_backend_equal_the_table_of_simpletuner(name, tmp_path: Path):
    config = S_BUCKETS[name]["config"]
    keys = {"resolution": config["resolution"], "resolution_type": config["resolution_type"]}
    entry = only_set(backends(tmp_path, images(**keys), aspect_bucket_alignment=config["align"]))
    sizes = set_geometry(entry, entry.resolution[0], 8)
    for width, height, _, target_w, target_h, middle_w, middle_h, _, left, top in S_BUCKETS[name]["rows"]:
        expected = [target_w, target_h, middle_w, middle_h, left, top]
        assert fitted(sizes, width, height) == expected, (width, height)


@pytest.mark.parametrize("case", S_CAPTIONS["shuffle_variants"])
def test_orders_of_an_imported_backend_equal_those_of_simpletuner(case, tmp_path: Path):
    result = backends(tmp_path, images(caption_shuffle=case["config"]), seed=case["base_seed"])
    captions = only_set(result).sources[0].captions
    assert caption_set(captions, case["caption"], 99) == tuple(case["expected"])


@pytest.mark.parametrize("case", S_CAPTIONS["textfile_strategy"])
def test_caption_files_of_an_imported_backend_are_read_as_there(case, tmp_path: Path):
    keys = {key: case[key] for key in ("prepend_instance_prompt", "instance_prompt", "disable_multiline_split")}
    captions = only_set(backends(tmp_path, images(**keys))).sources[0].captions
    expected = case["expected"] if isinstance(case["expected"], list) else [case["expected"]]
    assert caption_set(captions, case["text"], 99) == tuple(expected)


DOCUMENTED = {"s/cat/dog/": {"arafed cat and cat": "arafed dog and dog", "a photo of a cat": "a photo of a dog"}}
"""The form with a slash at the end is documented there and does nothing; here it does what the manual says."""


@pytest.mark.parametrize("case", S_CAPTIONS["filter_list_reference"])
def test_filters_of_an_imported_backend_change_captions_as_there(case, tmp_path: Path):
    captions = only_set(backends(tmp_path, images(caption_filter_list=case["filters"]))).sources[0].captions
    expected = DOCUMENTED.get(case["filters"][0], {}).get(case["caption"], case["reference"])
    assert draw(captions, case["caption"]) == expected


def test_passes_masks_and_stores_of_backends(tmp_path: Path):
    result = backends(
        tmp_path,
        images(repeats=3, conditioning_data="masks", crop=True, crop_aspect="square"),
        {"id": "masks", "dataset_type": "conditioning", "conditioning_type": "mask", "instance_data_dir": "m"},
        {"id": "text", "dataset_type": "text_embeds", "type": "local", "cache_dir": "store", "default": True},
    )
    (entry,) = result.config["data"]["sets"]
    (source,) = entry["sources"]
    assert (source["repeats"], source["mask"], entry["crop"]) == (4, {"path": "m"}, {"aspect": "square"})
    assert result.config["cache"]["dir"] == "store"
    assert status(result, "repeats") == "changed"
    assert result.exit_code == 0


def test_storage_that_is_not_local_is_named(tmp_path: Path):
    result = backends(tmp_path, images(type="huggingface", dataset_name="owner/name"))
    assert (status(result, "] type"), status(result, "dataset_name")) == ("not_built", "not_built")
    assert result.exit_code == 3


def test_a_shape_that_is_drawn_from_a_list_comes_over(tmp_path: Path):
    drawn = {"crop": True, "crop_style": "center", "crop_aspect": "random"}
    result = backends(tmp_path, images(**drawn, crop_aspect_buckets=[0.5, 1, 2.0]))
    assert result.config["data"]["sets"][0]["crop"] == {"aspect": "random", "aspect_list": [0.5, 1.0, 2.0]}
    assert result.exit_code == 0
    weighted = backends(tmp_path, images(**drawn, crop_aspect_buckets=[{"0.5": 2}, {"1.0": 1}]))
    assert status(weighted, "crop_aspect_buckets") == "not_built"
    assert weighted.exit_code == 3
