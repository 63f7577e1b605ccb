"""Does the adapter help on images it never saw? The paired answer, with its uncertainty.

Every held-out image is measured at the same noise and the same sigmas with the adapter and without it. The absolute
loss says nothing about a flow model; the difference per image does. The interval comes from a bootstrap over images,
and the control pairs each image with another image's caption: an adapter that has learned what the captions say must
do worse there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tuner.core.adapters.network import adapter_eval, adapter_strength
from tuner.core.errors import UsageError
from tuner.core.flow import elementwise_loss, loss_weight, reduce_loss
from tuner.core.rng import Rng
from tuner.core.types import Batch, Models, Network, TextEmbeds

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.registry.facade import ModelFacade

RESAMPLES = 2000
CONFIDENCE = 0.95

Batches = Callable[[], Iterator[Batch]]
EncodeText = Callable[[Batch], TextEmbeds]
OnImages = Callable[[int], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class OfSource:
    """The difference for the held-out images of one source, as in `Validation`."""

    source: str
    images: int
    delta: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """Means over the held-out images; ``delta`` is adapted - base, [low, high] its 95 % interval, below 0 is better.

    shuffled_delta: the same difference when the adapted model is given another image's caption; None with one image.
    by_sigma: (sigma, mean delta) pairs. by_source: () unless ``validate.pool`` is off.
    """

    step: int
    images: int
    base: float
    adapted: float
    delta: float
    low: float
    high: float
    shuffled_delta: float | None
    by_sigma: tuple[tuple[float, float], ...]
    by_source: tuple[OfSource, ...] = ()


class Validator:
    """Measures at fixed noise and sigmas; the base model's losses are computed once."""

    def __init__(
        self,
        *,
        model: ModelFacade,
        models: Models,
        network: Network,
        config: RunConfig,
        device: torch.device,
        batches: Batches,
        text: EncodeText,
    ) -> None:
        self.model, self.models, self.network, self.config = model, models, network, config
        self.device, self.batches, self.text = device, batches, text
        settings = config.validation
        self.seed = config.train.seed if settings.seed is None else settings.seed
        self.sigmas = [timestep / 1000 for timestep in settings.timesteps]
        self._base: Tensor | None = None
        self._sources: list[str] = []

    @torch.no_grad()
    def measure_base(self, on_images: OnImages | None = None) -> list[list[float]]:
        """Measure the model as it is now, before it trains, as what later measurements are compared with."""
        with adapter_eval(self.network):
            self._base = self._measure(on_images, shuffled=False)
        losses: list[list[float]] = self._base.tolist()
        return losses

    def use_base(self, losses: list[list[float]] | None) -> None:
        """Go on with what `measure_base` returned in an earlier part of the run."""
        wanted = (sum(len(batch.items) for batch in self.batches()), len(self.sigmas))
        if losses is None or (len(losses), len(losses[0])) != wanted:
            raise UsageError(
                "the base model was measured in another way when this run began",
                where="validate",
                why="its weights have changed since, so it cannot be measured again",
                fix="restore validate.timesteps and validate.max_batches",
            )
        self._base = torch.tensor(losses)

    @torch.no_grad()
    def run(self, step: int, on_images: OnImages | None = None) -> Validation:
        """Measure after ``step`` updates. Draws from its own streams only, so training is not disturbed.

        on_images: called with the number of images of every batch that has been measured once.
        """
        with adapter_eval(self.network):
            if self._base is None:
                with adapter_strength(self.network, 0.0):
                    self._base = self._measure(on_images, shuffled=False)
            adapted = self._measure(on_images, shuffled=False)
            shuffled = self._measure(on_images, shuffled=True) if len(adapted) > 1 else None
        return self._summary(step, self._base, adapted, shuffled)

    def _measure(self, on_images: OnImages | None, *, shuffled: bool) -> Tensor:
        """Losses [images, sigmas] float32 on the CPU."""
        rows: list[Tensor] = []
        sources: list[str] = []
        batches: Iterator[Batch] = self.batches()
        if shuffled:
            batches = _with_other_captions(batches)
        for batch in batches:
            text = self.text(batch)
            rows.append(torch.stack([self._losses(batch, text, sigma) for sigma in self.sigmas], dim=1))
            sources += [item.source for item in batch.items]
            if on_images is not None:
                on_images(len(batch.items))
        self._sources = sources
        return torch.cat(rows)

    def _losses(self, batch: Batch, text: TextEmbeds, sigma: float) -> Tensor:
        latents = batch.latents.to(self.device)
        streams = [Rng(self.seed, "validation", item.source, item.id, f"{sigma:.6f}") for item in batch.items]
        noise = torch.stack([stream.normal(latents.shape[1:]) for stream in streams]).to(self.device)
        sigmas = torch.full((len(batch.items),), sigma, device=self.device)
        target = self.model.noise_target(latents, noise, sigmas)
        # The middle of a range of guidance: every measurement is made the same way.
        embedded = self.config.guidance.embedded
        middle = sum(embedded) / 2 if isinstance(embedded, tuple) else embedded
        guidance = None if middle is None else torch.full_like(sigmas, middle)
        prediction = self.model.predict(self.models, target.noisy, target.timesteps, text, guidance)
        mask = None if batch.loss_mask is None else batch.loss_mask.to(self.device)
        return reduce_loss(
            elementwise_loss(self.config.loss, prediction, target.target, sigmas),
            weight=target.weight * loss_weight(self.config.loss, sigmas),
            mask=mask,
            sample_weight=torch.ones_like(sigmas),
            loss_cfg=self.config.loss,
            mask_chance=torch.zeros_like(sigmas),
        ).cpu()

    def _summary(self, step: int, base: Tensor, adapted: Tensor, shuffled: Tensor | None) -> Validation:
        delta = (adapted - base).double()
        low, high = bootstrap_interval(delta.mean(dim=1), Rng(self.seed, "bootstrap"))
        by_sigma = zip(self.sigmas, delta.mean(dim=0).tolist(), strict=True)
        return Validation(
            step=step,
            images=len(base),
            base=float(base.mean()),
            adapted=float(adapted.mean()),
            delta=float(delta.mean()),
            low=low,
            high=high,
            shuffled_delta=None if shuffled is None else float((shuffled - base).double().mean()),
            by_sigma=tuple(by_sigma),
            by_source=() if self.config.validation.pool else tuple(self._of_sources(delta.mean(dim=1))),
        )

    def _of_sources(self, delta: Tensor) -> Iterator[OfSource]:
        """delta: [images], of the images in the order of the batches."""
        for source in dict.fromkeys(self._sources):
            own = delta[torch.tensor([each == source for each in self._sources])]
            low, high = bootstrap_interval(own, Rng(self.seed, "bootstrap", source))
            yield OfSource(source=source, images=len(own), delta=float(own.mean()), low=low, high=high)


def bootstrap_interval(values: Tensor, rng: Rng) -> tuple[float, float]:
    """Percentile interval of the mean of ``values`` [n] from resampling with replacement (Efron 1979)."""
    count = len(values)
    picks = torch.randint(count, (RESAMPLES, count), generator=rng.generator())
    means = values[picks].mean(dim=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=means.dtype)).tolist()
    return low, high


def _with_other_captions(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same images, each with the caption of another: the next in its batch, or of the next batch when it is
    alone.
    """
    first: Batch | None = None
    current: Batch | None = None
    for upcoming in batches:
        if current is None:
            first = upcoming
        else:
            yield _give_captions(current, upcoming)
        current = upcoming
    if current is not None and first is not None:
        yield _give_captions(current, first)


def _give_captions(batch: Batch, following: Batch) -> Batch:
    count = len(batch.items)
    donor, order = (batch, [*range(1, count), 0]) if count > 1 else (following, [0])
    items = tuple(
        replace(item, caption=donor.items[pick].caption) for item, pick in zip(batch.items, order, strict=True)
    )
    text = TextEmbeds(tensors={name: value[order] for name, value in donor.text.tensors.items()})
    return replace(batch, text=text, items=items)
