"""Bucket tables of both rules equal the references row by row, and what has no place is refused with a reason."""

from __future__ import annotations

import pytest

from tests.helpers import golden
from tuner.core.config import SetConfig
from tuner.core.data.buckets import Geometry, set_geometry
from tuner.core.data.records import Fit, Refused
from tuner.core.errors import UsageError

SD_SCRIPTS = golden("core/buckets_sd_scripts.json")
SIMPLETUNER = golden("core/buckets_simpletuner.json")


def geometry(resolution=(1024, 1024), multiple: int = 8, **values) -> Geometry:
    config = SetConfig.model_validate({"sources": [{"id": "s", "path": "s"}], "resolution": [resolution], **values})
    return set_geometry(config, config.resolution[0], multiple)


def fitted(sizes: Geometry, width: int, height: int) -> list[int]:
    fit = sizes.fit(width, height)
    assert isinstance(fit, Fit), fit
    return [*fit.bucket, *fit.resized, *fit.crop]


def sd_scripts(config: dict) -> Geometry:
    return geometry(
        tuple(config["resolution"]),
        buckets={
            "enabled": config["enable_bucket"],
            "upscale": not config.get("bucket_no_upscale", False),
            "min": config.get("min_bucket_reso", 256),
            "max": config.get("max_bucket_reso", 2048),
            "step": config.get("bucket_reso_steps", 64),
        },
    )


@pytest.mark.parametrize("name", [name for name in SD_SCRIPTS if name != "columns"])
def test_all_rows_of_the_sd_scripts_rule_are_exact(name):
    table = SD_SCRIPTS[name]
    sizes = sd_scripts(table["config"])
    if table.get("bucket_list") and sizes.mode == "area":
        assert [list(size) for size in sizes.buckets] == table["bucket_list"]
    for width, height, *expected, _ in table["rows"]:
        if None in expected or 0 in expected[:2]:
            refused = sizes.fit(width, height)
            assert isinstance(refused, Refused)
            assert "narrower than the bucket step 64" in refused.reason
        else:
            assert fitted(sizes, width, height) == expected, (width, height)


@pytest.mark.parametrize("name", [name for name in SIMPLETUNER if name != "columns"])
def test_all_rows_of_the_simpletuner_rule_are_exact(name):
    config = SIMPLETUNER[name]["config"]
    edge = 1000 if config["resolution_type"] == "area" else config["resolution"]
    sizes = geometry(
        (edge, edge),
        resolution_mode="short_edge" if config["resolution_type"] == "pixel" else "area",
        buckets={"rule": "simpletuner", "step": config["align"]},
    )
    for width, height, _, target_w, target_h, middle_w, middle_h, _, left, top in SIMPLETUNER[name]["rows"]:
        expected = [target_w, target_h, middle_w, middle_h, left, top]
        assert fitted(sizes, width, height) == expected, (width, height)


def test_the_longest_side_is_by_default_twice_the_resolution():
    sizes = geometry((512, 768), buckets={"step": 64})
    assert max(max(size) for size in sizes.buckets) == 1536


def test_limits_are_rounded_outwards_to_the_step_and_noted():
    sizes = geometry(buckets={"min": 300, "max": 2000, "step": 64})
    assert min(min(size) for size in sizes.buckets) == 256
    assert max(max(size) for size in sizes.buckets) == 2048
    assert [note.split(",")[0] for note in sizes.notes] == [
        "buckets.min 300 is rounded down to 256",
        "buckets.max 2000 is rounded up to 2048",
    ]


def test_a_step_that_the_model_cannot_use_is_refused():
    with pytest.raises(UsageError, match=r"buckets.step 24 is no multiple of 16") as error:
        geometry(multiple=16, buckets={"step": 24})
    assert error.value.fix == "use 16"
    with pytest.raises(UsageError, match=r"the resolution 1000x1024 is no multiple of 16"):
        geometry((1000, 1024), multiple=16, buckets={"enabled": False})


def test_a_resolution_outside_the_limits_is_refused():
    with pytest.raises(UsageError, match=r"buckets.min 256 does not fit resolution 128x128") as error:
        geometry((128, 128))
    assert error.value.fix == "set buckets.min to at least 64 and at most 128"
    with pytest.raises(UsageError, match=r"buckets.min 256 does not fit resolution 48x48") as error:
        geometry((48, 48))
    assert error.value.fix == "set buckets.step and buckets.min to at most 48"
    assert geometry((48, 48), buckets={"step": 48, "min": 48}).buckets
    with pytest.raises(UsageError, match=r"buckets.max 512 is below the resolution"):
        geometry(buckets={"max": 512})
    assert geometry((128, 128), buckets={"min": 64, "step": 16}).buckets


def test_all_unusable_settings_are_told_at_once():
    with pytest.raises(UsageError, match=r"2 problems(.|\n)*buckets.step 10(.|\n)*buckets.max 512"):
        geometry(multiple=16, buckets={"step": 10, "max": 512})


def test_enlarging_beyond_the_limit_leaves_the_image_out():
    sizes = geometry(buckets={"max_upscale": 1.5})
    assert isinstance(sizes.fit(800, 800), Fit)
    refused = sizes.fit(500, 500)
    assert isinstance(refused, Refused)
    assert refused.reason == "500x500 would be enlarged 2.05 times, buckets.max_upscale allows 1.5"


def test_a_fixed_size_takes_every_image_unless_it_may_not_enlarge():
    fixed = geometry((512, 768), resolution_mode="fixed")
    assert fitted(fixed, 1024, 1024) == [512, 768, 768, 768, 128, 0]
    assert fitted(fixed, 100, 100)[:2] == [512, 768]
    shrinking = geometry((512, 768), resolution_mode="fixed", buckets={"upscale": False})
    refused = shrinking.fit(100, 100)
    assert isinstance(refused, Refused)
    assert "100x100 is smaller than 512x768" in refused.reason


def test_square_and_listed_shapes_are_cut_from_any_image():
    square = geometry(buckets={"rule": "simpletuner"}, crop={"aspect": "square"})
    assert fitted(square, 1500, 1000) == [1024, 1024, 1536, 1024, 256, 0]
    listed = geometry(buckets={"rule": "simpletuner"}, crop={"aspect": "closest", "aspect_list": [0.5, 1.0, 2.0]})
    assert fitted(listed, 1700, 1000)[:2] == [1472, 704]


def test_large_images_are_shrunk_before_a_tight_crop():
    sizes = geometry(
        (512, 512), buckets={"rule": "simpletuner"}, crop={"aspect": "square", "shrink_above": 900, "shrink_to": 768}
    )
    assert fitted(sizes, 2000, 2000) == [512, 512, 768, 768, 128, 128]
    assert fitted(sizes, 800, 800) == [512, 512, 512, 512, 0, 0]


def test_extreme_shapes_are_refused_where_the_ratio_rounds_to_nothing():
    refused = geometry(resolution_mode="short_edge").fit(2, 1000)
    assert isinstance(refused, Refused)
    assert "ratio rounds to zero" in refused.reason


def test_a_fit_tells_its_scale_and_what_is_cut():
    fit = geometry((512, 512), resolution_mode="fixed").fit(1024, 2048)
    assert isinstance(fit, Fit)
    assert fit.bucket_key == "512x512"
    assert fit.scale == 0.5
    assert fit.cropped_share == 0.5
