"""One optimizer update: draw noise, predict, compare, go down. The order of the lines is the order of the maths."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tuner.core.adapters.limits import Norms, limit_norms
from tuner.core.adapters.network import adapter_rng
from tuner.core.errors import UsageError
from tuner.core.flow import elementwise_loss, guided_target, loss_weight, reduce_loss, sigmas_from_draws, stratify
from tuner.core.optim import FusedUpdate, Update
from tuner.core.registry.blank import blank_text
from tuner.core.rng import Rng
from tuner.core.train.breakdown import Breakdown, break_down
from tuner.core.train.draws import StepDraws, draw_guidance, draw_noise, perturbed
from tuner.core.train.empty import EmptyCaption
from tuner.core.train.preserve import Preserved, with_preserved
from tuner.core.types import Batch, Models, Network, TextEmbeds

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from tuner.core.config import RunConfig
    from tuner.core.optim import Ema
    from tuner.core.registry.facade import ModelFacade


@dataclass(frozen=True, slots=True)
class StepResult:
    """loss: mean over the samples of the update; grad_norm: before clipping; samples: how many; norms: of the adapter's
    changes, where they are limited; parts: the loss by source and noise level."""

    loss: float
    grad_norm: float
    samples: int
    norms: Norms | None = None
    parts: Breakdown = field(default_factory=Breakdown)


class TrainStep:
    """Calls that share the run's modules; holds no state between updates, so a resumed run needs none of it back."""

    def __init__(
        self,
        *,
        model: ModelFacade,
        models: Models,
        network: Network,
        optimizer: Optimizer,
        config: RunConfig,
        device: torch.device,
        live_text: Collection[str],
        total: int,
        empty: EmptyCaption,
        update: Update | FusedUpdate,
        ema: Ema | None = None,
    ) -> None:
        self.model, self.models, self.network, self.optimizer = model, models, network, optimizer
        self.config, self.device, self.live_text = config, device, tuple(live_text)
        self.total, self.empty, self.ema, self.update = total, empty, ema, update
        self.preserved = Preserved(config.data, network)
        self.parameters = [parameter for group in network.param_groups for parameter in group.params.values()]

    def __call__(self, step: int, batches: Sequence[Batch]) -> StepResult:
        """One update from the micro-batches of ``step`` (1-based).

        The loss is the mean over all their samples, so N micro-batches of one equal one of N. Raises UsageError on a
        loss or gradient that is not finite, before the optimizer has touched a weight.
        """
        self.optimizer.zero_grad(set_to_none=True)
        if isinstance(self.update, FusedUpdate):
            return self._fused(step, batches, self.update)
        samples = sum(len(batch.items) for batch in batches)
        seen: list[tuple[Batch, Tensor, Tensor]] = []
        draws = [StepDraws(self.config.train.seed, step, batch.items) for batch in batches]
        for number, (batch, own, levels) in enumerate(zip(batches, draws, self._levels(draws), strict=True)):
            with adapter_rng(self.network, self.config.train.seed, step, batch.items):
                losses, sigmas = self.losses(batch, own, levels, step, number)
                torch.autograd.backward(losses.sum() / samples)
            seen.append((batch, losses.detach(), sigmas))
        loss = float(torch.cat([losses for _, losses, _ in seen]).sum()) / samples
        if not math.isfinite(loss):
            raise _not_finite(step, seen)
        # Here, where the device has been waited for anyway.
        parts = break_down(seen)
        grad_norm = self._clip()
        if not math.isfinite(grad_norm):
            raise UsageError(
                f"the gradient is not finite at step {step}",
                why="the update was not applied; the last checkpoint is intact",
                fix="lower optimizer.lr, or run once with precision.compute fp32 to see whether precision is the cause",
            )
        self.update(step)
        return StepResult(loss, grad_norm, samples, self._after(step), parts)

    def _after(self, step: int) -> Norms | None:
        """What follows an update of the weights: their limit first, so that the average is of weights within it."""
        limit = self.config.network.max_norm
        norms = None if limit is None else limit_norms(self.network, limit)
        if self.ema is not None:
            self.ema.update(step)
        return norms

    def _fused(self, step: int, batches: Sequence[Batch], update: FusedUpdate) -> StepResult:
        """The same with updates inside the backward pass, so that only the loss can be looked at before them."""
        [batch] = batches
        own = StepDraws(self.config.train.seed, step, batch.items)
        [levels] = self._levels([own])
        with adapter_rng(self.network, self.config.train.seed, step, batch.items):
            losses, sigmas = self.losses(batch, own, levels, step, 0)
            seen = [(batch, losses.detach(), sigmas)]
            loss = float(losses.detach().mean())
            if not math.isfinite(loss):
                raise _not_finite(step, seen)
            parts = break_down(seen)
            with update.during(step):
                torch.autograd.backward(losses.mean())
        grad_norm = float(update.norm())
        if not math.isfinite(grad_norm):
            raise UsageError(
                f"the gradient is not finite at step {step}",
                why="updates were part of the backward pass, so weights have changed; the last checkpoint is intact",
                fix="go on from it with a lower optimizer.lr, or run once with precision.compute fp32",
            )
        return StepResult(loss, grad_norm, len(batch.items), self._after(step), parts)

    def _levels(self, draws: Sequence[StepDraws]) -> list[tuple[Tensor, Tensor]]:
        """(normal, uniform) draws [B] of the noise levels, one pair per micro-batch.

        Stratification covers all samples of the update, so that it does not depend on how they are split.
        """
        pairs = [(each.normal("sigma"), each.uniform("sigma")) for each in draws]
        if not self.config.noise.stratified:
            return pairs
        sizes = [len(normal) for normal, _ in pairs]
        normal, uniform = stratify(torch.cat([one for one, _ in pairs]), torch.cat([other for _, other in pairs]))
        return list(zip(torch.split(normal, sizes), torch.split(uniform, sizes), strict=True))

    def losses(
        self, batch: Batch, draws: StepDraws, levels: tuple[Tensor, Tensor], step: int, number: int
    ) -> tuple[Tensor, Tensor]:
        """Losses [B] with grad and sigmas [B] of micro-batch ``number`` (from 0) of ``step``."""
        config = self.config
        latents = batch.latents.to(self.device, non_blocking=True)
        noise = draw_noise(config.noise, latents, draws)
        height, width = latents.shape[-2:]
        normal, uniform = levels
        sigmas = sigmas_from_draws(config.noise, normal=normal, uniform=uniform, latent_hw=(height, width))
        sigmas = sigmas.to(self.device, non_blocking=True)
        target = self.model.noise_target(latents, noise, sigmas)
        shaken = perturbed(config.noise, noise, draws, step, self.total)
        noisy = target.noisy if shaken is None else self.model.noise_target(latents, shaken, sigmas).noisy
        rng = Rng(config.train.seed, "model", step, number)
        guidance = draw_guidance(config.guidance, draws)
        guidance = None if guidance is None else guidance.to(self.device, non_blocking=True)

        def predict(noisy: Tensor, timesteps: Tensor, text: TextEmbeds) -> Tensor:
            # The doubled batch of batched guidance holds every sample twice.
            given = None if guidance is None else guidance.repeat(len(noisy) // len(guidance))
            return self.model.predict(self.models, noisy, timesteps, text, given, rng=rng)

        def text() -> TextEmbeds:
            return self._dropped(self.text(batch), draws)

        # Before the pass with gradients: no activation of that one is in memory yet.
        preserved = self.preserved.targets(batch.items, predict, noisy, target.timesteps, text)
        prediction, unconditional = self.empty.predict(predict, noisy, target.timesteps, text)
        goal = guided_target(config.guidance, target.target, prediction, unconditional)
        goal = with_preserved(goal, preserved)
        losses = reduce_loss(
            elementwise_loss(config.loss, prediction, goal, sigmas),
            weight=target.weight * loss_weight(config.loss, sigmas),
            mask=None if batch.loss_mask is None else batch.loss_mask.to(self.device, non_blocking=True),
            sample_weight=batch.loss_weight.to(self.device, non_blocking=True),
            loss_cfg=config.loss,
            mask_chance=draws.uniform("mask"),
        )
        return losses, sigmas

    def text(self, batch: Batch) -> TextEmbeds:
        """Cached fields of the batch plus those of the encoders that train, encoded now with grad."""
        tensors = {name: value.to(self.device, non_blocking=True) for name, value in batch.text.tensors.items()}
        if self.live_text:
            captions = [item.caption for item in batch.items]
            tensors.update(self.model.encode_text(self.models, captions, self.live_text).tensors)
        return TextEmbeds(tensors=tensors)

    def _dropped(self, text: TextEmbeds, draws: StepDraws) -> TextEmbeds:
        """With zeros for the encoders that ``text_encoder.dropout`` drops, drawn by sample and encoder."""
        rates = {name: rate for name, rate in self.config.text_encoder.dropout.items() if rate > 0}
        if not rates:
            return text
        kept = {name: draws.uniform(f"text {name}") >= rate for name, rate in rates.items()}
        return TextEmbeds(tensors=blank_text(text.tensors, self.model.facts.text_fields, kept))

    def _clip(self) -> float:
        """Limit the gradients as ``train.clip_grad`` says; returns their norm before that."""
        clip = self.config.train.clip_grad
        total = total_norm([parameter.grad for parameter in self.parameters if parameter.grad is not None])
        if clip is not None and clip.norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, clip.norm, total)
        if clip is not None and clip.value is not None:
            torch.nn.utils.clip_grad_value_(self.parameters, clip.value)
        return float(total)


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Norm of all gradients together, float32 whatever they are: in bfloat16 it, and with it their limit, would be off
    by up to 1/256."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        by_device.setdefault(gradient.device, []).append(gradient)
    norms = [norm for group in by_device.values() for norm in torch._foreach_norm(group, 2, torch.float32)]
    if not norms:
        return torch.zeros(())
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    return total


def _not_finite(step: int, seen: Sequence[tuple[Batch, Tensor, Tensor]]) -> UsageError:
    """The error for a loss that is not a number: which items, at which sigma."""
    bad = [
        f"{item.source}/{item.id} (sigma {sigma:.4f})"
        for batch, losses, sigmas in seen
        for item, loss, sigma in zip(batch.items, losses.tolist(), sigmas.tolist(), strict=True)
        if not math.isfinite(loss)
    ]
    return UsageError(
        f"the loss is not finite at step {step}",
        where=", ".join(bad),
        why="the update was not applied; the last checkpoint is intact",
        fix="look at these images; lower optimizer.lr; or run once with precision.compute fp32 to rule precision out",
    )
