"""Which captions a run encodes, and which of their fields can be kept. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuner.core.data.captions import caption_set, plain_caption
from tuner.core.errors import Problems, UsageError

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.data.plan import DataPlan
    from tuner.core.types import Field, ModelFacts


def cached_fields(config: RunConfig, facts: ModelFacts) -> dict[str, Field]:
    """The text fields that do not depend on a component that trains."""
    training = set(config.train.components)
    return {name: field for name, field in facts.text_fields.items() if not training & set(field.of)}


def live_components(config: RunConfig, facts: ModelFacts) -> tuple[str, ...]:
    """The text components that every step runs, because they train or because ``cache.text`` is off."""
    cached = cached_fields(config, facts) if config.cache.text != "off" else {}
    live = {name for field, spec in facts.text_fields.items() if field not in cached for name in spec.of}
    return tuple(name for name in facts.components if name in live)


def check_homes(config: RunConfig, facts: ModelFacts) -> None:
    """UsageError for an encoder on the CPU that every step runs: it would wait for it."""
    # What the model runs beside the denoiser need not make a text field.
    for name in dict.fromkeys((*live_components(config, facts), *config.train.components, *facts.step_components)):
        if config.text_encoder.device.get(name) == "cpu":
            raise UsageError(
                f"{name} runs in every step, and cannot stay on the CPU",
                where=f"text_encoder.device.{name}",
                why="it trains, or its encodings are not cached",
                fix='take it out, or set cache.text to "disk"',
            )


def planned_texts(plan: DataPlan, config: RunConfig) -> list[str]:
    """Every distinct text that the run will ask for, ``""`` included.

    Raises UsageError naming every source whose captions can become more texts than ``cache.max_text_variants``.
    """
    texts: dict[str, None] = {"": None}
    problems: dict[str, UsageError] = {}
    known: set[tuple[str, str]] = set()
    for item in plan.items:
        sample = (item.source, item.record.captions_raw)
        if sample in known or item.source in problems:
            continue
        known.add(sample)
        variants = caption_set(plan.sources[item.source].captions, sample[1], config.cache.max_text_variants)
        if variants is None:
            problems[item.source] = _too_many(item.source, item.record.name, config.cache.max_text_variants)
        else:
            texts.update(dict.fromkeys(variants))
    collected = Problems()
    collected.extend(problems.values())
    collected.raise_if_any()
    texts.update({plain_caption(plan.sources[each.source].captions, each.record.captions_raw): None
                  for each in plan.validation})  # fmt: skip
    return list(texts)


def _too_many(source: str, image: str, limit: int) -> UsageError:
    return UsageError(
        f"the captions of source {source} cannot be cached: they can become more than {limit} texts",
        where=image,
        why="captions are shuffled, thinned out or drawn at every visit",
        fix='set captions.variants to a number of fixed drawings, or cache.text to "off" to encode in every step',
    )
