"""Prompt lines and prompt files, with the names of their fields as kohya-ss/sd-scripts has them.

A line is a prompt followed by flags: ``a cat --w 768 --h 512 --d 1 --s 28 --l 4``. ``--n`` negative prompt, ``--w``
``--h`` size, ``--d`` seed, ``--s`` steps, ``--l`` guidance scale, ``--fs`` flow shift, ``--g`` embedded guidance,
``--ss`` sampler. Files are ``.txt`` (one line each, ``#`` starts a comment), ``.json`` (a list of lines or objects, or
an object of names and these, which is the prompt library of SimpleTuner) or ``.toml`` (``[prompt]`` and
``[[prompt.subset]]``).
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tuner.core.errors import UsageError

log = logging.getLogger(__name__)

MAX_STEPS = 1000

_INTEGER = r"(\d+)"
_NUMBER = r"([\d.]+)"
# A value needs a space before it; without one the flag carries nothing and is reported.
_FLAGS: tuple[tuple[str, str, Callable[[str], Any]], ...] = (
    ("width", rf"w {_INTEGER}", int),
    ("height", rf"h {_INTEGER}", int),
    ("seed", rf"d {_INTEGER}", int),
    ("sample_steps", rf"s {_INTEGER}", lambda text: max(1, min(MAX_STEPS, int(text)))),
    ("scale", rf"l {_NUMBER}", float),
    ("guidance_scale", rf"g {_NUMBER}", float),
    ("negative_prompt", r"n (.+)", str),
    ("sample_sampler", r"ss (.+)", str),
    ("controlnet_image", r"cn (.+)", str),
    ("cfg_trunc_ratio", rf"ctr {_NUMBER}", float),
    ("renorm_cfg", rf"rcfg {_NUMBER}", float),
    ("flow_shift", r"fs (.+)", str),
)
_COUNTS = ("width", "height", "sample_steps")
_NUMBERS = ("scale", "guidance_scale", "cfg_trunc_ratio", "renorm_cfg")
_FIELDS = ("prompt", *(name for name, _, _ in _FLAGS))


def parse_line(line: str) -> dict[str, Any]:
    """The fields of one prompt line by their sd-scripts names; flags that carry no usable value are left out."""
    parts = line.split(" --")
    fields: dict[str, Any] = {"prompt": parts[0]}
    # The first part is looked at too: the reference reads a prompt that begins like a flag as that flag as well.
    for number, part in enumerate(parts):
        match = _parse_flag(part.strip())
        if match is not None:
            fields[match[0]] = match[1]
            if number == 0:
                log.warning("the prompt %r begins like the flag --%s and is read as that too", line, part.split()[0])
        elif number > 0:
            log.warning("--%s in the prompt %r is not understood and has no effect", part.strip(), parts[0])
    return fields


def _parse_flag(part: str) -> tuple[str, Any] | None:
    for name, pattern, convert in _FLAGS:
        match = re.match(pattern, part, re.IGNORECASE)
        if match is None:
            continue
        try:
            return name, convert(match.group(1))
        except ValueError:
            return None
    return None


def read_prompt_file(path: Path) -> list[dict[str, Any]]:
    """All prompts of a file as fields. UsageError: it cannot be read or understood, or holds no prompt."""
    try:
        # Some editors begin a file with a mark, which would be a part of the first prompt.
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        where, fix = f"{path}, sample.prompts", "correct the path, or write the prompts into the list sample.prompts"
        raise UsageError("cannot read the prompt file", where=where, why=error.strerror, fix=fix) from error
    except UnicodeDecodeError as error:
        raise UsageError("the prompt file is not UTF-8 text", where=f"{path}, byte {error.start}") from error
    try:
        entries = _parse_file(path, text)
    except ValueError as error:
        raise UsageError("this prompt file is not understood", where=str(path), why=str(error)) from error
    if not entries:
        raise UsageError("the prompt file holds no prompt", where=str(path), fix="write one prompt per line")
    return entries


def _parse_file(path: Path, text: str) -> list[dict[str, Any]]:
    """The prompts in the text of a file. ValueError: another structure."""
    suffix = path.suffix.lower()
    if suffix == ".toml":
        section = tomllib.loads(text).get("prompt")
        common = dict(section) if isinstance(section, dict) else {}
        subsets = common.pop("subset", None)
        if not isinstance(subsets, list) or not all(isinstance(each, dict) for each in subsets):
            raise ValueError("it needs [prompt], and a [[prompt.subset]] for each prompt")
        return [_checked({**common, **each}, f"{path}, prompt {number}") for number, each in enumerate(subsets, 1)]
    if suffix == ".json":
        document = json.loads(text)
        entries = list(document.values()) if isinstance(document, dict) else document
        if not isinstance(entries, list):
            raise ValueError("it needs a list of prompts, or an object of names and prompts")
        return [
            parse_line(entry) if isinstance(entry, str) else _checked(entry, f"{path}, prompt {number}")
            for number, entry in enumerate(entries, 1)
        ]
    lines = [line.rstrip("\r\n") for line in text.split("\n")]
    return [parse_line(line.strip()) for line in lines if line.strip() and not line.startswith("#")]


def _checked(entry: Any, where: str) -> dict[str, Any]:
    """The fields of an entry that are not null. UsageError: a field that is not known, or a value of another type."""
    if not isinstance(entry, Mapping):
        raise UsageError(f"a prompt is text or an object, not {entry!r}", where=where)
    fields = {name: value for name, value in entry.items() if value is not None}
    for name, value in fields.items():
        if name not in _FIELDS:
            near = difflib.get_close_matches(name, _FIELDS, 1)
            fix = f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(_FIELDS)}"
            raise UsageError(f"a prompt has no field {name!r}", where=where, fix=fix)
        wanted = _wanted(name, value)
        if wanted is not None:
            raise UsageError(f"{name} of a prompt: expected {wanted}, got {value!r}", where=where)
    if "prompt" not in fields:
        raise UsageError("there is no field 'prompt'", where=where, fix="write the text of the picture there")
    return fields


def _wanted(name: str, value: Any) -> str | None:
    """What a field should hold; None when ``value`` is that."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if name in _COUNTS:
        return None if number and isinstance(value, int) and value >= 1 else "a whole number above 0"
    if name == "seed":
        return None if number and isinstance(value, int) and value >= 0 else "a whole number, 0 or more"
    if name in _NUMBERS:
        return None if number and value >= 0 else "a number, 0 or more"
    if name == "flow_shift":
        return None if number or isinstance(value, str) else "a number"
    return None if isinstance(value, str) else "text"
