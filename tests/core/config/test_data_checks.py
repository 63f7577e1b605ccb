"""Settings of captions and geometry that cannot work, or have no effect, are named with their place."""

from __future__ import annotations

import pytest

from tuner.core.config import CaptionsConfig, SetConfig
from tuner.core.config.data_checks import caption_problems, geometry_problems


def captions(**values) -> dict[str, str]:
    """Problems by the last key of their place."""
    found = caption_problems(CaptionsConfig.model_validate(values), ("captions",))
    return {str(path[1]): what for path, what, _ in found}


def geometry(**values) -> dict[str, str]:
    entry = SetConfig.model_validate({"sources": [{"id": "s", "path": "s"}], **values})
    return {".".join(map(str, path)): what for path, what, _ in geometry_problems(entry, ())}


@pytest.mark.parametrize(
    ("values", "key", "what"),
    [
        ({"variants": 3}, "variants", "nothing is drawn"),
        ({"variants": 3, "shuffle": True, "tag_warmup": {"steps": 5}}, "variants", "tag_warmup changes captions"),
        ({"from": "fixed"}, "from", "'fixed' needs captions.fixed"),
        ({"from": "metadata"}, "from", "'metadata' needs captions.metadata"),
        ({"fixed": "x"}, "fixed", "has no effect with from 'file'"),
        ({"from": "filename", "extension": ".cap"}, "extension", "has no effect with from 'filename'"),
        ({"from": "filename", "allow_empty": True}, "allow_empty", "has no effect with from 'filename'"),
        ({"from": "filename", "on_missing": "skip"}, "on_missing", "always gives a caption"),
        ({"extension": "cap"}, "extension", "begins with a dot"),
        ({"rule": "simpletuner", "shuffle": True}, "shuffle", "not part of rule 'simpletuner'"),
        ({"replace": [{"find": "(", "regex": True}]}, "replace", "does not work"),
        ({"replace": [{"find": "a", "with": r"\2", "regex": True}]}, "replace", "does not work"),
        ({"separator": ""}, "separator", "must not be empty"),
        ({"tag_warmup": {"steps": 0}}, "tag_warmup", "must be above 0"),
        ({"keep_first": 1}, "keep_first", "captions are not split into tags"),
        ({"keep_first": 1, "fixed_marker": "|"}, "keep_first", "captions are not split into tags"),
        ({"separator": ";"}, "separator", "captions are not split into tags"),
        ({"join": "; "}, "join", "captions are not split into tags"),
        ({"rule": "simpletuner", "variants": 2, "join": "; "}, "join", "captions are not split into tags"),
        ({"rule": "sd_scripts", "fixed_marker": "|"}, "fixed_marker", "captions are not split into tags"),
    ],
)
def test_caption_settings_are_told(values, key, what):
    assert what in captions(**values)[key]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"from": "fixed", "fixed": ""},
        {"from": "metadata", "metadata": "captions.json"},
        {"variants": {"count": 3, "seed": 1}, "lines": "random"},
        {"rule": "simpletuner", "variants": 2},
        {"rule": "simpletuner", "variants": 2, "keep_first": 1, "separator": ";"},
        {"tag_warmup": {"steps": 5}, "keep_first": 1, "separator": ";", "join": "; "},
        {"fixed_marker": "|", "separator": ";", "join": "; "},
        {"group_separator": "+", "separator": ";"},
        {"from": "metadata", "metadata": "captions.json", "separator": ";", "join": "; "},
        {"replace": [{"find": r"(a)", "with": r"\1", "regex": True}, {"find": "("}]},
    ],
)
def test_caption_settings_that_work_pass(values):
    assert captions(**values) == {}
    spelled_out = CaptionsConfig.model_validate(values).model_dump(by_alias=True)
    assert captions(**spelled_out) == {}


SIMPLETUNER = {"rule": "simpletuner"}


@pytest.mark.parametrize(
    ("values", "key", "what"),
    [
        ({"crop": {"aspect": "square"}}, "crop.aspect", "has no effect with a list of buckets"),
        ({"buckets": SIMPLETUNER, "crop": {"shrink_above": 9}}, "crop.shrink_above", "needs shrink_to"),
        ({"buckets": {**SIMPLETUNER, "max": 2048}}, "buckets.max", "no effect where no list of buckets is made"),
        ({"buckets": {"rounding": 3}}, "buckets.rounding", "has no effect with rule 'sd_scripts'"),
        ({"buckets": {"max": 128}}, "buckets.max", "is below buckets.min (256)"),
        ({"buckets": SIMPLETUNER, "crop": {"aspect": "closest"}}, "crop.aspect", "'closest' needs aspect_list"),
        ({"buckets": SIMPLETUNER, "crop": {"aspect": "random"}}, "crop.aspect", "'random' needs aspect_list"),
        ({"crop": {"aspect": "random", "aspect_list": [1.0]}}, "crop.aspect", "has no effect with a list of buckets"),
        ({"buckets": SIMPLETUNER, "crop": {"aspect_list": [1.0]}}, "crop.aspect_list", "no effect with aspect"),
        ({"crop": {"face_range": [1.0, 2.0]}}, "crop.face_range", "has no effect with style 'center'"),
        ({"crop": {"style": "face"}}, "crop.style", "'face' works without buckets only"),
        (
            {"crop": {"style": "face", "face_range": [3.0, 2.0]}, "resolution_mode": "fixed"},
            "crop.face_range",
            "the first number must not be above the second",
        ),
        (
            {"resolution_mode": "fixed", "buckets": {"step": 32}},
            "buckets.step",
            "no effect with resolution_mode 'fixed'",
        ),
        ({"buckets": {"enabled": False, "step": 32}}, "buckets.step", "no effect while buckets.enabled is off"),
        ({"buckets": {"upscale": False, "min": 512}}, "buckets.min", "each image makes its own bucket"),
        ({"buckets": {"upscale": False, "max_upscale": 2}}, "buckets.max_upscale", "while buckets.upscale is off"),
    ],
)
def test_geometry_settings_are_told(values, key, what):
    assert what in geometry(**values)[key]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"buckets": SIMPLETUNER, "crop": {"aspect": "closest", "aspect_list": [1.0]}},
        {"resolution_mode": "short_edge", "buckets": {"rounding": 3}, "crop": {"shrink_above": 9, "shrink_to": 8}},
        {"buckets": {"enabled": False}, "crop": {"style": "face", "face_range": [2.0, 3.0]}},
        {"resolution_mode": "fixed", "buckets": {"upscale": False}},
        {"buckets": {"enabled": False, "max_upscale": 2}},
    ],
)
def test_geometry_settings_that_work_pass(values):
    assert geometry(**values) == {}
    entry = SetConfig.model_validate({"sources": [{"id": "s", "path": "s"}], **values})
    assert geometry(**entry.model_dump(by_alias=True)) == {}
