"""The caption pipeline: from the text of a source to the text that is encoded, at every visit, cached or not.

Everything here is a pure function of the settings, the text, and for draws of (rng, epoch, step). The order of the
stages follows kohya-ss/sd-scripts: affixes, dropout, line, wildcards, tags, group separator, replacements. The rules
differ in few places:

* ``tuner``: prefix and suffix belong to the chosen line, and the fixed marker never stays in the text.
* ``sd_scripts``: prefix and suffix belong to the whole text, so a line between the first and the last has neither;
  without shuffle, tag dropout and warmup the marker stays in the text.
* ``simpletuner``: lines keep their spaces; ``variants`` is a fixed list of orders made with Python's own generator.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tuner.core.config import CaptionsConfig, Replacement, steps_of
from tuner.core.data.wildcards import count_expansions, expand, expansions
from tuner.core.rng import Rng

_TOO_MANY = 1 << 16
"""More orders than this are not tried out to see whether they give few texts."""


@dataclass(frozen=True, slots=True)
class TagParts:
    """A caption split into tags: only ``free`` ones are thinned out, shuffled or dropped."""

    head: tuple[str, ...]
    free: tuple[str, ...]
    tail: tuple[str, ...]

    def text(self, config: CaptionsConfig, free: Iterable[str]) -> str:
        return config.join.join((*self.head, *free, *self.tail))


def draw_caption(config: CaptionsConfig, raw: str, *, rng: Rng, epoch: int, step: int, max_steps: int) -> str:
    """The caption of one visit.

    raw: the text of the source, all lines. rng: named after the visit. epoch: from 1. step: updates done so far.
    max_steps: planned updates, for a warmup given as a share. An empty result means that the caption is dropped.
    """
    if drops(config, rng=rng, epoch=epoch):
        return ""
    if config.variants is not None:
        return rng.child("variant").choice(_variant_pool(config, raw))
    return _drawn(config, raw, rng=rng, step=step, max_steps=max_steps)


def drops(config: CaptionsConfig, *, rng: Rng, epoch: int) -> bool:
    """Whether the whole caption of this visit is empty."""
    every = config.dropout_every_n_epochs
    if every and epoch % every == 0:
        return True
    return config.dropout > 0 and rng.child("dropout").random() < config.dropout


def plain_caption(config: CaptionsConfig, raw: str) -> str:
    """The one caption used where nothing may be random: first line, first parts, all tags in their own order."""
    text = _affixed_lines(config, raw)[0]
    if config.wildcards:
        text = expand(text, lambda _, options: options[0])
    parts = split_tags(config, text)
    return _finish(config, text if parts is None else parts.text(config, parts.free))


def caption_set(config: CaptionsConfig, raw: str, limit: int) -> tuple[str, ...] | None:
    """Every text that visits can get, apart from dropout of the whole caption; None when there are more than ``limit``.

    The texts are distinct, in an order that depends on the settings and the text only.
    """
    pool = _variant_pool(config, raw) if config.variants is not None else _all_texts(config, raw, limit)
    if pool is None:
        return None
    found: dict[str, None] = {}
    for text in pool:
        found[text] = None
        if len(found) > limit:
            return None
    return tuple(found)


# --- stages -----------------------------------------------------------------------------------------------------------


def _affixed_lines(config: CaptionsConfig, raw: str) -> list[str]:
    """The texts that a visit chooses from, with prefix and suffix: at least one, possibly empty."""
    if config.rule == "sd_scripts":
        # Affixes go around the whole text, so inner lines have none.
        whole = _affixed(config, raw)
        return [whole] if config.lines == "join" else _chosen(config, whole.split("\n"))
    if config.lines == "join":
        text = raw if config.rule == "simpletuner" else raw.strip()
        return [_affixed(config, text)]
    lines = [line for line in raw.split("\n") if line] if config.rule == "simpletuner" else caption_lines(raw)
    return [_affixed(config, line) for line in _chosen(config, lines or [""])]


def caption_lines(raw: str) -> list[str]:
    """Lines of a caption that are not blank. Only line breaks end one: not the other separators of Unicode."""
    return [line.strip() for line in re.split(r"\r\n|\r|\n", raw) if line.strip()]


def _chosen(config: CaptionsConfig, lines: list[str]) -> list[str]:
    return lines if config.lines == "random" else lines[:1]


def _affixed(config: CaptionsConfig, text: str) -> str:
    if config.prefix:
        text = f"{config.prefix} {text}"
    return f"{text} {config.suffix}" if config.suffix else text


def _drawn(config: CaptionsConfig, raw: str, *, rng: Rng, step: int, max_steps: int) -> str:
    lines = _affixed_lines(config, raw)
    text = lines[0] if len(lines) == 1 else rng.child("line").choice(lines)
    if config.wildcards:
        text = expand(text, lambda number, options: rng.child("wildcard", number).choice(options))
    parts = split_tags(config, text)
    if parts is not None:
        free: Sequence[str] = parts.free[: _warm_count(config, len(parts.free), step, max_steps)]
        if config.shuffle:
            free = rng.child("shuffle").shuffled(free)
        if config.tag_dropout > 0:
            chance = rng.child("tags")
            free = [tag for i, tag in enumerate(free) if chance.child(i).random() >= config.tag_dropout]
        text = parts.text(config, free)
    return _finish(config, text)


def split_tags(config: CaptionsConfig, text: str) -> TagParts | None:
    """Head, free tags and tail, or None when the text stays as it is.

    With the marker in the text its first two occurrences end the head and start the tail, and empty tags are left out.
    Without it the first ``keep_first`` tags are the head and empty tags stay.
    """
    by_tags = config.shuffle or config.tag_dropout > 0 or config.tag_warmup is not None
    marker = config.fixed_marker
    if marker and marker in text and (by_tags or config.rule == "tuner"):
        head, _, rest = text.partition(marker)
        middle, _, tail = rest.partition(marker)
        return TagParts(*(_tags(config, part) for part in (head, middle, tail)))
    if not by_tags:
        return None
    tags = tuple(tag.strip() for tag in text.strip().split(config.separator))
    return TagParts(tags[: config.keep_first], tags[config.keep_first :], ())


def _tags(config: CaptionsConfig, text: str) -> tuple[str, ...]:
    return tuple(tag.strip() for tag in text.split(config.separator) if tag.strip())


def _warm_count(config: CaptionsConfig, count: int, step: int, max_steps: int) -> int:
    """How many free tags take part at ``step``: from + floor(step * (count - from) / steps) of ``count``."""
    warmup = config.tag_warmup
    if warmup is None:
        return count
    steps = steps_of(warmup.steps, max_steps)
    if step >= steps:
        return count
    return max(0, math.floor(step * ((count - warmup.from_) / steps)) + warmup.from_)


def _finish(config: CaptionsConfig, text: str) -> str:
    if config.group_separator:
        text = text.replace(config.group_separator, config.separator)
    for replacement in config.replace:
        text = _replaced(replacement, text)
    return text


def _replaced(replacement: Replacement, text: str) -> str:
    if replacement.regex:
        return re.sub(replacement.find, replacement.with_, text)
    if not replacement.find:
        return replacement.with_
    return text.replace(replacement.find, replacement.with_)


# --- all texts of a caption -------------------------------------------------------------------------------------------


def _all_texts(config: CaptionsConfig, raw: str, limit: int) -> Iterator[str] | None:
    """All texts, possibly with repeats; None when there are too many to list."""
    lines = _affixed_lines(config, raw)
    if not config.wildcards:
        texts: Iterable[str] = lines
    elif sum(count_expansions(line) for line in lines) > max(limit, _TOO_MANY):
        return None
    else:
        texts = itertools.chain.from_iterable(expansions(line) for line in lines)
    spread = []
    for text in texts:
        parts = split_tags(config, text)
        if parts is not None and _count_orders(config, len(parts.free)) > max(limit, _TOO_MANY):
            return None
        spread.append((text, parts))
    return (each for text, parts in spread for each in _tag_texts(config, text, parts))


def _tag_texts(config: CaptionsConfig, text: str, parts: TagParts | None) -> Iterator[str]:
    if parts is None:
        yield _finish(config, text)
        return
    for warm in _prefixes(config, parts.free):
        for order in itertools.permutations(warm) if config.shuffle else (warm,):
            for kept in _subsets(config, order):
                yield _finish(config, parts.text(config, kept))


def _prefixes(config: CaptionsConfig, free: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    yield free
    if config.tag_warmup is not None:
        for count in range(min(config.tag_warmup.from_, len(free)), len(free)):
            yield free[:count]


def _subsets(config: CaptionsConfig, tags: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if config.tag_dropout == 0:
        yield tags
        return
    for size in (0,) if config.tag_dropout == 1 else range(len(tags), -1, -1):
        yield from itertools.combinations(tags, size)


def _count_orders(config: CaptionsConfig, count: int) -> int:
    orders = math.factorial(count) if config.shuffle else 1
    return orders * (2**count if 0 < config.tag_dropout < 1 else 1) * (count + 1 if config.tag_warmup else 1)


# --- variants ---------------------------------------------------------------------------------------------------------


def _variant_pool(config: CaptionsConfig, raw: str) -> list[str]:
    """The fixed captions of a text; a visit picks one of them, each entry with the same chance."""
    variants = config.variants
    assert variants is not None
    if config.rule == "simpletuner":
        return _ordered_variants(config, raw)
    pool = [plain_caption(config, raw)] if variants.include_original else []
    name = hashlib.blake2b(raw.encode(), digest_size=16).hexdigest()
    for number in range(variants.count):
        pool.append(_drawn(config, raw, rng=Rng(variants.seed, "variants", name, number), step=0, max_steps=0))
    return pool


def _ordered_variants(config: CaptionsConfig, raw: str) -> list[str]:
    """bghira/SimpleTuner: fixed orders of the movable tags of every line; the prefix is added afterwards."""
    bare = config.model_copy(update={"prefix": None, "suffix": None})
    orders = (order for line in _affixed_lines(bare, raw) for order in shuffled_orders(config, line))
    return [_finish(config, _affixed(config, order)) for order in dict.fromkeys(orders)]


def shuffled_orders(config: CaptionsConfig, text: str) -> list[str]:
    """Distinct orders of the tags of ``text``, whose first ``keep_first`` stay in place."""
    variants = config.variants
    assert variants is not None
    tags = [tag.strip() for tag in text.split(config.separator) if tag.strip()]
    fixed, movable = tags[: config.keep_first], tags[config.keep_first :]
    if len(movable) < 2:
        return [text]
    # The name of the hash and the sum are part of the reference's definition; this is no security use.
    base = variants.seed + int(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest(), 16) % 2**32
    joiner = config.separator if config.separator.isspace() else f"{config.separator} "
    orders = [text] if variants.include_original else []
    for number in range(variants.count):
        order = list(movable)
        random.Random(base + number).shuffle(order)
        orders.append(joiner.join(fixed + order))
    return list(dict.fromkeys(orders))
