"""A small transformer of two kinds of blocks, adapted like a real one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner.core.adapters.layers import Dropout, DropoutKeys, LoraLayer, inject
from tuner.core.compute.attention import attention
from tuner.core.compute.linear import project, share_storage
from tuner.core.memory.transfers import Slot, Transfers
from tuner.core.rng import Rng
from tuner.core.types import Blocks

WIDTH, HEADS = 64, 4


class Block(nn.Module):
    """Self-attention and MLP; ``shift`` is a linear of the block that the model uses outside of it."""

    def __init__(self, ratio: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=ratio == 2) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, ratio * WIDTH), nn.Linear(ratio * WIDTH, WIDTH)
        self.shift = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("gain", torch.full((WIDTH,), 0.5))
        share_storage([self.q, self.k, self.v])

    def forward(self, x: Tensor, shift: Tensor, *, text: Tensor | None = None) -> Tensor:
        heads = [
            each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in project(self.norm(x), [self.q, self.k, self.v])
        ]
        x = x + self.out(attention(*heads).transpose(1, 2).flatten(2)) * self.gain
        hidden = x + shift[:, None] if text is None else x + shift[:, None] + text.mean(1, keepdim=True)
        return x + self.narrow(F.gelu(self.wide(F.layer_norm(hidden, (WIDTH,)))))


class Model(nn.Module):
    """Two lists of blocks that run as one sequence; shifts of all blocks are made ahead."""

    LISTS = (
        Blocks(path="pairs", count=5, outside=(r"shift\..*",)),
        Blocks(path="singles", count=4, outside=(r"shift\..*",)),
    )

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pairs = nn.ModuleList(Block(4) for _ in range(5))
        self.singles = nn.ModuleList(Block(2) for _ in range(4))
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        share_storage([block.shift for block in self.blocks()])
        self.to(dtype).requires_grad_(False)

    def blocks(self) -> list[Block]:
        return [*self.pairs, *self.singles]  # type: ignore[list-item]

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shifts = project(condition, [block.shift for block in self.blocks()])
        x = self.embed(x)
        for block, shift in zip(self.blocks(), shifts, strict=True):
            x = block(x, shift, text=condition[:, None])
        return self.head(x)

    def adapt(self, names: tuple[str, ...] = ("q", "v", "wide", "narrow")) -> list[nn.Parameter]:
        """Random adapters on some linears of every block; returns their parameters."""
        parameters: list[nn.Parameter] = []
        for number, block in enumerate(self.blocks()):
            for name in names:
                linear, rng = getattr(block, name), Rng(0, number, name)
                layer = LoraLayer(
                    linear, rank=4, alpha=2.0, dropout=Dropout(), keys=DropoutKeys(), dtype=torch.float32, rng=rng
                )
                layer.up.data.copy_(0.2 * rng.child("up").normal(layer.up.shape))
                inject(linear, layer)
                parameters += [layer.down, layer.up]
        return parameters


def batch(step: int, tokens: int = 12, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(2, tokens, WIDTH, generator=generator)
    return x.to(dtype), torch.randn(2, WIDTH, generator=generator).to(dtype)


def train(
    model: Model, parameters: list[nn.Parameter], steps: int, *, between: Callable[[int], Any] | None = None
) -> list[Tensor]:
    """Losses and, at the end, the parameters and last gradients."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    seen: list[Tensor] = []
    dtype = model.embed.weight.dtype
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(*batch(step, dtype=dtype)).float().square().mean()
        loss.backward()
        optimizer.step()
        seen.append(loss.detach())
        if between is not None:
            between(step)
    return [
        *seen,
        *(p.detach().clone() for p in parameters),
        *(p.grad.clone() for p in parameters if p.grad is not None),
    ]


class LateLoads(Transfers):
    """Loads as late as a device may make them: a slot holds rubbish from the request until somebody waits."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.pending: dict[Slot, Tensor] = {}

    def load(self, slot: Slot, host: Tensor) -> None:
        slot.flat.fill_(255)
        self.pending[slot] = host

    def wait(self, slot: Slot) -> None:
        host = self.pending.pop(slot, None)
        if host is not None:
            super().load(slot, host)
