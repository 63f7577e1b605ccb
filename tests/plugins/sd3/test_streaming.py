"""Streamed blocks of the transformer whose weights train, among them two attentions and a last block of its own."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.fixtures.tiny_sd3 import POOLED, TEXT, denoiser_shapes
from tuner.core.memory.checkpointing import apply_checkpointing
from tuner.core.memory.streaming import stream_blocks
from tuner.core.types import Blocks, Placement
from tuner.plugins.sd3.load import load_denoiser
from tuner.plugins.sd3.sources import Part, Sources

BLOCKS = 5


@pytest.fixture
def denoiser(tmp_path):
    """A fresh copy of the same random transformer with each call."""
    generator = torch.Generator().manual_seed(0)
    shapes = denoiser_shapes(qk_norm=True, dual=(0, 2), blocks=BLOCKS)
    tensors = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(
        {f"model.diffusion_model.{name}": value for name, value in tensors.items()}, tmp_path / "model.safetensors"
    )
    part = Part(path=tmp_path / "model.safetensors")
    return lambda: load_denoiser(Sources(denoiser=part, encoders={}, vae=part, tokenizers={}), Placement())


def trained(model: nn.Module) -> list[Tensor]:
    """Losses of three steps and a look without gradients, then the weights."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    seen = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        inputs = [torch.randn(shape, generator=generator) for shape in ((1, 16, 8, 8), (1, 5, TEXT), (1, POOLED))]
        optimizer.zero_grad()
        loss = model(*inputs, torch.tensor([500.0])).square().mean()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            seen += [loss.detach(), model(*inputs, torch.tensor([100.0]))]
    return [*seen, *(each.detach() for each in parameters)]


@pytest.mark.parametrize("level", ["off", "block"])
def test_they_train_to_the_same_bits(denoiser, level):
    results = []
    for stream in (False, True):
        model = denoiser().requires_grad_(True)
        if stream:
            stream_blocks(model, [Blocks(path="transformer_blocks", count=BLOCKS)], 3, torch.device("cpu"))
        apply_checkpointing(model.transformer_blocks, level)
        results.append(trained(model))
    assert all(map(torch.equal, *results)) and len(results[0]) == len(results[1])
    assert not results[0][0].isnan()
