"""Which images are left out: by the filters of their source, or because their crop cannot be made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuner.core.data.records import Refused

if TYPE_CHECKING:
    from tuner.core.config.data import CropConfig, FiltersConfig
    from tuner.core.data.records import ImageRecord


def refused_by(filters: FiltersConfig, width: int, height: int, mode: str) -> Refused | None:
    """Why ``data.filters`` leaves out an image of this size, or None.

    mode: ``resolution_mode`` of the set. With ``area``, sizes are edges of a square of equal area, else shorter sides,
    in pixels.
    """
    size = width * height if mode == "area" else min(width, height)
    power = 2 if mode == "area" else 1
    if filters.min_size is not None and size < filters.min_size**power:
        return Refused(f"{width}x{height} is below filters.min_size {filters.min_size}")
    if filters.max_size is not None and size > filters.max_size**power:
        return Refused(f"{width}x{height} is above filters.max_size {filters.max_size}")
    ratio = width / height
    if filters.min_aspect is not None and ratio < filters.min_aspect:
        return Refused(f"{width}x{height} is narrower than filters.min_aspect {filters.min_aspect:g}")
    if filters.max_aspect is not None and ratio > filters.max_aspect:
        return Refused(f"{width}x{height} is wider than filters.max_aspect {filters.max_aspect:g}")
    return None


def refused_by_crop(crop: CropConfig, record: ImageRecord) -> Refused | None:
    """Why an image cannot be cropped as ``crop`` asks, or None."""
    if crop.style == "face" and record.face is None:
        return Refused(
            "no face at the end of the file name (_centreX_centreY_width_height), which crop.style face needs"
        )
    return None
