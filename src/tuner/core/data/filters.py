"""Which images a source leaves out by their size and shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .records import Refused

if TYPE_CHECKING:
    from tuner.core.config.data import FiltersConfig


def refused_by(filters: FiltersConfig, width: int, height: int, mode: str) -> Refused | None:
    """Why ``data.filters`` leaves out an image of this size, or None.

    mode: ``resolution_mode`` of the set. With ``area``, ``min_size`` is the edge of a square of equal area, else the
    shorter side in pixels.
    """
    if filters.min_size is not None:
        measured, least = (
            (width * height, filters.min_size**2) if mode == "area" else (min(width, height), filters.min_size)
        )
        if measured < least:
            return Refused(f"{width}x{height} is below filters.min_size {filters.min_size}")
    ratio = width / height
    if filters.min_aspect is not None and ratio < filters.min_aspect:
        return Refused(f"{width}x{height} is narrower than filters.min_aspect {filters.min_aspect:g}")
    if filters.max_aspect is not None and ratio > filters.max_aspect:
        return Refused(f"{width}x{height} is wider than filters.max_aspect {filters.max_aspect:g}")
    return None
