"""Memory services on the denoiser itself, at a size where blocks are more than slots and products take real kernels."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.plugins.anima.test_denoiser import SIZES, adapt, random_denoiser
from tuner.core.memory.checkpointing import LEVELS, apply_checkpointing
from tuner.core.memory.offload import open_offload
from tuner.core.memory.streaming import stream_blocks
from tuner.core.types import Blocks
from tuner.plugins.anima.denoiser import Denoiser

CPU = torch.device("cpu")
LARGER = replace(SIZES, width=256, heads=2, head_dim=128, blocks=8, mlp_width=1024, text_width=128, adaln_rank=32)
STEPS = 20


def build(dtype: torch.dtype) -> tuple[Denoiser, list[torch.nn.Parameter], tuple[Blocks, ...]]:
    denoiser = random_denoiser(LARGER)
    denoiser.to(dtype)
    for name, module in denoiser.named_modules():
        if re.fullmatch(r".*adaln_\w+|t_embedder", name):
            module.float()
    parameters = adapt(denoiser.blocks)
    return denoiser, parameters, (Blocks(path="blocks", count=LARGER.blocks, outside=(r"adaln_modulation_.*",)),)


def trained(denoiser: Denoiser, parameters: list[torch.nn.Parameter], steps: int = STEPS) -> list[Tensor]:
    """Losses of all steps, then the parameters and the last gradients. Every second step sees two samples."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        samples, height = 1 + step % 2, 8 + 4 * (step % 3)
        latents = torch.randn(samples, 16, height, 12, generator=generator)
        context = torch.randn(samples, 24, LARGER.text_width, generator=generator)
        optimizer.zero_grad()
        loss = denoiser(latents, torch.rand(samples, generator=generator), context).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    gradients = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    return [*losses, *(parameter.detach().clone() for parameter in parameters), *gradients]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def plain(request: pytest.FixtureRequest) -> tuple[torch.dtype, list[Tensor]]:
    denoiser, parameters, _ = build(request.param)
    return request.param, trained(denoiser, parameters)


@pytest.mark.parametrize(
    ("count", "level", "every"), [(6, "off", 1), (6, "block", 1), (5, "keep_attention", 2), (3, "selective", 1)]
)
def test_twenty_streamed_steps_give_the_same_bits(plain, count: int, level: str, every: int) -> None:
    dtype, expected = plain
    denoiser, parameters, lists = build(dtype)
    stream_blocks(denoiser, lists, count, CPU)
    apply_checkpointing(denoiser.blocks, level, every)
    assert all(map(torch.equal, trained(denoiser, parameters), expected))


@pytest.mark.parametrize("level", [*LEVELS[1:], "offloaded"])
def test_twenty_recomputed_steps_give_the_same_bits(plain, level: str) -> None:
    dtype, expected = plain
    denoiser, parameters, _ = build(dtype)
    offload = open_offload("async", CPU) if level == "offloaded" else None
    apply_checkpointing(denoiser.blocks, "block" if offload else level, offload=offload)
    assert all(map(torch.equal, trained(denoiser, parameters), expected))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at its inputs
@pytest.mark.parametrize("level", ["off", "block"])
def test_streamed_compiled_blocks_share_their_graphs(level: str) -> None:
    denoiser, parameters, lists = build(torch.float32)
    expected = trained(denoiser, parameters, 1)
    denoiser, parameters, lists = build(torch.float32)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for block in denoiser.blocks:
        block.forward = torch.compile(block.forward, backend=counter, fullgraph=True)
    stream_blocks(denoiser, lists, 6, CPU)
    apply_checkpointing(denoiser.blocks, level)
    for one, other in zip(trained(denoiser, parameters, 1), expected, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()
    # The first block's input needs no gradient, the others' does; a slot is no reason for another graph.
    assert counter.frame_count == 2
