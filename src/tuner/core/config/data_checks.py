"""Rules that span several keys of a set's geometry or of a source's captions.

Like all such rules they never object to a value that equals its default, so a resolved configuration passes again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tuner.core.config.base import changed_keys
from tuner.core.config.captions import CaptionsConfig, Replacement
from tuner.core.config.data import CropConfig, SetConfig
from tuner.core.config.jsonc import Path

Problem = tuple[Path, str, str | None]
"""JSON path, what is wrong there, what to do."""

_LIST_KEYS = ("min", "max", "upscale")
_TAG_KEYS = ("shuffle", "tag_dropout", "tag_warmup", "wildcards", "fixed_marker", "group_separator")


def geometry_problems(entry: SetConfig, place: Path) -> Iterator[Problem]:
    """What cannot work, or has no effect, in the geometry of the set at ``place``."""
    buckets, crop = entry.buckets, entry.crop
    fixed = not buckets.enabled or entry.resolution_mode == "fixed"
    by_ratio = not fixed and (entry.resolution_mode == "short_edge" or buckets.rule == "simpletuner")
    if buckets.max is not None and buckets.max < buckets.min:
        yield (*place, "buckets", "max"), f"is below buckets.min ({buckets.min})", None
    if entry.resolution_mode == "fixed" and buckets.enabled and changed_keys(buckets) - {"upscale", "max_upscale"}:
        yield (*place, "buckets"), "have no effect with resolution_mode 'fixed'", "take them out"
    for key in _LIST_KEYS:
        if by_ratio and key in changed_keys(buckets):
            fix = "take it out, or choose rule 'sd_scripts' and resolution_mode 'area'"
            yield (*place, "buckets", key), "has an effect only where a list of buckets is made", fix
    if "rounding" in changed_keys(buckets) and not by_ratio:
        yield (*place, "buckets", "rounding"), "has no effect with rule 'sd_scripts'", "take it out"
    yield from _crop_problems(crop, (*place, "crop"), by_ratio=by_ratio, fixed=fixed)


def _crop_problems(crop: CropConfig, place: Path, *, by_ratio: bool, fixed: bool) -> Iterator[Problem]:
    if not by_ratio:
        for key in sorted(changed_keys(crop) & {"aspect", "shrink_above", "shrink_to"}):
            fix = "take it out, or choose buckets.rule 'simpletuner' or resolution_mode 'short_edge'"
            yield (*place, key), "has no effect with a list of buckets or a fixed size", fix
    if crop.aspect == "closest" and not crop.aspect_list:
        yield (*place, "aspect"), "'closest' needs aspect_list", 'add "aspect_list": [0.75, 1.0, 1.33]'
    if crop.aspect_list and crop.aspect != "closest":
        yield (*place, "aspect_list"), f"has no effect with aspect {crop.aspect!r}", "set aspect to 'closest'"
    for key, other in (("shrink_above", "shrink_to"), ("shrink_to", "shrink_above")):
        if getattr(crop, key) is not None and getattr(crop, other) is None:
            yield (*place, key), f"needs {other}", f"add {other}"
    if crop.face_range is not None and crop.style != "face":
        yield (*place, "face_range"), f"has no effect with style {crop.style!r}", "set style to 'face'"
    if crop.face_range is not None and crop.face_range[0] > crop.face_range[1]:
        yield (*place, "face_range"), "the first number must not be above the second", None
    if crop.style == "face" and not fixed:
        yield (*place, "style"), "'face' works without buckets only", 'add "buckets": {"enabled": false}'


def caption_problems(captions: CaptionsConfig, path: Path) -> Iterator[Problem]:
    """What cannot work, or has no effect, in the captions at ``path``."""
    yield from _origin_problems(captions, path)
    if captions.tag_warmup is not None and captions.tag_warmup.steps == 0:
        yield (*path, "tag_warmup", "steps"), "must be above 0", None
    if not captions.separator:
        yield (*path, "separator"), "must not be empty", "take it out to split at commas"
    if captions.variants is not None and captions.tag_warmup is not None:
        yield (*path, "variants"), "are fixed, and tag_warmup changes captions with the step", "take one of both out"
    draws = captions.shuffle or captions.tag_dropout > 0 or captions.wildcards or captions.lines == "random"
    if captions.variants is not None and captions.rule != "simpletuner" and not draws:
        fix = "set shuffle, tag_dropout or wildcards, or take it out"
        yield (*path, "variants"), "has no effect: nothing is drawn", fix
    if captions.rule == "simpletuner":
        for key in sorted(changed_keys(captions) & set(_TAG_KEYS)):
            fix = "use variants to shuffle, or choose rule 'tuner'"
            yield (*path, key), "is not part of rule 'simpletuner'", fix
    for number, replacement in enumerate(captions.replace):
        error = _pattern_error(replacement)
        if error is not None:
            yield (*path, "replace", number), f"the pattern {replacement.find!r} does not work: {error}", None


def _pattern_error(replacement: Replacement) -> str | None:
    if not replacement.regex:
        return None
    try:
        re.sub(replacement.find, replacement.with_, "")
    except (re.error, IndexError) as error:
        return str(error)
    return None


def _origin_problems(captions: CaptionsConfig, path: Path) -> Iterator[Problem]:
    for origin in ("fixed", "metadata"):
        given = getattr(captions, origin) is not None
        if captions.from_ == origin and not given:
            yield (*path, "from"), f"{origin!r} needs captions.{origin}", None
        elif given and captions.from_ != origin:
            yield (*path, origin), f"has no effect with from {captions.from_!r}", f'set "from": "{origin}"'
    for key in ("extension", "allow_empty"):
        if key in changed_keys(captions) and captions.from_ != "file":
            yield (*path, key), f"has no effect with from {captions.from_!r}", "take it out"
    if captions.extension and not captions.extension.startswith("."):
        yield (*path, "extension"), "an extension begins with a dot", f"write {'.' + captions.extension!r}"
    for key in ("fallback", "on_missing"):
        if key in changed_keys(captions) and captions.from_ in ("filename", "fixed"):
            yield (*path, key), f"has no effect: from {captions.from_!r} always gives a caption", "take it out"
