"""Prompt lines and prompt files for previews.

A line is a prompt followed by flags, as users of kohya-ss/sd-scripts write them: ``a cat --w 768 --h 512 --d 1 --s 28
--l 4``. ``--n`` negative prompt, ``--w`` ``--h`` size, ``--d`` seed, ``--s`` steps, ``--l`` guidance scale, ``--fs``
flow shift, ``--g`` embedded guidance, ``--ss`` sampler. Files are ``.txt`` (one line each, ``#`` starts a comment),
``.json`` (list of lines or objects) or ``.toml``.
"""

from __future__ import annotations

import json
import logging
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.core.errors import UsageError
from tuner.core.flow import SAMPLERS, shift_value

if TYPE_CHECKING:
    from tuner.core.config.outputs import SampleConfig
    from tuner.core.types import ModelFacts

log = logging.getLogger(__name__)

MAX_STEPS = 1000
MIN_SIDE = 64

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
_UNSUPPORTED = ("controlnet_image", "cfg_trunc_ratio", "renorm_cfg")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One picture to sample; sizes in pixels, ``guidance`` None means the model's default."""

    text: str
    negative: str
    width: int
    height: int
    seed: int
    steps: int
    cfg: float
    shift: float
    guidance: float | None = None
    sampler: str = "euler"
    cfg_rescale: float = 0.0


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
    """All prompts of a file as fields. Raises UsageError when it cannot be read or understood."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        where, fix = f"{path}, sample.prompts", "correct the path, or write the prompts into the list sample.prompts"
        raise UsageError("cannot read the prompt file", where=where, why=error.strerror, fix=fix) from error
    except UnicodeDecodeError as error:
        raise UsageError("the prompt file is not UTF-8 text", where=f"{path}, byte {error.start}") from error
    try:
        return _parse_file(path.suffix.lower(), text)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UsageError("this prompt file is not understood", where=str(path), why=str(error)) from error


def _parse_file(suffix: str, text: str) -> list[dict[str, Any]]:
    if suffix == ".toml":
        common = dict(tomllib.loads(text)["prompt"])
        subsets = common.pop("subset")
        return [{**common, **subset} for subset in subsets]
    if suffix == ".json":
        return [parse_line(entry) if isinstance(entry, str) else dict(entry) for entry in json.loads(text)]
    lines = [line.rstrip("\r\n") for line in text.split("\n")]
    return [parse_line(line.strip()) for line in lines if line.strip() and not line.startswith("#")]


def resolve_prompts(sample: SampleConfig, facts: ModelFacts) -> list[Prompt]:
    """Every picture of one preview, ``sample.count`` per prompt, with the defaults of config and model filled in."""
    if isinstance(sample.prompts, str):
        entries = read_prompt_file(Path(sample.prompts))
    else:
        entries = [parse_line(line) for line in sample.prompts]
    prompts: list[Prompt] = []
    for entry in entries:
        for number in range(sample.count):
            prompts.append(_resolve(entry, len(prompts), number, sample, facts))
    if sample.cfg_rescale and prompts and all(prompt.cfg <= 1 for prompt in prompts):
        raise UsageError(
            "sample.cfg_rescale has no effect",
            where="sample.cfg_rescale",
            why="no picture has guidance above 1",
            fix="set sample.cfg, or take it out",
        )
    return prompts


def _resolve(fields: Mapping[str, Any], index: int, number: int, sample: SampleConfig, facts: ModelFacts) -> Prompt:
    for name in _UNSUPPORTED:
        if name in fields:
            raise UsageError(
                f"previews cannot use {name}", where=f"prompt {fields['prompt']!r}", fix="remove that flag"
            )
    guidance = fields.get("guidance_scale")
    if guidance is not None and not facts.guidance_input:
        log.warning("--g has no effect: this model has no embedded guidance; --l sets the guidance scale")
        guidance = None
    if guidance is None and facts.guidance_input:
        guidance = _first(sample.embedded_guidance, facts.sample.guidance, 1.0)
    width, height = sample.size or facts.sample.size
    seed = fields["seed"] + number if "seed" in fields else sample.seed + index
    width, height = (_fit_side(fields.get(*side), facts) for side in (("width", width), ("height", height)))
    return Prompt(
        text=str(fields["prompt"]).strip(),
        negative=fields.get("negative_prompt", sample.negative),
        width=width,
        height=height,
        seed=seed,
        steps=fields.get("sample_steps", sample.steps or facts.sample.steps),
        cfg=_first(fields.get("scale"), sample.cfg, facts.sample.cfg),
        shift=_shift(fields, sample, facts, (height, width)),
        guidance=guidance,
        sampler=_sampler(fields, sample),
        cfg_rescale=sample.cfg_rescale,
    )


def _sampler(fields: Mapping[str, Any], sample: SampleConfig) -> str:
    name = str(fields.get("sample_sampler", sample.sampler)).strip()
    if name not in SAMPLERS:
        raise UsageError(
            f"there is no sampler {name!r}",
            where=f"sample_sampler (--ss) of the prompt {fields['prompt']!r}",
            fix=f"use {' or '.join(SAMPLERS)}",
        )
    return name


def _fit_side(side: int, facts: ModelFacts) -> int:
    """Rounded down to what the model can draw."""
    multiple = facts.sample.multiple
    return max(min(MIN_SIDE, facts.sample.size[0]), side // multiple * multiple)


def _shift(fields: Mapping[str, Any], sample: SampleConfig, facts: ModelFacts, size: tuple[int, int]) -> float:
    wanted = _first(fields.get("flow_shift"), sample.shift, facts.sample.shift)
    if wanted == "auto":
        factor = facts.spatial_factor
        return shift_value("auto", (size[0] // factor, size[1] // factor))
    try:
        shift = float(wanted)
    except ValueError as error:
        raise UsageError("--fs is not a number", where=f"prompt {fields['prompt']!r}", why=str(error)) from error
    if shift <= 0:
        raise UsageError("--fs must be above 0", where=f"prompt {fields['prompt']!r}")
    return shift


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def texts_of(prompts: Sequence[Prompt]) -> list[str]:
    """Every string that the prompts need encoded, once each."""
    return list(dict.fromkeys(text for prompt in prompts for text in (prompt.text, prompt.negative)))
