"""Opening the caches of a run and filling them: text first, then images, so that only one encoder is in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from tuner.core.data.cache import open_store
from tuner.core.data.encode import LatentCache, LatentFacade
from tuner.core.data.keys import component_identities
from tuner.core.data.loader import BatchLoader
from tuner.core.data.text_cache import Progress, TextCache, TextFacade, cached_fields, planned_texts

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.data.plan import DataPlan
    from tuner.core.types import ModelFacts, Models


class Facade(LatentFacade, TextFacade, Protocol):
    """What is needed of ``ModelFacade``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataCaches:
    """The caches of a run. text is None when nothing of the text side is cached; texts is what it has to hold."""

    plan: DataPlan
    config: RunConfig
    latents: LatentCache
    text: TextCache | None
    texts: tuple[str, ...]

    def missing(self) -> tuple[int, int]:
        """(captions, images) that have to be encoded before the first step."""
        return len(self.text.missing(self.texts)) if self.text else 0, len(self.latents.missing())

    def keys(self) -> set[str]:
        """Names of all entries that this run reads: what pruning has to keep."""
        names = {self.text.key(text).name for text in self.texts} if self.text else set()
        for entry in self.latents.entries():
            names.add(entry.latents.name)
            if entry.mask is not None:
                names.add(entry.mask.name)
        return names

    def fill_latents(self, on_progress: Progress | None = None) -> int:
        """Encode the missing images; returns how many."""
        return self.latents.fill(on_progress)

    def loader(self, seed: int | None = None) -> BatchLoader:
        return BatchLoader(self.plan, self.config, latents=self.latents, text=self.text, seed=seed)


def open_caches(
    plan: DataPlan,
    config: RunConfig,
    facts: ModelFacts,
    facade: Facade,
    *,
    load: Callable[[Collection[str]], Models],
    device: str = "cpu",
    text_wrappers: Sequence[str] = (),
    latent_wrappers: Sequence[str] = (),
    merged: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> DataCaches:
    """The caches that the configuration asks for; nothing is encoded yet.

    load: loads the named components onto ``device``; called only when something has to be encoded. text_wrappers,
    latent_wrappers: names and versions of the extensions that may change encodings, part of the keys. merged: component
    to what was merged into its weights, part of the keys too. Raises UsageError when captions or images change too much
    to be cached.
    """
    root = Path(config.cache.dir)
    text_store, latent_store = open_store(config.cache.text, root), open_store(config.cache.latents, root)
    fields = cached_fields(config, facts) if text_store is not None else {}
    encoders = {component for field in fields.values() for component in field.of}
    # Entries that live in memory only cannot be stale, so the weight files need no hashing for them.
    kept = [*(encoders if config.cache.text == "disk" else ()), *(["vae"] if config.cache.latents == "disk" else ())]
    identities = encoder_identities(
        facts, kept, root, text_wrappers=text_wrappers, latent_wrappers=latent_wrappers, merged=merged
    )
    latents = LatentCache(
        plan, config, facts,
        store=latent_store, facade=facade, models=lambda: load(("vae",)), identity=identities.get("vae", ""),
        device=device,
    )  # fmt: skip
    if not fields or text_store is None:
        return DataCaches(plan=plan, config=config, latents=latents, text=None, texts=())
    components = tuple(name for name in facts.components if name in encoders)
    text = TextCache(
        config, facts, store=text_store, facade=facade, models=lambda: load(components), identities=identities
    )
    texts = tuple(planned_texts(plan, config))
    return DataCaches(plan=plan, config=config, latents=latents, text=text, texts=texts)


def encoder_identities(
    facts: ModelFacts,
    components: Collection[str],
    root: Path,
    *,
    text_wrappers: Sequence[str] = (),
    latent_wrappers: Sequence[str] = (),
    merged: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> dict[str, str]:
    """Component to everything but settings that changes what it encodes; see `open_caches`."""
    return {
        name: " + ".join((digest, *(latent_wrappers if name == "vae" else text_wrappers), *merged.get(name, ())))
        for name, digest in component_identities(facts, components, root).items()
    }
