"""Encoded prompts of `tuner sample`: the encoders are loaded, used, and gone before the denoiser comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tuner.core.adapters.merging import Addition
from tuner.core.data.cache import CacheKey, CacheStore, MemoryStore
from tuner.core.data.prepare import encoder_identities
from tuner.core.data.text_cache import TextCache
from tuner.core.data.texts import cached_fields, live_components
from tuner.core.track.progress import Progress
from tuner.core.train.merging import merged_identities
from tuner.core.train.mounting import mount
from tuner.core.train.quantizing import load_components
from tuner.core.types import Models, TextEmbeds

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.registry import Run
    from tuner.core.types import ModelFacts

Strengths = tuple[float, ...]
"""One for each adapter that changes an encoder."""
Key = tuple[Strengths, str]
"""What an encoding depends on: strengths and text."""


Stage = Callable[[str, int, str], Progress]
"""(name, how many, of what) -> progress that is shown while it is entered."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Texts that are encoded in the same way. cache: of the fields that are the base model's own; live: components that
    make the others."""

    keys: Sequence[Key]
    cache: TextCache | None
    live: tuple[str, ...]

    @property
    def texts(self) -> list[str]:
        return list(dict.fromkeys(text for _, text in self.keys))

    @property
    def missing(self) -> int:
        """How many encodings are to be made."""
        return (len(self.cache.missing(self.texts)) if self.cache else 0) + (len(self.keys) if self.live else 0)


class EncodedTexts:
    """Texts of pictures under every strength of the adapters that change encoders, as a run would encode them.

    What a run caches is rounded as in its cache and is read from there if it is there; no entry is written. Every text
    is encoded alone, so that a picture does not depend on those beside it. prepare: comes between loading and
    quantization. ``loaded``: whether an encoder had to be loaded.
    """

    def __init__(
        self,
        run: Run,
        additions: Sequence[Addition],
        device: torch.device,
        prepare: Callable[[Models], None] | None = None,
    ) -> None:
        self.run, self.device, self.prepare = run, device, prepare
        self.encoding = {name for field in run.facts.text_fields.values() for name in field.of}
        self.numbers = [number for number, each in enumerate(additions) if self.encoding & set(each.components)]
        self.additions = [additions[number] for number in self.numbers]
        self.loaded = False
        self._kept: dict[Key, TextEmbeds] = {}

    def strengths(self, every: Sequence[float]) -> Strengths:
        """Those of the strengths of all adapters that encodings depend on."""
        return tuple(every[number] for number in self.numbers)

    def encode(self, wanted: Iterable[Key], stage: Stage) -> None:
        """Encode everything that pictures will ask for."""
        groups: dict[frozenset[str], list[Key]] = {}
        for key in dict.fromkeys(wanted):
            groups.setdefault(self._touched(key[0]), []).append(key)
        found = [self._group(touched, keys) for touched, keys in groups.items()]
        missing = sum(group.missing for group in found)
        with stage("encoding", missing, "texts") if missing else nullcontext() as progress:
            for group in found:
                self._encode(group, (lambda: None) if progress is None else progress.advance)

    def embeds(self, strengths: Strengths, text: str) -> TextEmbeds:
        """The fields [1, ...] of one text on the device."""
        tensors = self._kept[strengths, text].tensors
        return TextEmbeds(tensors={name: value.to(self.device) for name, value in tensors.items()})

    def _touched(self, strengths: Strengths) -> frozenset[str]:
        """The encoders that adapters change at these strengths; at 0 the texts are those of the base model."""
        acting = [each for each, strength in zip(self.additions, strengths, strict=True) if strength]
        return frozenset(name for each in acting for name in each.components) & self.encoding

    def _group(self, touched: Iterable[str], keys: Sequence[Key]) -> _Group:
        config = _as_if_trained(self.run.config, touched)
        return _Group(keys, self._cache(config), live_components(config, self.run.facts))

    def _cache(self, config: RunConfig) -> TextCache | None:
        """Of the fields that no adapter changes."""
        facts = self.run.facts
        fields = cached_fields(config, facts)
        if config.cache.text == "off" or not fields:
            return None
        root = Path(config.cache.dir)
        used = {name for field in fields.values() for name in field.of}
        # Without hashes from a run there are no entries either, and large files would be read for nothing.
        stored = config.cache.text == "disk" and (root / "identities.json").is_file()
        return TextCache(
            config,
            facts,
            store=_ReadOnly(CacheStore(root)) if stored else MemoryStore(),
            facade=self.run.model,
            models=lambda: self._load([name for name in facts.components if name in used]),
            identities=encoder_identities(
                facts,
                used,
                root,
                text_wrappers=self.run.extensions.wrapping("encode_text"),
                merged=merged_identities(self.run),
            )
            if stored
            else {},
        )

    def _load(self, components: Sequence[str]) -> Models:
        self.loaded = True
        return load_components(self.run, components, self.device, self.prepare)

    def _encode(self, group: _Group, advance: Callable[[], None]) -> None:
        if group.cache is not None:
            group.cache.fill(group.texts, lambda _done, _total: advance())
        live = self._encode_live(group, advance) if group.live else {}
        for key in group.keys:
            cached = {} if group.cache is None else group.cache.collate([key[1]]).tensors
            self._kept[key] = TextEmbeds(tensors={**cached, **live.get(key, {})})

    @torch.no_grad()
    def _encode_live(self, group: _Group, advance: Callable[[], None]) -> dict[Key, dict[str, Tensor]]:
        """Fields that training runs encode in every step, and those that adapters change."""
        run = self.run
        models = self._load(group.live)
        stack = mount(self.additions, models, run.config, run.facts)
        stack.attach()
        found = {}
        for strengths, text in group.keys:
            stack.set_strengths(strengths)
            embeds = run.model.encode_text(models, [text], group.live)
            found[strengths, text] = {name: value.cpu() for name, value in embeds.tensors.items()}
            advance()
        return found


def _as_if_trained(config: RunConfig, components: Iterable[str]) -> RunConfig:
    """What adapters change is no more cached than what trains; and texts are encoded one by one."""
    every = tuple(dict.fromkeys((*config.train.components, *components)))
    return config.model_copy(
        update={
            "train": config.train.model_copy(update={"components": every}),
            "cache": config.cache.model_copy(update={"text_batch_size": 1}),
        }
    )


class _ReadOnly:
    """Entries of a run's cache; new ones are kept in memory alone."""

    def __init__(self, below: CacheStore) -> None:
        self.below, self.own = below, MemoryStore()

    def has(self, key: CacheKey) -> bool:
        return self.own.has(key) or self.below.has(key)

    def get(self, key: CacheKey) -> dict[str, Tensor] | None:
        found = self.own.get(key)
        return self.below.get(key) if found is None else found

    def put(self, key: CacheKey, tensors: Mapping[str, Tensor]) -> None:
        self.own.put(key, tensors)


def beside_denoiser(facts: ModelFacts) -> list[str]:
    """What has to be loaded for predictions: the denoiser, and text components whose output no field holds."""
    encoding = {name for field in facts.text_fields.values() for name in field.of}
    needed = {"denoiser", *facts.step_components, *(name for name in facts.text_components if name not in encoding)}
    return [name for name in facts.components if name in needed]
