"""Encoded images: what is missing in the cache, encoding it, and reading it back.

Decoding and resizing run in worker processes, the autoencoder in the calling process, in batches of one size. Each
entry is written as soon as it is encoded, so a killed run goes on where it stopped.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tuner.core.data.cache import CacheKey, Store
from tuner.core.data.decode import DecodeJob, decode, decode_all
from tuner.core.data.images import BACKGROUND
from tuner.core.data.keys import latent_key, mask_key
from tuner.core.data.looks import Look, check_cacheable, fit_of, fixed_looks
from tuner.core.data.text_cache import DTYPES, Progress
from tuner.core.errors import UsageError
from tuner.core.rng import Rng

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.data.plan import DataPlan, PlanItem
    from tuner.core.types import ModelFacts, Models

logger = logging.getLogger(__name__)


class LatentFacade(Protocol):
    """What is needed of ``ModelFacade``."""

    def encode_latents(self, models: Models, pixels: Tensor, rng: Rng | None) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One look of an item, and what it is stored under. The mask's key is None for an image without one."""

    item: PlanItem
    look: Look
    latents: CacheKey
    mask: CacheKey | None


class LatentCache:
    """Latents and reduced masks of the planned items.

    ``models`` loads the autoencoder; it is called when something is missing, or at once when nothing is cached
    (``store`` None), in which case every look is encoded when it is asked for.
    """

    def __init__(
        self,
        plan: DataPlan,
        config: RunConfig,
        facts: ModelFacts,
        *,
        store: Store | None,
        facade: LatentFacade,
        models: Callable[[], Models],
        identity: str,
        device: str = "cpu",
    ) -> None:
        if store is not None:
            check_cacheable(plan)
        self.plan, self.store, self.facade, self.models, self.device = plan, store, facade, models, device
        self.factor = facts.spatial_factor
        self.dtype = config.cache.dtype
        self.batch_size = config.cache.vae_batch_size
        self.workers = config.data.workers.cache
        self.samples = (config.latents.posterior or facts.posterior) == "sample"
        self.vae: dict[str, Any] = {
            "family": facts.family,
            "identity": identity,
            "dtype": config.precision.vae or facts.dtypes.vae,
            "posterior": "sample" if self.samples else "mode",
        }
        if config.latents.tiling is not None:
            self.vae["tiling"] = config.latents.tiling
        self._loaded: Models | None = None
        self._lock = threading.Lock()

    # --- keys ---------------------------------------------------------------------------------------------------------

    def key(self, item: PlanItem, look: Look) -> CacheKey:
        return latent_key(
            image=item.record.digest, resize=self._resize(item), resized=fit_of(item, look).resized, crop=look.crop,
            size=item.fit.bucket, flip=look.flip, background=self._background(item), vae=self.vae, dtype=self.dtype,
        )  # fmt: skip

    def mask_key(self, item: PlanItem, look: Look) -> CacheKey | None:
        kind = self._mask_kind(item)
        if kind is None:
            return None
        digest = item.record.digest if kind == "alpha" else item.record.mask_digest
        return mask_key(
            mask=f"{kind}:{digest}", resize=self._resize(item), resized=fit_of(item, look).resized, crop=look.crop,
            size=item.fit.bucket, flip=look.flip, factor=self.factor,
        )  # fmt: skip

    # --- filling ------------------------------------------------------------------------------------------------------

    def entries(self) -> Iterator[Entry]:
        """Every entry that the run reads; none without a store."""
        if self.store is not None:
            for item in (*self.plan.items, *self.plan.validation):
                for look in fixed_looks(self.plan, item):
                    yield Entry(item=item, look=look, latents=self.key(item, look), mask=self.mask_key(item, look))

    def missing(self) -> list[Entry]:
        """What has to be encoded, equal sizes together; one stat per entry."""
        found: dict[tuple[str, str | None], Entry] = {}
        for each in self.entries():
            assert self.store is not None
            if not self.store.has(each.latents) or not (each.mask is None or self.store.has(each.mask)):
                found[each.latents.name, each.mask.name if each.mask else None] = each
        return sorted(found.values(), key=lambda each: each.item.fit.bucket)

    def fill(self, on_progress: Progress | None = None, *, rank: int = 0, ranks: int = 1) -> int:
        """Encode what is missing; returns how many. With several ranks each takes the keys that fall to it."""
        absent = [each for each in self.missing() if int(each.latents.name, 16) % ranks == rank]
        if not absent or self.store is None:
            return 0
        models, done = self.models(), 0
        for batch in self._batches(absent):
            pixels = torch.stack([image for _, image, _ in batch])
            latents = self._encode(models, pixels, [each.item for each, _, _ in batch])
            for (each, _, mask), encoded in zip(batch, latents, strict=True):
                if each.mask is not None:
                    self.store.put(each.mask, {"mask": self._reduced(mask, each.item)})
                # Last: an entry of latents tells that its mask is there too.
                self.store.put(each.latents, {"latents": encoded.to(DTYPES[self.dtype])})
            done += len(batch)
            if on_progress is not None:
                on_progress(done, len(absent))
        return done

    # --- reading ------------------------------------------------------------------------------------------------------

    def get(self, item: PlanItem, look: Look) -> tuple[Tensor, Tensor | None]:
        """Latents [C,h,w] float32 and mask [1,h,w] float32 (or None) of one look, on the CPU.

        A missing or broken entry is made again; without a store everything is encoded here.
        """
        if self.store is None:
            return self._make(item, look)
        latents = self.store.get(self.key(item, look))
        name = self.mask_key(item, look)
        mask = self.store.get(name) if name is not None else None
        if latents is None or (name is not None and mask is None):
            encoded, reduced = self._make(item, look)
            if name is not None and reduced is not None:
                self.store.put(name, {"mask": reduced})
                mask = {"mask": reduced}
            latents = {"latents": encoded.to(DTYPES[self.dtype])}
            self.store.put(self.key(item, look), latents)
        return latents["latents"].float(), None if mask is None else mask["mask"]

    # --- inside -------------------------------------------------------------------------------------------------------

    def _make(self, item: PlanItem, look: Look) -> tuple[Tensor, Tensor | None]:
        image, mask = decode(self._job(item, look))
        # One thread at a time: the autoencoder is loaded once and its memory is used once.
        with self._lock:
            if self._loaded is None:
                self._loaded = self.models()
            [latents] = self._encode(self._loaded, image[None], [item])
            if self.store is not None:
                self._loaded = None
        return latents, None if self._mask_kind(item) is None else self._reduced(mask, item)

    @torch.no_grad()
    def _encode(self, models: Models, pixels: Tensor, items: Sequence[PlanItem]) -> Tensor:
        """Latents [B,C,h,w] float32 on the CPU for pixels [B,3,H,W] in -1..1."""
        pixels = pixels.to(self.device)
        if self.samples:
            # One by one: the draw belongs to the image, not to its place in a batch.
            rngs = [Rng(0, "posterior", item.record.digest) for item in items]
            parts = [
                self.facade.encode_latents(models, each[None], rng) for each, rng in zip(pixels, rngs, strict=True)
            ]
            latents = torch.cat(parts)
        else:
            latents = self.facade.encode_latents(models, pixels, None)
        latents = latents.float().cpu()
        for item, each in zip(items, latents, strict=True):
            if not bool(torch.isfinite(each).all()):
                raise UsageError(
                    "the latents of an image are not finite",
                    where=item.record.name,
                    why="the autoencoder overflowed or its weights are damaged",
                    fix='set precision.vae to "fp32", or remove the image',
                )
        return latents

    def _batches(self, absent: Sequence[Entry]) -> Iterator[list[tuple[Entry, Tensor, Tensor | None]]]:
        """Decoded images in batches of one size."""
        batch: list[tuple[Entry, Tensor, Tensor | None]] = []
        jobs = [self._job(each.item, each.look) for each in absent]
        for each, (image, mask) in zip(absent, decode_all(jobs, self.workers), strict=True):
            if batch and (batch[0][0].item.fit.bucket != each.item.fit.bucket or len(batch) == self.batch_size):
                yield batch
                batch = []
            batch.append((each, image, mask))
        if batch:
            yield batch

    def _job(self, item: PlanItem, look: Look) -> DecodeJob:
        return DecodeJob(
            record=item.record, fit=fit_of(item, look), resize=self._resize(item), look=look, mask=self._mask_kind(item)
        )

    def _resize(self, item: PlanItem) -> str:
        return self.plan.tiers[item.tier].config.resize

    def _mask_kind(self, item: PlanItem) -> str | None:
        mask = self.plan.sources[item.source].mask
        if mask is None or (mask == "alpha" and not item.record.alpha):
            return None
        return "alpha" if mask == "alpha" else "file"

    def _background(self, item: PlanItem) -> str:
        return "hidden" if self._mask_kind(item) == "alpha" else BACKGROUND

    def _reduced(self, mask: Tensor | None, item: PlanItem) -> Tensor:
        width, height = item.fit.bucket
        return reduce_mask(mask, (height // self.factor, width // self.factor))


def reduce_mask(mask: Tensor | None, size: tuple[int, int]) -> Tensor:
    """A mask [H,W] in 0..1 by area at latent size (h, w), [1,h,w]; ones for an image without its own."""
    return torch.ones(1, *size) if mask is None else F.interpolate(mask[None, None], size=size, mode="area")[0]
