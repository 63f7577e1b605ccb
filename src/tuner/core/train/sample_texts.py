"""Encoded prompts of `tuner sample`: the encoders are loaded, used, and gone before the denoiser comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tuner.core.adapters.merging import Addition
from tuner.core.data.cache import CacheKey, CacheStore, MemoryStore
from tuner.core.data.prepare import encoder_identities
from tuner.core.data.text_cache import TextCache
from tuner.core.data.texts import cached_fields, live_components
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


class EncodedTexts:
    """Texts of pictures under every strength of the adapters that change encoders, as a run would encode them.

    What a run caches is rounded as in its cache and is read from there if it is there; no entry is written. prepare:
    comes between loading and quantization. ``loaded``: whether an encoder had to be loaded.
    """

    def __init__(
        self,
        run: Run,
        additions: Sequence[Addition],
        device: torch.device,
        prepare: Callable[[Models], None] | None = None,
    ) -> None:
        self.run, self.device, self.prepare = run, device, prepare
        encoding = {name for field in run.facts.text_fields.values() for name in field.of}
        touched = {name for each in additions for name in each.components} & encoding
        self.numbers = [number for number, each in enumerate(additions) if touched & set(each.components)]
        self.additions = [additions[number] for number in self.numbers]
        self.config = _as_if_trained(run.config, touched)
        self.live = live_components(self.config, run.facts)
        self.loaded = False
        self._kept: dict[tuple[Strengths, str], TextEmbeds] = {}

    def strengths(self, every: Sequence[float]) -> Strengths:
        """Those of the strengths of all adapters that encodings depend on."""
        return tuple(every[number] for number in self.numbers)

    def encode(self, wanted: Iterable[tuple[Strengths, str]]) -> None:
        """Encode everything that pictures will ask for."""
        asked = list(dict.fromkeys(wanted))
        texts = list(dict.fromkeys(text for _, text in asked))
        cached = self._cached(texts)
        live = self._encode_live(asked) if self.live else {}
        for key in asked:
            tensors = {**cached.get(key[1], {}), **live.get(key, {})}
            self._kept[key] = TextEmbeds(tensors=tensors)

    def embeds(self, strengths: Strengths, text: str) -> TextEmbeds:
        """The fields [1, ...] of one text on the device."""
        tensors = self._kept[strengths, text].tensors
        return TextEmbeds(tensors={name: value.to(self.device) for name, value in tensors.items()})

    def _cached(self, texts: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """Fields that no adapter changes, by text."""
        config, facts = self.config, self.run.facts
        fields = cached_fields(config, facts)
        if config.cache.text == "off" or not fields:
            return {}
        root = Path(config.cache.dir)
        used = {name for field in fields.values() for name in field.of}
        # Without hashes from a run there are no entries either, and large files would be read for nothing.
        stored = config.cache.text == "disk" and (root / "identities.json").is_file()
        cache = TextCache(
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
        cache.fill(texts)
        return {text: cache.collate([text]).tensors for text in texts}

    def _load(self, components: Sequence[str]) -> Models:
        self.loaded = True
        return load_components(self.run, components, self.device, self.prepare)

    @torch.no_grad()
    def _encode_live(self, asked: Sequence[tuple[Strengths, str]]) -> dict[tuple[Strengths, str], dict[str, Tensor]]:
        """Fields that training runs encode in every step, and those that adapters change."""
        run = self.run
        models = self._load(self.live)
        stack = mount(self.additions, models, run.config, run.facts)
        stack.attach()
        found = {}
        for strengths, text in asked:
            stack.set_strengths(strengths)
            embeds = run.model.encode_text(models, [text], self.live)
            found[strengths, text] = {name: value.cpu() for name, value in embeds.tensors.items()}
        return found


def _as_if_trained(config: RunConfig, components: Iterable[str]) -> RunConfig:
    """What adapters change is no more cached than what trains."""
    every = tuple(dict.fromkeys((*config.train.components, *components)))
    return config.model_copy(update={"train": config.train.model_copy(update={"components": every})})


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
