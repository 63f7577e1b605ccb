"""The sizes of one set: its bucket list, checked against the model, and the fit of each image into it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tuner.core.config import BucketsConfig, SetConfig
from tuner.core.data.geometry import (
    Plan,
    area_buckets,
    cover,
    nearest_bucket,
    nearest_multiple,
    ratio_plan,
    short_edge_plan,
    shrink_only,
)
from tuner.core.data.records import Fit, Refused, Size
from tuner.core.errors import Problems, UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """How images of one set at one resolution are sized. Made by ``set_geometry``; ``fit`` is a pure function.

    buckets: the list that images are matched to; empty when each image makes its own bucket.
    drawn: the ratio among ``aspects`` is drawn instead of the nearest. notes: adjustments that a report should show.
    """

    resolution: Size
    mode: str
    rule: str
    step: int
    buckets: tuple[Size, ...] = ()
    upscale: bool = True
    max_upscale: float | None = None
    rounding: int = 2
    aspects: tuple[float, ...] = ()
    drawn: bool = False
    shrink: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()

    def fit(self, width: int, height: int, draw: float = 0.0) -> Fit | Refused:
        """Bucket, resize and centred crop of an image, or why it has no place.

        width, height: the image's size in pixels, EXIF orientation applied. draw: the image's own number in [0, 1),
        where the ratio is drawn.
        """
        image = (width, height)
        if round(width / height, self.rounding) == 0 and self._by_ratio:
            return Refused(f"{width}x{height} is too narrow: its ratio rounds to zero")
        plan = self._plan(image, draw)
        if min(plan.bucket) < self.step and not self.buckets:
            return Refused(f"{width}x{height} is narrower than the bucket step {self.step}")
        fit = Fit(image=image, bucket=plan.bucket, resized=plan.resized, crop=centre(plan.resized, plan.bucket))
        if not self.upscale and fit.scale > 1.0:
            return Refused(f"{width}x{height} is smaller than {fit.bucket_key} and buckets.upscale is off")
        if self.max_upscale is not None and fit.scale > self.max_upscale:
            limit = f"buckets.max_upscale allows {self.max_upscale:g}"
            return Refused(f"{width}x{height} would be enlarged {fit.scale:.2f} times, {limit}")
        return fit

    @property
    def _by_ratio(self) -> bool:
        return self.mode == "short_edge" or (self.mode == "area" and self.rule == "simpletuner")

    def _plan(self, image: Size, draw: float) -> Plan:
        if self._by_ratio:
            return self._ratio_plan(image, draw)
        if self.buckets:
            bucket = nearest_bucket(image, self.buckets)
            return Plan(bucket, cover(image, bucket))
        return shrink_only(image, self.resolution[0] * self.resolution[1], self.step)

    def _ratio_plan(self, image: Size, draw: float) -> Plan:
        own = image[0] / image[1]
        ratio = min(self.aspects, key=lambda each: abs(each - own)) if self.aspects else None
        if self.drawn:
            ratio = self.aspects[int(draw * len(self.aspects))]
        plan = self._sized(image, _edge(self.resolution, self.mode), ratio)
        if self.shrink is not None and self._measure(image) > self.shrink[0]:
            shrunk = self._sized(image, self.shrink[1], ratio).resized
            if shrunk[0] >= plan.bucket[0] and shrunk[1] >= plan.bucket[1]:
                return Plan(plan.bucket, shrunk)
        return plan

    def _sized(self, image: Size, edge: int, ratio: float | None) -> Plan:
        if self.mode == "short_edge":
            return short_edge_plan(image, edge=edge, multiple=self.step, rounding=self.rounding, ratio=ratio)
        square = int(nearest_multiple(edge, self.step))
        return ratio_plan(image, edge=square, multiple=self.step, rounding=self.rounding, ratio=ratio)

    def _measure(self, image: Size) -> float:
        return min(image) if self.mode == "short_edge" else math.sqrt(image[0] * image[1])


def centre(resized: Size, bucket: Size) -> tuple[int, int]:
    """(left, top) of the centred crop."""
    return (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2


def set_geometry(config: SetConfig, resolution: Size, multiple: int) -> Geometry:
    """The geometry of a set at one of its resolutions.

    resolution: (width, height) in pixels. multiple: ``ModelFacts.resolution_multiple``, which every side must be a
    multiple of. Raises one UsageError that lists every setting that cannot work.
    """
    buckets, problems = config.buckets, Problems()
    fixed = not buckets.enabled or config.resolution_mode == "fixed"
    by_ratio = config.resolution_mode == "short_edge" or buckets.rule == "simpletuner"
    low_high: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()
    if fixed:
        _check_multiple(resolution, "the resolution", multiple, problems)
    else:
        _check_multiple((buckets.step,), "buckets.step", multiple, problems)
        low_high, notes = _limits(buckets, resolution, problems, used=not by_ratio)
    problems.raise_if_any()
    return Geometry(
        resolution=resolution,
        mode="fixed" if fixed else config.resolution_mode,
        rule=buckets.rule,
        step=buckets.step,
        buckets=(resolution,) if fixed else _listed(buckets, resolution, low_high),
        upscale=buckets.upscale,
        max_upscale=buckets.max_upscale,
        rounding=buckets.rounding,
        aspects=_aspects(config),
        drawn=by_ratio and not fixed and config.crop.aspect == "random",
        shrink=_shrink(config),
        notes=notes,
    )


def _listed(buckets: BucketsConfig, resolution: Size, limits: tuple[int, int] | None) -> tuple[Size, ...]:
    if limits is None or not buckets.upscale:
        return ()
    return area_buckets(resolution, buckets.step, *limits)


def _limits(
    buckets: BucketsConfig, resolution: Size, problems: Problems, *, used: bool
) -> tuple[tuple[int, int] | None, tuple[str, ...]]:
    """(smallest, largest side) on the step, and notes about what was rounded."""
    if not used:
        return None, ()
    step, high = buckets.step, buckets.max or 2 * max(resolution)
    if not buckets.upscale:
        return None, ()
    low = buckets.min // step * step
    top = math.ceil(high / step) * step
    if low == 0 or min(resolution) < low:
        problems.add(
            UsageError(
                f"buckets.min {buckets.min} does not fit resolution {resolution[0]}x{resolution[1]} in steps of {step}",
                why="the smallest side of a bucket lies between one step and the resolution",
                fix=f"set buckets.step and buckets.min to at most {min(resolution)}"
                if min(resolution) < step
                else f"set buckets.min to at least {step} and at most {min(resolution)}",
            )
        )
    if max(resolution) > top:
        problems.add(
            UsageError(
                f"buckets.max {high} is below the resolution {resolution[0]}x{resolution[1]}",
                fix=f"set buckets.max to {2 * max(resolution)}, or leave it out",
            )
        )
    notes = []
    if low != buckets.min:
        notes.append(f"buckets.min {buckets.min} is rounded down to {low}, a multiple of the step {step}")
    if top != high and buckets.max is not None:
        notes.append(f"buckets.max {high} is rounded up to {top}, a multiple of the step {step}")
    return (max(low, step), top), tuple(notes)


def _check_multiple(values: tuple[int, ...], what: str, multiple: int, problems: Problems) -> None:
    if any(value % multiple for value in values):
        shown = "x".join(map(str, values))
        lower = "x".join(str(max(multiple, value // multiple * multiple)) for value in values)
        problems.add(
            UsageError(f"{what} {shown} is no multiple of {multiple}, which the model needs", fix=f"use {lower}")
        )


def _aspects(config: SetConfig) -> tuple[float, ...]:
    return (1.0,) if config.crop.aspect == "square" else tuple(config.crop.aspect_list)


def _shrink(config: SetConfig) -> tuple[int, int] | None:
    above, to = config.crop.shrink_above, config.crop.shrink_to
    return None if above is None or to is None else (above, to)


def _edge(resolution: Size, mode: str) -> int:
    return min(resolution) if mode == "short_edge" else int(math.sqrt(resolution[0] * resolution[1]))
