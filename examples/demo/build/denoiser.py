"""Trains the tiny DiT and its LLM adapter from scratch on cached latents."""

from __future__ import annotations

import copy
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .captions import CaptionTable, draw_captions
from .muon import Pair
from .pictures import Scene

log = logging.getLogger(__name__)

Text = tuple[Tensor, Tensor, Tensor, Tensor]
Predict = Callable[[nn.Module, Tensor, Tensor, Text], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How long and how the base is trained; the run ends at `steps` or after `seconds`, whichever comes first."""

    steps: int
    seconds: float
    batch: int = 64
    matrix_lr: float = 3e-3
    other_lr: float = 3e-3
    ema: float = 0.998
    partial: float = 0.15
    dropout: float = 0.1
    report_every: float = 180.0
    seed: int = 0


def draw_sigmas(count: int) -> Tensor:
    """sigmoid(n); half of them shifted by 3, because the shape is decided where there is much noise."""
    sigmas = torch.sigmoid(torch.randn(count))
    shifted = 3 * sigmas / (1 + 2 * sigmas)
    return torch.where(torch.rand(count) < 0.5, shifted, sigmas)


def train_denoiser(
    net: nn.Module,
    predict: Predict,
    latents: Tensor,
    scenes: list[Scene],
    table: CaptionTable,
    recipe: Recipe,
    report: Callable[[nn.Module, int], None] | None = None,
) -> nn.Module:
    """Train `net` in place; returns its exponential moving average. `report` sees the average now and then."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    average = copy.deepcopy(net).eval()
    optimizer = Pair(net, matrix_lr=recipe.matrix_lr, other_lr=recipe.other_lr)
    start = last_report = time.monotonic()
    step, progress, running = 0, 0.0, 0.0
    while progress < 1.0:
        index = torch.randint(len(latents), (recipe.batch,))
        captions = draw_captions(
            [scenes[i] for i in index.tolist()], rng, partial=recipe.partial, dropout=recipe.dropout
        )
        clean, noise, sigmas = latents[index], torch.randn(recipe.batch, *latents.shape[1:]), draw_sigmas(recipe.batch)
        level = sigmas[:, None, None, None]
        pred = predict(net, torch.lerp(clean, noise, level), sigmas, table.pick(captions))
        loss = F.mse_loss(pred, noise - clean)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step(min(1.0, (step + 1) / 100, (1.0 - progress) / 0.5))
        step += 1
        _follow(average, net, min(recipe.ema, step / (step + 10)))
        now = time.monotonic()
        running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
        progress = max(step / recipe.steps, (now - start) / recipe.seconds)
        if step % 100 == 0:
            log.info("denoiser step %d loss %.4f %.0f s", step, running, now - start)
        if report is not None and (now - last_report > recipe.report_every or progress >= 1.0):
            report(average, step)
            last_report = time.monotonic()
    return average


@torch.no_grad()
def _follow(average: nn.Module, net: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)


@torch.no_grad()
def sample(
    net: nn.Module, predict: Predict, text: Text, empty: Text, *, steps: int, shift: float, cfg: float, seed: int
) -> Tensor:
    """Euler samples with classifier-free guidance: latents [B, 16, 8, 8]."""
    count = len(text[0])
    x = torch.randn(count, 16, 8, 8, generator=torch.Generator().manual_seed(seed))
    sigmas = torch.linspace(1, 0, steps + 1)
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    both = tuple(torch.cat((a, b)) for a, b in zip(text, empty, strict=True))
    for now, after in pairwise(sigmas):
        v, v_empty = predict(net, torch.cat((x, x)), now.expand(2 * count), both).chunk(2)
        x = x + (after - now) * (v_empty + cfg * (v - v_empty))
    return x
