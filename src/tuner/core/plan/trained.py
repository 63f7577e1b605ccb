"""How many values train: of an adapter of any kind, or of whole components."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tuner.core.adapters.divisors import block_size_of, butterfly_sizes, has_low_rank, two_factors
from tuner.core.adapters.freezing import freeze_patterns, group_name, group_of
from tuner.core.adapters.targets import select_targets
from tuner.core.costs import CostRules, Layer
from tuner.core.optim.groups import own_rate
from tuner.core.types import ParamGroup

if TYPE_CHECKING:
    from tuner.core.adapters.targets import Options, Target
    from tuner.core.config import RunConfig
    from tuner.core.types import ModelFacts

FULL = "full"
"""The value of ``train.mode`` that trains the model's own weights."""


def component_layers(costs: CostRules, component: str) -> Mapping[str, Layer]:
    """The linears of a component by path."""
    if component == "denoiser":
        return costs.layers()
    return costs.parts[component].layers


def component_values(costs: CostRules, component: str) -> int:
    """All values of a component."""
    return costs.parameters if component == "denoiser" else costs.parts[component].parameters


def trained_values(config: RunConfig, facts: ModelFacts, costs: CostRules) -> int:
    """Values that the optimizer moves. UsageError for patterns that match nothing."""
    if str(config.train.mode) == FULL:
        return whole_values(config, costs) - _frozen_values(config, facts, costs)
    layers = {name: component_layers(costs, name) for name in config.train.components}
    network = config.network
    if network.rank == "from_file":
        # The file tells the ranks; the plan takes the default one.
        network = network.model_copy(update={"rank": 16, "init_from": None})
    targets = select_targets({name: tuple(found) for name, found in layers.items()}, network, facts)
    return sum(adapter_values(target, layers[target.component]) for target in targets)


def whole_values(config: RunConfig, costs: CostRules) -> int:
    """All values of the components that train, frozen ones too: what a file of whole weights holds."""
    return sum(component_values(costs, name) for name in config.train.components)


def _frozen_values(config: RunConfig, facts: ModelFacts, costs: CostRules) -> int:
    """Values of the matrices that ``train.freeze`` or a rate of 0 keeps as they are; small parameters count as trained,
    because costs do not know their names."""
    patterns = freeze_patterns(config.train.freeze)
    total = 0
    for component in config.train.components:
        for path, layer in component_layers(costs, component).items():
            name = f"{component}:{path}.weight"
            label = group_name(component, group_of(facts, name))
            group = ParamGroup(name=label, component=component, params={})
            if any(re.fullmatch(each, name) for each in patterns) or own_rate(config.optimizer, group, name) == 0:
                total += layer.size
    return total


def streamed_count(config: RunConfig) -> int:
    """Blocks in host memory whose own weights train."""
    whole = str(config.train.mode) == FULL and "denoiser" in config.train.components
    return config.memory.swap_blocks if whole else 0


def adapter_values(target: Target, layers: Mapping[str, Layer]) -> int:
    """Values of the adapter on one target."""
    own = [layers[path] for path in target.paths]
    rows, columns = sum(layer.rows for layer in own), own[0].columns
    return values_of(target.kind, rows, columns, target.rank, target.options)


def values_of(kind: str, rows: int, columns: int, rank: int, options: Options) -> int:
    """Values of an adapter of a kind on a matrix [rows, columns]."""
    low = rank * (rows + columns)
    if kind == "dora":
        return low + rows
    if kind == "loha":
        return 2 * low
    if kind == "lokr":
        return _lokr(rows, columns, rank, options)
    if kind in ("oft", "boft"):
        stages, _, size = butterfly_sizes(rows, options.block_size) if kind == "boft" else (1, 0, _block(rows, options))
        return stages * rows * size
    if kind == "ia3":
        return columns if options.on_input else rows
    if kind == FULL:
        return rows * columns
    return low


def _block(rows: int, options: Options) -> int:
    if options.block_count is not None:
        return rows // options.block_count
    return block_size_of(rows, options.block_size)


def _lokr(rows: int, columns: int, rank: int, options: Options) -> int:
    """A small matrix times, as a Kronecker product, a large one; either may be two matrices of low rank."""
    (small_rows, large_rows), (small_columns, large_columns) = (
        two_factors(size, options.factor) for size in (rows, columns)
    )
    total = 0
    for height, width, split in (
        (small_rows, small_columns, options.decompose_both),
        (large_rows, large_columns, True),
    ):
        low = split and not options.full_matrix and has_low_rank(height, width, rank)
        total += rank * (height + width) if low else height * width
    return total
