"""Bucket arithmetic: which size an image is trained at. Pure functions of integers.

Two rules exist. ``sd_scripts`` follows kohya-ss/sd-scripts (a list of sizes below an area, nearest ratio wins),
``simpletuner`` follows bghira/SimpleTuner (a size computed from the rounded ratio of each image), without the latter's
memory of ratios seen before, so that no result depends on the order of a scan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tuner.core.data.records import Size


@dataclass(frozen=True, slots=True)
class Plan:
    """Target size, and the size to resize to before the target is cut out of it."""

    bucket: Size
    resized: Size


def area_buckets(resolution: Size, step: int, low: int, high: int) -> tuple[Size, ...]:
    """All (width, height) in steps within [low, high] whose area is at most that of ``resolution``, sorted."""
    area = resolution[0] * resolution[1]
    square = int(math.sqrt(area) // step) * step
    sizes = {(square, square)}
    for width in range(low, high + 1, step):
        height = min(high, (area // width) // step * step)
        if height >= low:
            sizes.add((width, height))
            sizes.add((height, width))
    return tuple(sorted(sizes))


def cover(image: Size, target: Size) -> Size:
    """``image`` scaled, with its ratio kept, to the smallest size that covers ``target`` (to the nearest pixel)."""
    width, height = image
    scale = target[1] / height if width / height > target[0] / target[1] else target[0] / width
    return int(width * scale + 0.5), int(height * scale + 0.5)


def nearest_bucket(image: Size, buckets: Sequence[Size]) -> Size:
    """The bucket of the image's own size, else the one with the smallest difference of ratios, the first on ties."""
    if image in buckets:
        return image
    ratio = image[0] / image[1]
    return min(buckets, key=lambda size: abs(size[0] / size[1] - ratio))


def shrink_only(image: Size, area: int, step: int) -> Plan:
    """The bucket that an image gets when nothing is enlarged: its own size, or its shape at ``area``, cut to steps.

    A side of 0 in the bucket means that the image is narrower than the step.
    """
    resized = image
    if image[0] * image[1] > area:
        resized = _shrunk(image[0] / image[1], area, step)
    return Plan((_down(resized[0], step), _down(resized[1], step)), resized)


def _shrunk(ratio: float, area: int, step: int) -> Size:
    """Of "width on a step" and "height on a step", the size whose bucket comes nearer to ``ratio``."""
    ideal_width = math.sqrt(area * ratio)
    width = _down(int(ideal_width + 0.5), step)
    height = _down(int(area / ideal_width + 0.5), step)
    height_of_width = _down(int(width / ratio + 0.5), step)
    width_of_height = _down(int(height * ratio + 0.5), step)
    by_width = abs(width / height_of_width - ratio) if height_of_width else math.inf
    by_height = abs(width_of_height / height - ratio) if height else math.inf
    if by_width < by_height:
        return width, int(width / ratio + 0.5)
    return int(height * ratio + 0.5), height


def _down(value: int, step: int) -> int:
    return value - value % step


def nearest_multiple(value: float, multiple: int) -> int:
    """The nearest multiple, ties to the even one, never below one multiple."""
    return max(multiple, round(value / multiple) * multiple)


def ratio_plan(image: Size, *, edge: int, multiple: int, rounding: int, ratio: float | None = None) -> Plan:
    """The shape of the image at the area of a square of side ``edge``, which is already a multiple.

    The shape is the image's ratio rounded to ``rounding`` decimals; ``ratio`` replaces it: 1.0 for square crops, or an
    entry of a list of ratios.
    """
    shape = round(image[0] / image[1], rounding) if ratio is None else ratio
    root = math.sqrt(shape)
    target = (nearest_multiple(edge * root, multiple), nearest_multiple(edge / root, multiple))
    return Plan(target, grow_to_cover(image, target))


def short_edge_plan(image: Size, *, edge: int, multiple: int, rounding: int, ratio: float | None = None) -> Plan:
    """The shape of the image with ``edge`` as its shorter side, before both sides go to the nearest multiple."""
    shape = round(image[0] / image[1], rounding) if ratio is None else ratio
    portrait = image[0] < image[1] if ratio is None else ratio < 1.0
    width, height = (edge, int(edge / shape)) if portrait else (int(edge * shape), edge)
    target = (nearest_multiple(width, multiple), nearest_multiple(height, multiple))
    return Plan(target, cover_truncated(image, target))


def grow_to_cover(image: Size, target: Size) -> Size:
    """``image`` at the target's width (portrait targets) or else height; both sides grow by what is then missing."""
    width, height = image
    if target[0] < target[1]:
        short = max(target[1] - int(target[0] * height / width), 0)
        return target[0] + int(short * width / height), int(target[0] * height / width) + short
    short = max(target[0] - int(target[1] * width / height), 0)
    return int(target[1] * width / height) + short, target[1] + int(short * height / width)


def cover_truncated(image: Size, target: Size) -> Size:
    """``image`` scaled, with its ratio kept, to cover ``target``; the side in excess is truncated to whole pixels."""
    width, height = image
    if target[0] * height >= target[1] * width:
        return target[0], target[0] * height // width
    return target[1] * width // height, target[1]
