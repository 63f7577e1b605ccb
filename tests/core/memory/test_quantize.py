"""Which linears of a component are quantized: facts and the user decide by path, and nothing else is touched."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from tuner.core.compute.quantized import QuantizedLinear
from tuner.core.errors import UsageError
from tuner.core.memory.quantize import quantize_component
from tuner.core.types import OUTER_LAYERS


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.proj_out, self.norm = nn.Linear(64, 64), nn.Linear(64, 64), nn.LayerNorm(64)
        self.odd = nn.Linear(12, 64)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x_embedder = nn.Linear(64, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.conv = nn.Conv2d(4, 4, 1)
        self.proj_out = nn.Linear(64, 8)


def make() -> Model:
    torch.manual_seed(0)
    return Model().requires_grad_(False)


def quantized(model: nn.Module) -> set[str]:
    return {path for path, each in model.named_modules() if isinstance(each, QuantizedLinear)}


@pytest.mark.parametrize(
    ("path", "outer"),
    [
        ("x_embedder", True), ("time_text_embed.timestep_embedder.linear_1", True), ("context_embedder", True),
        ("proj_out", True), ("norm_out.linear", True), ("final_layer.linear", True), ("img_in", True),
        ("time_in.in_layer", True), ("text_projection", True), ("single_blocks.3.proj_out", False),
        ("blocks.0.norm1.linear", False), ("layers.0.mlp.up_proj", False), ("encoder.block.0.wi_0", False),
    ],
)  # fmt: skip
def test_the_default_keeps_what_goes_in_and_out(path: str, outer: bool) -> None:
    assert any(re.fullmatch(pattern, path) for pattern in OUTER_LAYERS) is outer


def test_plain_linears_inside_are_quantized_and_the_rest_keeps_its_values() -> None:
    model, before = make(), make().state_dict()
    told = quantize_component(model, "int8", component="denoiser", no_quantize=OUTER_LAYERS)
    inside = {f"blocks.{block}.{name}" for block in range(2) for name in ("attn", "proj_out", "odd")}
    assert quantized(model) == inside
    assert told.count == len(inside) and set(told.kept) == {"x_embedder", "proj_out"}
    assert told.before == sum(before[f"{path}.weight"].numel() * 4 for path in inside)
    assert 0.25 < told.after / told.before < 0.29
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)


def test_rows_that_cannot_be_grouped_stay_and_are_told() -> None:
    told = quantize_component(make(), "nf4", component="denoiser")
    assert told.kept == ("blocks.0.odd", "blocks.1.odd")


def test_the_user_excludes_more() -> None:
    model = make()
    quantize_component(model, "fp8", component="denoiser", no_quantize=OUTER_LAYERS, exclude=[r"blocks\.0\..*"])
    assert quantized(model) == {"blocks.1.attn", "blocks.1.proj_out", "blocks.1.odd"}


@pytest.mark.parametrize(
    ("exclude", "message"),
    [([r"blocks\.7\..*"], "matches no linear of denoiser"), ([".*"], "no linear of denoiser is left")],
)
def test_patterns_that_leave_no_sense_are_refused(exclude: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        quantize_component(make(), "int8", component="denoiser", exclude=exclude)


def test_a_broken_weight_is_named() -> None:
    model = make()
    model.blocks[1].attn.weight[0, 0] = float("inf")
    with pytest.raises(UsageError, match=re.escape("denoiser.blocks.1.attn")):
        quantize_component(model, "int8", component="denoiser")
