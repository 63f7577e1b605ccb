"""Encoded captions: which texts a run needs, encoding the missing ones, and joining them into batches.

One entry holds the cached fields of one final caption, without padding. The empty caption is always among them: it
replaces dropped captions and is the unconditional input.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from tuner.core.data.cache import CacheKey, Store
from tuner.core.data.keys import text_key
from tuner.core.data.texts import cached_fields as cached_fields
from tuner.core.data.texts import planned_texts as planned_texts
from tuner.core.errors import UsageError
from tuner.core.types import TextEmbeds

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.types import Field, ModelFacts, Models

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""(done, total) of the entries that were missing."""

DTYPES = {
    "bf16": torch.bfloat16, "fp32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "float32": torch.float32, "int64": torch.int64, "bool": torch.bool,
}  # fmt: skip


class TextFacade(Protocol):
    """What is needed of ``ModelFacade``."""

    def encode_text(self, models: Models, captions: Sequence[str], components: Collection[str]) -> TextEmbeds: ...


class TextCache:
    """Encodings of captions. ``models`` loads the frozen text components; it is called when something is missing."""

    def __init__(
        self,
        config: RunConfig,
        facts: ModelFacts,
        *,
        store: Store,
        facade: TextFacade,
        models: Callable[[], Models],
        identities: Mapping[str, str],
    ) -> None:
        self.fields = cached_fields(config, facts)
        used = {component for field in self.fields.values() for component in field.of}
        self.components = tuple(name for name in facts.components if name in used)
        self.store, self.facade, self.models = store, facade, models
        self.batch_size = config.cache.text_batch_size
        self.dtype = config.cache.dtype
        self.encoders = _encoders(config, facts, self.components, self.fields, identities)
        self._lock = threading.Lock()

    def key(self, text: str) -> CacheKey:
        return text_key(text=text, encoders=self.encoders, dtype=self.dtype)

    def missing(self, texts: Iterable[str]) -> list[str]:
        """The distinct texts without an entry, short ones first: equal lengths need no padding in a forward."""
        absent = {text: None for text in texts if not self.store.has(self.key(text))}
        return sorted(absent, key=lambda text: (len(text.encode()), text))

    def fill(self, texts: Iterable[str], on_progress: Progress | None = None) -> int:
        """Encode what is missing; returns how many. A killed run goes on where it stopped."""
        absent = self.missing(texts)
        if not absent:
            return 0
        models = self.models()
        for start in range(0, len(absent), self.batch_size):
            batch = absent[start : start + self.batch_size]
            for text, tensors in zip(batch, self._encode(models, batch), strict=True):
                self.store.put(self.key(text), tensors)
            if on_progress is not None:
                on_progress(start + len(batch), len(absent))
        return len(absent)

    def get(self, text: str) -> dict[str, Tensor]:
        """The fields of one text without batch axis and padding; a missing or broken entry is made again."""
        key = self.key(text)
        tensors = self.store.get(key)
        if tensors is not None:
            return tensors
        # One thread at a time: loading the encoder twice could exhaust the memory.
        with self._lock:
            tensors = self.store.get(key)
            if tensors is None:
                [tensors] = self._encode(self.models(), [text])
                self.store.put(key, tensors)
        return tensors

    def collate(self, texts: Sequence[str]) -> TextEmbeds:
        """The cached fields of B texts as [B, ...], padded to the longest or the field's floor, on the CPU."""
        return join_text([self.get(text) for text in texts], self.fields)

    @torch.no_grad()
    def _encode(self, models: Models, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        embeds = self.facade.encode_text(models, texts, self.components)
        rows = split_text(embeds, self.fields)
        for text, row in zip(texts, rows, strict=True):
            for name, tensor in row.items():
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise UsageError(
                        f"the encoding of a caption is not finite (field {name})",
                        where=repr(text[:80]),
                        fix='set the encoder\'s dtype in precision.text_encoder to "fp32"',
                    )
        kept = DTYPES[self.dtype]
        return [
            {name: tensor.to(kept) if tensor.is_floating_point() else tensor for name, tensor in row.items()}
            for row in rows
        ]


def split_text(embeds: TextEmbeds, fields: Mapping[str, Field]) -> list[dict[str, Tensor]]:
    """One dict per sample, on the CPU, without the rows that a field's ``trim`` mask marks as padding at the end."""
    tensors = {name: embeds.tensors[name].detach().cpu() for name in fields}
    count = next(iter(tensors.values())).shape[0] if tensors else 0
    rows = []
    for index in range(count):
        row = {}
        for name in fields:
            tensor, mask_name = tensors[name][index], _mask_of(name, fields)
            if mask_name is not None:
                mask = tensors[mask_name][index]
                length = int(mask.nonzero().max()) + 1 if bool(mask.any()) else 0
                tensor = tensor.narrow(_token_axis(fields[name]), 0, length)
            row[name] = tensor.clone()
        rows.append(row)
    return rows


def join_text(rows: Sequence[Mapping[str, Tensor]], fields: Mapping[str, Field]) -> TextEmbeds:
    """Stack samples, padding the token axis with the field's ``pad``; fields that share a mask get one length."""
    tensors = {}
    for name, field in fields.items():
        values = [row[name] for row in rows]
        if "L" in field.shape:
            length = _joint_length(name, rows, fields)
            values = [_padded(value, length, _token_axis(field), field.pad) for value in values]
        tensors[name] = torch.stack(values).to(DTYPES[field.dtype])
    return TextEmbeds(tensors=tensors)


def _encoders(
    config: RunConfig,
    facts: ModelFacts,
    components: Sequence[str],
    fields: Mapping[str, Field],
    identities: Mapping[str, str],
) -> dict[str, Any]:
    precision, rule = config.precision.text_encoder, facts.dtypes.text
    return {
        "family": facts.family,
        "components": {
            name: [identities.get(name, ""), precision.get(name) or rule, *_quantized(config, name)]
            for name in components
        },
        "fields": {name: [list(field.shape), field.dtype, field.trim] for name, field in fields.items()},
        "max_tokens": dict(facts.max_tokens),
        "options": config.text_encoder.model_dump(mode="json", exclude={"max_tokens", "dropout", "device"}),
    }


def _quantized(config: RunConfig, name: str) -> list[Any]:
    """What is stored in few bits; nothing for a component as loaded, whose entries stay valid."""
    method = config.quantize.text_encoder.get(name)
    return [] if method is None else [method, sorted(config.quantize.exclude)]


def _mask_of(name: str, fields: Mapping[str, Field]) -> str | None:
    """The mask that trims a field; a mask that trims others trims itself too."""
    if fields[name].trim is not None:
        return fields[name].trim
    return name if any(field.trim == name for field in fields.values()) else None


def _joint_length(name: str, rows: Sequence[Mapping[str, Tensor]], fields: Mapping[str, Field]) -> int:
    mask = _mask_of(name, fields)
    family = [name] if mask is None else [each for each in fields if _mask_of(each, fields) == mask]
    floors = [fields[each].floor or 0 for each in family]
    # Never none at all: attention over a text of no tokens is nothing that a model need be able to do.
    return max(1, *floors, *(row[each].shape[_token_axis(fields[each])] for row in rows for each in family))


def _token_axis(field: Field) -> int:
    return field.shape.index("L")


def _padded(value: Tensor, length: int, axis: int, pad: float) -> Tensor:
    missing = length - value.shape[axis]
    if missing == 0:
        return value
    shape = list(value.shape)
    shape[axis] = missing
    return torch.cat([value, torch.full(shape, pad, dtype=value.dtype)], dim=axis)
