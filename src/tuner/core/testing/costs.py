"""Whether the costs that a plugin declares are those of its modules, which may be on the meta device."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from tuner.core.adapters.layers import is_adaptable

if TYPE_CHECKING:
    from tuner.core.costs import CostRules, Layer
    from tuner.core.types import ModelFacts, Models

LEVELS = ("off", "block", "keep_attention", "selective")


def cost_problems(facts: ModelFacts, models: Models) -> Iterator[str]:
    """A sentence for everything in ``facts.costs`` that is not so; nothing for a plugin that declares none."""
    costs = facts.costs
    if costs is None:
        return
    lists = {(block.path, number) for block in costs.blocks for number in range(block.first, block.first + block.count)}
    if lists != {(each.path, number) for each in facts.block_lists for number in range(each.count)}:
        yield "costs.blocks are not the blocks of block_lists"
    yield from _levels(costs)
    if costs.token % facts.spatial_factor:
        yield f"costs.token {costs.token} is no multiple of spatial_factor {facts.spatial_factor}"
    for name in sorted({*facts.components} - {"denoiser", *costs.parts}):
        yield f"costs.parts lacks {name!r}"
    if models.denoiser is not None:
        yield from _sizes("denoiser", models.denoiser, costs.parameters, costs.layers())
        yield from _missing(facts, "denoiser", models.denoiser, costs.layers())
    for name, part in costs.parts.items():
        module = models.component(name)
        if module is not None:
            yield from _sizes(name, module, part.parameters, part.layers)
            yield from _missing(facts, name, module, part.layers)


def _missing(facts: ModelFacts, name: str, module: nn.Module, layers: Mapping[str, Layer]) -> Iterator[str]:
    """Modules that adapters may touch and that the costs do not name: patterns are checked against the costs."""
    allowed = facts.lora.include.get(name, ())
    for path, own in module.named_modules():
        if is_adaptable(own) and path not in layers and any(re.fullmatch(pattern, path) for pattern in allowed):
            yield f"costs lack {path} of {name}, which adapters may be put beside"


def _levels(costs: CostRules) -> Iterator[str]:
    for block in costs.blocks:
        for level in LEVELS:
            if level not in block.levels:
                yield f"costs of {block.path} lack the level {level!r}"
        kept = [block.levels[level].kept.of(1.0, 1.0) for level in LEVELS if level in block.levels]
        if kept and kept[0] != max(kept):
            yield f"costs of {block.path}: recomputation keeps more than plain execution"


def _sizes(name: str, module: nn.Module, parameters: int, layers: Mapping[str, Layer]) -> Iterator[str]:
    # Tables that files hold are buffers in some modules; a tensor with two names counts once.
    values = {id(value): value.numel() for value in module.state_dict(keep_vars=True).values()}
    found = sum(values.values())
    if found != parameters:
        yield f"costs give {name} {parameters} values, it has {found}"
    for path, layer in layers.items():
        try:
            own = module.get_submodule(path)
        except AttributeError:
            yield f"costs name {path} in {name}, which is not there"
            continue
        weight = getattr(own, "weight", None)
        if not isinstance(weight, Tensor) or weight.numel() != layer.size:
            yield f"costs give {path} in {name} {layer.rows} x {layer.columns} values"
