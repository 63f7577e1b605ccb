"""Rules that span several keys of a set's geometry or of a source's captions.

Like all such rules they never object to a value that equals its default, so a resolved configuration passes again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from tuner.core.config.base import changed_keys
from tuner.core.config.captions import CaptionsConfig, Replacement
from tuner.core.config.data import CropConfig, SetConfig, SourceConfig
from tuner.core.config.jsonc import Path

Problem = tuple[Path, str, str | None]
"""JSON path, what is wrong there, what to do."""


class Unused(NamedTuple):
    """A ``Problem`` of a key that has no effect where it is. An inherited one counts only when no heir uses it."""

    path: Path
    what: str
    fix: str | None = "take it out"


_LIST_KEYS = ("min", "max", "upscale")
_TAG_KEYS = ("shuffle", "tag_dropout", "tag_warmup", "wildcards", "fixed_marker", "group_separator")


def geometry_problems(entry: SetConfig, place: Path) -> Iterator[Problem]:
    """What cannot work, or has no effect, in the geometry of the set at ``place``."""
    buckets = entry.buckets
    fixed = not buckets.enabled or entry.resolution_mode == "fixed"
    by_ratio = not fixed and (entry.resolution_mode == "short_edge" or buckets.rule == "simpletuner")
    if buckets.max is not None and buckets.max < buckets.min:
        yield (*place, "buckets", "max"), f"is below buckets.min ({buckets.min})", None
    for key, why in _unused_bucket_keys(entry, by_ratio=by_ratio, fixed=fixed).items():
        yield Unused((*place, "buckets", key), f"has no effect {why}")
    yield from _crop_problems(entry.crop, (*place, "crop"), by_ratio=by_ratio, fixed=fixed)


def _unused_bucket_keys(entry: SetConfig, *, by_ratio: bool, fixed: bool) -> dict[str, str]:
    """Keys of ``buckets`` that are set and not used, with the reason."""
    buckets, given = entry.buckets, changed_keys(entry.buckets)
    unused: dict[str, str] = {}
    if fixed:
        why = "with resolution_mode 'fixed'" if entry.resolution_mode == "fixed" else "while buckets.enabled is off"
        unused |= dict.fromkeys(sorted(given - {"enabled", "upscale", "max_upscale"}), why)
    elif by_ratio:
        unused |= dict.fromkeys(_LIST_KEYS, "where no list of buckets is made")
    else:
        unused["rounding"] = "with rule 'sd_scripts'"
    if not buckets.upscale:
        unused["max_upscale"] = "while buckets.upscale is off"
        if not fixed and not by_ratio:
            unused |= dict.fromkeys(("min", "max"), "while buckets.upscale is off: each image makes its own bucket")
    return {key: why for key, why in unused.items() if key in given}


def _crop_problems(crop: CropConfig, place: Path, *, by_ratio: bool, fixed: bool) -> Iterator[Problem]:
    if not by_ratio:
        for key in sorted(changed_keys(crop) & {"aspect", "shrink_above", "shrink_to"}):
            fix = "take it out, or choose buckets.rule 'simpletuner' or resolution_mode 'short_edge'"
            yield Unused((*place, key), "has no effect with a list of buckets or a fixed size", fix)
    chosen = crop.aspect in ("closest", "random")
    if chosen and not crop.aspect_list:
        yield (*place, "aspect"), f"{crop.aspect!r} needs aspect_list", 'add "aspect_list": [0.75, 1.0, 1.33]'
    if crop.aspect_list and not chosen:
        yield Unused((*place, "aspect_list"), f"has no effect with aspect {crop.aspect!r}", "set aspect to 'closest'")
    for key, other in (("shrink_above", "shrink_to"), ("shrink_to", "shrink_above")):
        if getattr(crop, key) is not None and getattr(crop, other) is None:
            yield (*place, key), f"needs {other}", f"add {other}"
    if crop.face_range is not None and crop.style != "face":
        yield Unused((*place, "face_range"), f"has no effect with style {crop.style!r}", "set style to 'face'")
    if crop.face_range is not None and crop.face_range[0] > crop.face_range[1]:
        yield (*place, "face_range"), "the first number must not be above the second", None
    if crop.style == "face" and not fixed:
        yield (*place, "style"), "'face' works without buckets only", 'add "buckets": {"enabled": false}'


def validation_problems(source: SourceConfig, place: Path) -> Iterator[Problem]:
    """Random changes and repeats of a source with the role ``validation``: what is held out has none."""
    if source.role != "validation":
        return
    captions, augment = changed_keys(source.captions), changed_keys(source.augment)
    paths: list[Path] = [(key,) for key in sorted(changed_keys(source) & {"repeats", "weight"})]
    paths += [("augment", key) for key in sorted(augment)]
    paths += [("captions", key) for key in sorted(captions & {"dropout", "dropout_every_n_epochs", "variants"})]
    for path in paths:
        yield Unused((*place, *path), "has no effect with the role 'validation'")


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
        yield Unused((*path, "variants"), "has no effect: nothing is drawn", fix)
    if captions.rule == "simpletuner":
        for key in sorted(changed_keys(captions) & set(_TAG_KEYS)):
            fix = "use variants to shuffle, or choose rule 'tuner'"
            yield Unused((*path, key), "is not part of rule 'simpletuner'", fix)
    for key in _unused_tag_keys(captions):
        fix = "set shuffle, tag_dropout or tag_warmup, or take it out"
        yield Unused((*path, key), "has no effect: captions are not split into tags", fix)
    for number, replacement in enumerate(captions.replace):
        error = _pattern_error(replacement)
        if error is not None:
            yield (*path, "replace", number), f"the pattern {replacement.find!r} does not work: {error}", None


def _unused_tag_keys(captions: CaptionsConfig) -> list[str]:
    """Keys about tags that are set although no caption is split into tags."""
    shuffles = captions.rule == "simpletuner" and captions.variants is not None
    by_tags = captions.shuffle or captions.tag_dropout > 0 or captions.tag_warmup is not None
    marked = captions.fixed_marker is not None and captions.rule == "tuner"
    glued = captions.from_ == "metadata"
    used = {
        "keep_first": by_tags or shuffles,
        "separator": by_tags or shuffles or marked or glued or captions.group_separator is not None,
        "join": by_tags or marked or glued,
        "fixed_marker": by_tags or captions.rule != "sd_scripts",
    }
    given = {key for key in changed_keys(captions) if getattr(captions, key)}
    return [key for key, is_used in used.items() if not is_used and key in given]


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
            yield Unused((*path, origin), f"has no effect with from {captions.from_!r}", f'set "from": "{origin}"')
    for key in ("extension", "allow_empty"):
        if key in changed_keys(captions) and captions.from_ != "file":
            yield Unused((*path, key), f"has no effect with from {captions.from_!r}")
    if captions.extension and not captions.extension.startswith("."):
        yield (*path, "extension"), "an extension begins with a dot", f"write {'.' + captions.extension!r}"
    for key in ("fallback", "on_missing"):
        if key in changed_keys(captions) and captions.from_ in ("filename", "fixed"):
            yield Unused((*path, key), f"has no effect: from {captions.from_!r} always gives a caption")
