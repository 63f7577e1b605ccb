"""What the benchmarks run: the reduced and the full-size denoiser with low-rank adapters, and one training step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner.core.adapters.layers import Dropout, DropoutKeys, LoraLayer, inject
from tuner.core.rng import Rng
from tuner.plugins.anima.denoiser import Denoiser
from tuner.plugins.anima.sizes import DenoiserSizes

RANK = 16
TEXT_TOKENS = 512

REDUCED = DenoiserSizes(
    width=512, heads=8, head_dim=64, blocks=6, mlp_width=2048, text_width=1024, adaln_rank=64, in_channels=16,
    out_channels=16, rope_ratio=4.0,
)  # fmt: skip
FULL = DenoiserSizes(
    width=2048, heads=16, head_dim=128, blocks=28, mlp_width=8192, text_width=1024, adaln_rank=256, in_channels=16,
    out_channels=16, rope_ratio=4.0,
)  # fmt: skip


def build(sizes: DenoiserSizes, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Denoiser, list[nn.Parameter]]:
    """A frozen random denoiser with adapters on the ten attention and MLP linears of each block."""
    denoiser = build_frozen(sizes, dtype, device, seed)
    return denoiser, add_adapters(denoiser, seed)


def build_frozen(sizes: DenoiserSizes, dtype: torch.dtype, device: str, seed: int = 0) -> Denoiser:
    """A random denoiser of which nothing trains."""
    torch.manual_seed(seed)
    with torch.device(device), _default_dtype(dtype):
        denoiser = Denoiser(sizes).requires_grad_(False)
        for name, parameter in denoiser.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=(0.1 if "adaln" in name else 1.0) * parameter.shape[1] ** -0.5)
    return denoiser


def add_adapters(denoiser: Denoiser, seed: int = 0) -> list[nn.Parameter]:
    """Rank-16 adapters on the ten attention and MLP linears of each block; returns what they train."""
    trained: list[nn.Parameter] = []
    for name, linear in denoiser.blocks.named_modules():
        if isinstance(linear, nn.Linear) and "adaln" not in name:
            layer = LoraLayer(
                linear, rank=RANK, alpha=1.0, dropout=Dropout(), keys=DropoutKeys(), dtype=torch.float32,
                rng=Rng(seed, "benchmark", name),
            )  # fmt: skip
            nn.init.normal_(layer.up, std=0.02)
            inject(linear, layer)
            trained += [layer.down, layer.up]
    return trained


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Modules are built in ``dtype``: casting afterwards is impossible under fake tensors."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Inputs:
    """latents, target [B, 16, h, w] float32; sigmas [B]; context [B, 512, S] in the compute dtype."""

    latents: Tensor
    target: Tensor
    sigmas: Tensor
    context: Tensor


def make_inputs(
    sizes: DenoiserSizes, batch: int, height: int, width: int, dtype: torch.dtype, device: str, seed: int = 1
) -> Inputs:
    """All 512 text rows take part: the peers do not fold the zero rows, so no arm does."""
    torch.manual_seed(seed)
    shape = (batch, sizes.in_channels, height, width)
    return Inputs(
        torch.randn(shape, device=device),
        torch.randn(shape, device=device),
        torch.rand(batch, device=device),
        torch.randn(batch, TEXT_TOKENS, sizes.text_width, device=device).to(dtype),
    )


def forward_loss(denoiser: Denoiser, inputs: Inputs) -> Tensor:
    return F.mse_loss(denoiser(inputs.latents, inputs.sigmas, inputs.context), inputs.target)


def step(denoiser: Denoiser, inputs: Inputs) -> None:
    """Forward, mean squared error and backward; no optimizer."""
    forward_loss(denoiser, inputs).backward()


@contextmanager
def saved_bytes(denoiser: nn.Module) -> Iterator[dict[str, int]]:
    """Counts what autograd keeps while the context is open: unique storages, parameters excluded.

    The result's ``bytes`` is final when the context closes.
    """
    own = {parameter.untyped_storage()._cdata for parameter in denoiser.parameters()}
    adapters = [linear.adapter for linear in denoiser.modules() if hasattr(linear, "adapter")]
    own |= {p.untyped_storage()._cdata for adapter in adapters for p in (adapter.down, adapter.up)}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    result = {"bytes": 0}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield result
    result["bytes"] = sum(storage.nbytes() for storage in kept.values())
