"""Prompts of pictures: what a line, a file, the configuration and the model say about each of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.core.errors import UsageError
from tuner.core.flow import SAMPLERS, shift_value
from tuner.core.train.prompt_files import parse_line, read_prompt_file

if TYPE_CHECKING:
    from tuner.core.config.outputs import SampleConfig
    from tuner.core.types import ModelFacts

log = logging.getLogger(__name__)

MIN_SIDE = 64
MAX_SEED = 2**64 - 1
"""What a generator of random numbers takes."""
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
        if "negative_prompt" in entry and prompts[-1].cfg <= 1:
            log.warning("--n of the prompt %r has no effect: its guidance is not above 1 (--l)", prompts[-1].text)
    without = bool(prompts) and all(prompt.cfg <= 1 for prompt in prompts)
    if sample.negative and without:
        log.warning("sample.negative has no effect: no picture has guidance above 1 (sample.cfg)")
    if sample.cfg_rescale and without:
        raise UsageError(
            "sample.cfg_rescale has no effect",
            where="sample.cfg_rescale",
            why="no picture has guidance above 1",
            fix="set sample.cfg, or take it out",
        )
    return prompts


def _resolve(fields: Mapping[str, Any], index: int, number: int, sample: SampleConfig, facts: ModelFacts) -> Prompt:
    text = str(fields["prompt"]).strip()
    where = f"prompt {text!r}"
    for name in _UNSUPPORTED:
        if name in fields:
            raise UsageError(f"previews cannot use {name}", where=where, fix="remove that flag")
    guidance = fields.get("guidance_scale")
    if guidance is not None and not facts.guidance_input:
        log.warning("--g has no effect: this model has no embedded guidance; --l sets the guidance scale")
        guidance = None
    if guidance is None and facts.guidance_input:
        guidance = _first(sample.embedded_guidance, facts.sample.guidance, 1.0)
    guidance = None if guidance is None else float(guidance)
    width, height = _fitting_size(fields, sample, facts, where)
    return Prompt(
        text=text,
        negative=fields.get("negative_prompt", sample.negative),
        width=width,
        height=height,
        seed=checked_seed(fields["seed"] + number if "seed" in fields else sample.seed + index, where),
        steps=fields.get("sample_steps", sample.steps or facts.sample.steps),
        cfg=float(_first(fields.get("scale"), sample.cfg, facts.sample.cfg)),
        shift=_shift(fields, sample, facts, (height, width), where),
        guidance=guidance,
        sampler=_sampler(fields, sample, where),
        cfg_rescale=sample.cfg_rescale,
    )


def checked_seed(seed: int, where: str) -> int:
    """``seed``. UsageError when no generator takes it."""
    if seed > MAX_SEED:
        raise UsageError(f"the seed {seed} is too large", where=where, fix=f"use at most {MAX_SEED}")
    return seed


def _sampler(fields: Mapping[str, Any], sample: SampleConfig, where: str) -> str:
    name = str(fields.get("sample_sampler", sample.sampler)).strip()
    if name not in SAMPLERS:
        raise UsageError(
            f"there is no sampler {name!r}",
            where=f"sample_sampler (--ss) of the {where}",
            fix=f"use {' or '.join(SAMPLERS)}",
        )
    return name


def _fitting_size(fields: Mapping[str, Any], sample: SampleConfig, facts: ModelFacts, where: str) -> tuple[int, int]:
    """Width and height, rounded down to what the model can draw."""
    asked = [fields.get(*side) for side in zip(("width", "height"), sample.size or facts.sample.size, strict=True)]
    multiple, least = facts.sample.multiple, min(MIN_SIDE, facts.sample.size[0])
    width, height = (max(least, side // multiple * multiple) for side in asked)
    if [width, height] != asked:
        log.info(
            "%s: %dx%d instead of %dx%d, as sides are multiples of %d and %d at least",
            where, width, height, *asked, multiple, least,
        )  # fmt: skip
    return width, height


def _shift(
    fields: Mapping[str, Any], sample: SampleConfig, facts: ModelFacts, size: tuple[int, int], where: str
) -> float:
    wanted = _first(fields.get("flow_shift"), sample.shift, facts.sample.shift)
    if wanted == "auto":
        factor = facts.spatial_factor
        return shift_value("auto", (size[0] // factor, size[1] // factor))
    try:
        shift = float(wanted)
    except ValueError as error:
        raise UsageError("--fs is not a number", where=where, why=str(error)) from error
    if not 0 < shift < math.inf:
        raise UsageError("--fs must be a number above 0", where=where)
    return shift


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def texts_of(prompts: Sequence[Prompt]) -> list[str]:
    """Every string that the prompts need encoded, once each."""
    return list(dict.fromkeys(text for prompt in prompts for text in (prompt.text, prompt.negative)))
