"""The encoding stages of a run: text encoders in and out, then the image autoencoder in and out, then neither."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from tuner.core.data.cache import MemoryStore, Store, open_store
from tuner.core.data.encode import LatentCache
from tuner.core.data.keys import component_identities
from tuner.core.data.text_cache import TextCache, planned_texts
from tuner.core.track.progress import Progress
from tuner.core.train.placement import placement_for
from tuner.core.train.prompts import Prompt, resolve_prompts, texts_of
from tuner.core.types import Models, TextEmbeds

if TYPE_CHECKING:
    from tuner.core.data.plan import DataPlan
    from tuner.core.registry import Run
    from tuner.core.track.events import EventLog


class Caches:
    """Encoded texts and latents of a run, and the frozen models that make them.

    A context: what is still loaded is released at its end. ``live_text`` are the text components that every step runs,
    because they train or because ``cache.text`` is off.
    """

    def __init__(self, run: Run, plan: DataPlan, device: torch.device, events: EventLog | None) -> None:
        self.run, self.plan, self.device, self.events = run, plan, device, events
        config, facts = run.config, run.facts
        self.root = Path(config.cache.dir)
        self.prompts: list[Prompt] = resolve_prompts(config.sample, facts) if config.sample.enabled else []
        self._loaded: dict[tuple[str, ...], Models] = {}
        text_store = open_store(config.cache.text, self.root)
        self.text = None if text_store is None else self._text_cache(text_store)
        self.latents = self._latent_cache()
        cached = set(self.text.fields) if self.text is not None else set()
        self.live_text = tuple(
            name
            for name in facts.components
            if any(name in field.of for field_name, field in facts.text_fields.items() if field_name not in cached)
        )

    def fill(self) -> None:
        """Encode what is missing, text first; afterwards no encoder is in memory."""
        if self.text is not None:
            texts = [*planned_texts(self.plan, self.run.config), *texts_of(self.prompts)]
            self._stage("captions", "texts", len(self.text.missing(texts)), lambda tick: self.text_fill(texts, tick))
        if self.run.config.cache.latents != "off":
            self._stage("latents", "images", len(self.latents.missing()), self.latents.fill)

    def text_fill(self, texts: Sequence[str], tick: Callable[[int, int], None]) -> int:
        assert self.text is not None
        return self.text.fill(texts, tick)

    def cached_text(self, texts: Sequence[str]) -> TextEmbeds:
        """The cached fields [B, ...] of texts on the run's device; fields of live components are not among them."""
        if self.text is None:
            return TextEmbeds(tensors={})
        embeds = self.text.collate(texts)
        return TextEmbeds(tensors={name: tensor.to(self.device) for name, tensor in embeds.tensors.items()})

    def load(self, components: Collection[str]) -> Models:
        """Load frozen components on the run's device; asked twice, the same modules come back until ``release``."""
        names = tuple(components)
        if names not in self._loaded:
            placement = placement_for(self.run.config, self.run.facts, names, self.device)
            self._loaded[names] = self.run.model.load_models(names, placement)
        return self._loaded[names]

    def load_fresh(self, components: Collection[str]) -> Models:
        """Load components that the caller keeps or releases by itself."""
        placement = placement_for(self.run.config, self.run.facts, components, self.device)
        return self.run.model.load_models(tuple(components), placement)

    def release(self) -> None:
        """Drop every encoder and give its memory back."""
        self._loaded.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def __enter__(self) -> Caches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _stage(self, name: str, unit: str, missing: int, fill: Callable[[Callable[[int, int], None]], int]) -> None:
        if self.events is not None:
            self.events.emit("stage", name=name, state="start", items=missing)
        started = time.monotonic()
        if missing:
            with Progress(f"caching {name}", missing, unit, plain=self.run.config.log.plain) as progress:
                done = 0

                def tick(now: int, total: int) -> None:
                    nonlocal done
                    progress.advance(now - done)
                    done = now

                fill(tick)
        self.release()
        if self.events is not None:
            seconds = time.monotonic() - started
            self.events.emit("stage", name=name, state="end", items=missing, seconds=seconds)

    def _text_cache(self, store: Store) -> TextCache:
        config, facts = self.run.config, self.run.facts
        training = set(config.train.components)
        fields = [field for field in facts.text_fields.values() if not training & set(field.of)]
        used = [name for name in facts.components if any(name in field.of for field in fields)]
        return TextCache(
            config,
            facts,
            store=store,
            facade=self.run.model,
            models=lambda: self.load(used),
            identities=self._identities(used, store),
        )

    def _latent_cache(self) -> LatentCache:
        config, facts = self.run.config, self.run.facts
        store = open_store(config.cache.latents, self.root)
        identity = self._identities(["vae"], store)["vae"]
        return LatentCache(
            self.plan,
            config,
            facts,
            store=store,
            facade=self.run.model,
            models=lambda: self.load(["vae"]),
            identity=identity,
            device=str(self.device),
        )

    def _identities(self, components: Sequence[str], store: Store | None) -> dict[str, str]:
        # Entries in memory die with the process, so nothing has to tell them from those of other weights.
        if store is None or isinstance(store, MemoryStore):
            return dict.fromkeys(components, "this process")
        return component_identities(self.run.facts, components, self.root)
