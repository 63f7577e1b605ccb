"""The encoding stages of a run: text encoders in and out, then the image autoencoder in and out, then neither."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tuner.core.data.prepare import open_caches
from tuner.core.data.texts import live_components
from tuner.core.track.progress import Progress
from tuner.core.train.device import empty_cache
from tuner.core.train.merging import merged_identities
from tuner.core.train.prompts import Prompt, resolve_prompts, texts_of
from tuner.core.train.quantizing import load_components
from tuner.core.train.starting import starter
from tuner.core.types import Models, TextEmbeds

if TYPE_CHECKING:
    from tuner.core.data.plan import DataPlan
    from tuner.core.registry import Run
    from tuner.core.track.events import EventLog

Tick = Callable[[int, int], None]


class Caches:
    """Encoded texts and latents of a run, and the loading of the frozen models that make them.

    ``live_text`` are the text components that every step runs, because they train or because ``cache.text`` is off.
    """

    def __init__(self, run: Run, plan: DataPlan, device: torch.device, events: EventLog | None) -> None:
        self.run, self.plan, self.device, self.events = run, plan, device, events
        config, facts = run.config, run.facts
        self.prompts: list[Prompt] = resolve_prompts(config.sample, facts) if config.sample.enabled else []
        self.data = open_caches(
            plan,
            config,
            facts,
            run.model,
            load=self.load,
            device=str(device),
            text_wrappers=run.extensions.wrapping("encode_text"),
            latent_wrappers=run.extensions.wrapping("encode_latents"),
            merged=merged_identities(run),
        )
        self.live_text = live_components(config, facts)

    def fill(self) -> None:
        """Encode what is missing, text first; afterwards no encoder is in memory."""
        text = self.data.text
        if text is not None:
            texts = [*self.data.texts, *texts_of(self.prompts)]
            self._stage("captions", "texts", len(text.missing(texts)), lambda tick: text.fill(texts, tick))
        self._stage("latents", "images", len(self.data.latents.missing()), self.data.fill_latents)

    def names(self) -> set[str]:
        """Names of all entries that the run reads, those of its sample prompts included."""
        text = self.data.text
        prompts = set() if text is None else {text.key(each).name for each in texts_of(self.prompts)}
        return self.data.keys() | prompts

    def cached_text(self, texts: Sequence[str]) -> TextEmbeds:
        """The cached fields [B, ...] of texts on the run's device; fields of live components are not among them."""
        if self.data.text is None:
            return TextEmbeds(tensors={})
        embeds = self.data.text.collate(texts)
        return TextEmbeds(tensors={name: tensor.to(self.device) for name, tensor in embeds.tensors.items()})

    def text(self, models: Models, texts: Sequence[str]) -> TextEmbeds:
        """All text fields [B, ...] that a step needs: the cached ones, and those of ``models`` encoded now."""
        return TextEmbeds(tensors={**self.cached_text(texts).tensors, **self.encode_live(models, texts).tensors})

    def encode_live(self, models: Models, texts: Sequence[str]) -> TextEmbeds:
        """The fields of the encoders that run in every step; no field when there is no such encoder."""
        if not self.live_text:
            return TextEmbeds(tensors={})
        return self.run.model.encode_text(models, list(texts), self.live_text)

    def load_for_steps(self, network: Mapping[str, Tensor] | None = None) -> Models:
        """What a step needs: the denoiser, what trains, what the model always needs, and encoders that run live.

        network: tensors of a run to go on with, for starts that change the base model.
        """
        config, facts = self.run.config, self.run.facts
        wanted = {"denoiser", *config.train.components, *facts.step_components, *self.live_text}
        prepare = starter(self.run, network)
        return load_components(self.run, [name for name in facts.components if name in wanted], self.device, prepare)

    def load(self, components: Collection[str]) -> Models:
        """Load frozen components onto the run's device; they live as long as the caller keeps them."""
        return load_components(self.run, components, self.device)

    def _stage(self, name: str, unit: str, missing: int, fill: Callable[[Tick], int]) -> None:
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
            # The encoder went with the call that loaded it; its memory should too.
            gc.collect()
            empty_cache(self.device)
        if self.events is not None:
            seconds = time.monotonic() - started
            self.events.emit("stage", name=name, state="end", items=missing, seconds=seconds)
