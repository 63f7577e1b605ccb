"""Filters leave images out with a reason that names the setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuner.core.config import CropConfig, FiltersConfig
from tuner.core.data.filters import refused_by, refused_by_crop
from tuner.core.data.records import ImageRecord


@pytest.mark.parametrize(
    ("filters", "mode", "kept", "refused", "reason"),
    [
        ({"min_size": 100}, "area", (50, 200), (50, 199), "50x199 is below filters.min_size 100"),
        ({"min_size": 100}, "short_edge", (100, 900), (99, 900), "99x900 is below filters.min_size 100"),
        ({"max_size": 100}, "area", (50, 200), (50, 201), "50x201 is above filters.max_size 100"),
        ({"max_size": 100}, "fixed", (100, 900), (101, 900), "101x900 is above filters.max_size 100"),
        ({"min_aspect": 0.5}, "area", (50, 100), (49, 100), "49x100 is narrower than filters.min_aspect 0.5"),
        ({"max_aspect": 2}, "area", (100, 50), (101, 50), "101x50 is wider than filters.max_aspect 2"),
    ],
)
def test_an_image_beyond_a_limit_is_left_out_with_the_reason(filters, mode, kept, refused, reason):
    config = FiltersConfig.model_validate(filters)
    assert refused_by(config, *kept, mode) is None
    found = refused_by(config, *refused, mode)
    assert found is not None
    assert found.reason == reason


def test_without_filters_nothing_is_left_out():
    assert refused_by(FiltersConfig(), 1, 9000, "area") is None


def test_a_face_crop_needs_a_face_in_the_name():
    values = {"source": "s", "key": "a.png", "path": Path("a.png"), "digest": "", "width": 9, "height": 9, "mode": "L"}
    record, with_face = ImageRecord(**values), ImageRecord(**values, face=(1, 1, 2, 2))
    assert refused_by_crop(CropConfig(), record) is None
    assert refused_by_crop(CropConfig(style="face"), with_face) is None
    found = refused_by_crop(CropConfig(style="face"), record)
    assert found is not None
    assert "no face at the end of the file name" in found.reason
