"""Building an adapter from the configuration: choose modules, make layers, inject them, group their parameters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tuner.core.adapters.deltas import kind_of
from tuner.core.adapters.files import read_adapter
from tuner.core.adapters.formats import key_maps, modules_of, parts_of
from tuner.core.adapters.kinds import KINDS, rank_of
from tuner.core.adapters.layers import (
    AdapterLayer,
    Dropout,
    DropoutKeys,
    Injection,
    Making,
    base_device,
    eject,
    inject,
    is_adaptable,
)
from tuner.core.adapters.network import AdapterRow, TrainedNetwork
from tuner.core.adapters.norms import NormLayer, inject_norm, is_norm
from tuner.core.adapters.residual import INITIAL, ResidualLayer, split_weight
from tuner.core.adapters.spelling import module_name
from tuner.core.adapters.targets import Options, Target, join_fused, norm_targets, rate_of, rules_for, select_targets
from tuner.core.compute.dtypes import dtype_by_name
from tuner.core.config.network import LOW_RANK, SPLITTING
from tuner.core.errors import UsageError
from tuner.core.rng import Rng
from tuner.core.types import Network, ParamGroup

if TYPE_CHECKING:
    from tuner.core.config import NetworkConfig, RunConfig
    from tuner.core.types import ModelFacts, Models

log = logging.getLogger(__name__)


class AdapterNetwork(TrainedNetwork):
    """The layers of a network by `component:module path`, in the order of the modules."""

    def __init__(self, targets: Sequence[Target], layers: Sequence[AdapterLayer], keys: DropoutKeys) -> None:
        super().__init__()
        self.targets = tuple(targets)
        self.layers = nn.ModuleList(layers)
        self.dropout_keys = keys
        self.injections: list[Injection] = []

    def items(self) -> Iterator[tuple[Target, AdapterLayer]]:
        for target, layer in zip(self.targets, self.layers, strict=True):
            assert isinstance(layer, AdapterLayer)
            yield target, layer

    def tensors(self) -> dict[str, Tensor]:
        """`component:path.part` of every module; live, except for linears that share an adapter: copies of shares."""
        return self._named(lambda layer: layer.tensors())

    def exported(self) -> dict[str, Tensor]:
        return self._named(lambda layer: layer.exported())

    def _named(self, members: Callable[[AdapterLayer], Sequence[Mapping[str, Tensor]]]) -> dict[str, Tensor]:
        """What ``members`` gives for the modules of each layer, by `component:path.part`."""
        return {
            f"{target.component}:{path}.{part}": value
            for target, layer in self.items()
            for path, parts in zip(target.paths, members(layer), strict=True)
            for part, value in parts.items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        wanted = set(self.tensors())
        for names, what in ((wanted - set(tensors), "lack"), (set(tensors) - wanted, "do not belong:")):
            if names:
                listed = ", ".join(sorted(names)[:3])
                raise UsageError(f"the tensors {what} {listed}", why=f"{len(names)} names differ from this network")
        for target, layer in self.items():
            keys = [f"{target.component}:{path}" for path in target.paths]
            members = [
                {part: tensors[f"{key}.{part}"] for part in own} for key, own in zip(keys, layer.tensors(), strict=True)
            ]
            for key, parts in zip(keys, members, strict=True):
                for part, value in layer.fixed().items():
                    if not torch.equal(parts[part].float().cpu(), value):
                        raise UsageError(f"{key} has {part} {float(parts[part]):g}, this network {float(value):g}")
            layer.load(members, keys)

    def rows(self) -> Iterator[AdapterRow]:
        for target, layer in self.items():
            sizes = sum(parameter.numel() for parameter in layer.parameters() if parameter.requires_grad)
            settings = layer.settings
            yield AdapterRow(
                component=target.component, kind=target.path, modules=1, settings=settings, parameters=sizes
            )

    def set_strength(self, strength: float) -> None:
        super().set_strength(strength)
        for _, layer in self.items():
            layer.set_strength(strength)

    def draw(self, keys: Tensor | None) -> Tensor | None:
        before, self.dropout_keys.samples = self.dropout_keys.samples, keys
        return before

    @property
    def draws(self) -> bool:
        return any(layer.dropout for _, layer in self.items())


def inject_lora(models: Models, config: RunConfig, facts: ModelFacts) -> Network:
    """Add an adapter to the components that train, in place; afterwards only its parameters require grad.

    The layers are on the devices of their modules, in `precision.adapter`. Raises UsageError when a pattern matches
    nothing, when no module is left, and when `network.init_from` does not fit.
    """
    modules = {name: adaptable_modules(_component(models, name)) for name in config.train.components}
    for module in (models.denoiser, *models.text_encoders.values(), *models.others.values()):
        if module is not None:
            module.requires_grad_(False)
    network = config.network
    start = _read_start(network, facts)
    norms = {name: norm_modules(models, name, facts) for name in modules} if network.train_norms else {}
    if network.rank == "from_file":
        targets = _targets_of_file(start, modules, norms, network)
        if network.type in LOW_RANK and not network.split_fused:
            targets = join_fused(targets, facts.lora.fused, lambda first, other: _same_down(start, first, other))
    else:
        targets = select_targets({name: tuple(paths) for name, paths in modules.items()}, network, facts)
        targets += norm_targets({name: tuple(paths) for name, paths in norms.items()}, network, facts)
    if network.init in SPLITTING:
        split_bases(models, config, facts)
    keys = DropoutKeys()
    module = AdapterNetwork(targets, _layers(targets, modules, norms, config, keys, start), keys)
    module.injections = [
        inject_norm(norms[target.component][path], part)
        if isinstance(part, NormLayer)
        else inject(modules[target.component][path], part)
        for target, layer in module.items()
        for path, part in zip(target.paths, layer.parts(), strict=True)
    ]
    if start:
        _fill(module, start, network)
    split = config.optimizer.loraplus is not None
    return Network(module=module, param_groups=param_groups(module, split_up=split), kind=network.type)


def _layers(
    targets: Sequence[Target],
    modules: Mapping[str, Mapping[str, nn.Module]],
    norms: Mapping[str, Mapping[str, nn.Module]],
    config: RunConfig,
    keys: DropoutKeys,
    start: Mapping[str, Tensor],
) -> list[AdapterLayer]:
    """The layers of the targets, not yet attached. With rank "from_file" the file's parts decide their sizes."""
    dropout = _dropout(config.network)
    dtype = dtype_by_name(config.precision.adapter, where="precision.adapter")
    layers = []
    for target in targets:
        found = norms if target.kind == NormLayer.kind else modules
        bases = [found[target.component][path] for path in target.paths]
        making = Making(
            dropout=dropout,
            keys=keys,
            dtype=dtype,
            device=base_device(bases[0]),
            rng=_rng(config, target),
            init=config.network.init,
            init_norm=config.network.init_norm,
        )
        stored = parts_of(start, target.component, target.paths[0]) if config.network.rank == "from_file" else None
        kind = ResidualLayer if _splits(target, config.network) else KINDS[target.kind]
        layers.append(kind.make(bases, target, making, stored))
    return layers


def _rng(config: RunConfig, target: Target) -> Rng:
    """The stream of one layer's start."""
    return Rng(config.train.seed, "lora", target.component, target.path)


def _splits(target: Target, network: NetworkConfig) -> bool:
    return network.init in SPLITTING and target.kind == network.type


def split_bases(
    models: Models,
    config: RunConfig,
    facts: ModelFacts,
    *,
    methods: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
    stored: Mapping[str, Tensor] | None = None,
) -> None:
    """With ``network.init`` of ``pissa``, ``olora`` or ``loftq``: take the start of every layer out of the weights.

    Comes before quantization, which then stores the rest; `inject_lora` does it where nobody has. methods: component to
    how its linears will be quantized, by path. stored: `network_tensors` of a run to go on with.
    """
    modules = {name: adaptable_modules(_component(models, name)) for name in config.train.components}
    targets = select_targets({name: tuple(paths) for name, paths in modules.items()}, config.network, facts)
    dtype = dtype_by_name(config.precision.adapter, where="precision.adapter")
    waiting = [target for target in targets if INITIAL not in modules[target.component][target.paths[0]].__dict__]
    quantized = any(path in methods.get(target.component, {}) for target in waiting for path in target.paths)
    if config.network.init == "loftq" and waiting and not quantized:
        raise UsageError(
            "network.init 'loftq' has no effect",
            where="network.init",
            why="no linear that is adapted is quantized",
            fix="exclude less from quantization, or choose 'pissa'",
        )
    for target in waiting:
        bases = [modules[target.component][path] for path in target.paths]
        ways = {methods.get(target.component, {}).get(path) for path in target.paths}
        split_weight(
            bases,
            target,
            config.network.init,
            dtype=dtype,
            rng=_rng(config, target).child(config.network.init),
            # Members of one adapter that are stored in different ways have no common residual.
            method=ways.pop() if len(ways) == 1 else None,
            stored=None if stored is None else [parts_of(stored, target.component, path) for path in target.paths],
        )


def norm_modules(models: Models, name: str, facts: ModelFacts) -> dict[str, nn.Module]:
    """Module path inside the component ``name`` to every norm with a weight that adapter files have a name for."""
    found = {path: module for path, module in _component(models, name).named_modules() if is_norm(module)}
    maps = key_maps(facts)
    keys = [f"{module_name(fmt, name, path)}{fmt.up}" for fmt in maps.formats if name in fmt.prefixes for path in found]
    known = set(maps.paths(keys).get(name, ()))
    return {path: module for path, module in found.items() if path in known}


def adaptable_modules(component: nn.Module) -> dict[str, nn.Module]:
    """Module path inside the component to every linear and convolution."""
    return {path: module for path, module in component.named_modules() if is_adaptable(module)}


def detach(network: Network) -> None:
    """Take the adapter out of the model, which then computes as before `inject_lora`."""
    module = network.module
    assert isinstance(module, AdapterNetwork)
    for record in reversed(module.injections):
        eject(record)
    module.injections = []


def with_own_alphas(network: Network, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file with the same updates and the alphas of ``network``: formats without alpha have none to keep.

    Modules that the network does not have stay as they are.
    """
    module = network.module
    assert isinstance(module, AdapterNetwork)
    layers = {(target.component, path): layer for target, layer in module.items() for path in target.paths}
    found: dict[str, Tensor] = {}
    for component, path in modules_of(tensors):
        key, layer, parts = f"{component}:{path}", layers.get((component, path)), parts_of(tensors, component, path)
        if layer is not None and kind_of(parts) == layer.kind:
            parts = layer.rescaled(parts, key)
        found |= {f"{key}.{part}": value for part, value in parts.items()}
    return found


def param_groups(module: AdapterNetwork, *, split_up: bool) -> list[ParamGroup]:
    """Groups by component in order; inside it those of the learning-rate rules first, then the rest.

    `split_up` separates down from up matrices, so that the latter can learn faster (LoRA+, Hayou et al. 2024). The
    rates are settled later, where `optimizer.lr_rules` may still change them.
    """
    groups: list[ParamGroup] = []
    for component in dict.fromkeys(target.component for target in module.targets):
        inside = [(target, layer) for target, layer in module.items() if target.component == component]
        rules = dict.fromkeys(target.group for target, _ in inside)
        for rule in sorted(rules, key=lambda name: name is None):
            members = [(target, layer) for target, layer in inside if target.group == rule]
            lr = members[0][0].lr
            name = component if rule is None else f"{component} {rule}"
            down, up = _params(members, faster=False), _params(members, faster=True)
            if split_up and up:
                groups.append(ParamGroup(name=name, component=component, params=down, lr=lr, role="down"))
                groups.append(ParamGroup(name=f"{name} up", component=component, params=up, lr=lr, role="up"))
            else:
                groups.append(ParamGroup(name=name, component=component, params=down | up, lr=lr))
    return groups


def _params(members: Sequence[tuple[Target, AdapterLayer]], *, faster: bool) -> dict[str, nn.Parameter]:
    return {
        f"{target.key}.{part}": value
        for target, layer in members
        for part, value in layer.named_parameters()
        if (part in layer.faster) == faster
    }


def _component(models: Models, name: str) -> nn.Module:
    component = models.component(name)
    if component is None:
        raise UsageError(f"component {name} is not loaded, so it cannot train", where="train.components")
    return component


def _dropout(network: NetworkConfig) -> Dropout:
    for name in ("dropout", "rank_dropout", "module_dropout"):
        if getattr(network, name) >= 1:
            raise UsageError("a dropout of 1 trains nothing", where=f"network.{name}", fix="choose a value below 1")
    return Dropout(element=network.dropout, rank=network.rank_dropout, module=network.module_dropout)


# --- starting from a file ---------------------------------------------------------------------------------------------


def _read_start(network: NetworkConfig, facts: ModelFacts) -> dict[str, Tensor]:
    """The tensors of `network.init_from` by internal name, or nothing."""
    if network.init_from is None:
        if network.rank == "from_file":
            raise UsageError("no file to take the ranks from", where="network.rank", fix="set network.init_from")
        return {}
    return dict(read_adapter(Path(network.init_from), key_maps(facts)).tensors)


def _targets_of_file(
    start: Mapping[str, Tensor],
    modules: Mapping[str, Mapping[str, nn.Module]],
    norms: Mapping[str, Mapping[str, nn.Module]],
    network: NetworkConfig,
) -> tuple[Target, ...]:
    """The file decides modules and all sizes; only learning rates come from the rules."""
    unused = [name for name in ("preset", "targets", "include", "exclude", "blocks", "alpha") if getattr(network, name)]
    if unused or any(rule.rank is not None or rule.alpha is not None for rule in network.rules):
        raise UsageError(
            f"network.{unused[0] if unused else 'rules'} has no effect here",
            where="network.rank",
            why='with "from_file" the file decides modules, ranks and alphas',
            fix="remove it, or set network.rank to a number",
        )
    stored = modules_of(start)
    kinds = {key: kind_of(parts_of(start, *key)) for key in stored}
    _require_kinds(kinds, network)
    _require_training(stored, {name: {**paths, **norms.get(name, {})} for name, paths in modules.items()})
    for component in modules:
        if not any(component == name for name, _ in stored):
            raise UsageError(
                f"component {component} trains, yet the file adapts none of its modules",
                where="network.init_from",
                fix=f"take {component} out of train.components, or set network.rank to a number",
            )
    targets = []
    for component, inside in modules.items():
        for path in (*inside, *norms.get(component, ())):
            if (component, path) in kinds:
                parts = parts_of(start, component, path)
                lr, group = rate_of(rules_for(component, path, network.rules))
                rank, alpha = rank_of(parts) or 0, float(parts.get("alpha", 0.0))
                targets.append(
                    Target(
                        component=component,
                        path=path,
                        rank=rank,
                        alpha=alpha,
                        lr=lr,
                        group=group,
                        kind=kinds[component, path],
                        options=Options(constraint=network.constraint),
                    )
                )
    return tuple(targets)


def _require_kinds(kinds: Mapping[tuple[str, str], str], network: NetworkConfig) -> None:
    """The file must hold the configured kind alone, and norms only where these train."""
    for (component, path), kind in kinds.items():
        if kind == NormLayer.kind and not network.train_norms:
            raise UsageError(
                f"the file has a trained norm, {component}:{path}",
                where="network.init_from",
                fix="set network.train_norms to true",
            )
        if kind not in (network.type, NormLayer.kind):
            raise UsageError(
                f"the file adapts {component}:{path} by {kind}, the configuration by {network.type}",
                where="network.init_from",
                fix=f"set network.type to {kind!r}",
            )


def _require_training(stored: Sequence[tuple[str, str]], modules: Mapping[str, Mapping[str, nn.Module]]) -> None:
    for component, path in stored:
        if component not in modules:
            raise UsageError(
                f"the file adapts {component}, which does not train",
                where="network.init_from",
                fix=f"add {component} to train.components",
            )
        if path not in modules[component]:
            raise UsageError(f"the model has no module {path} in {component}", where="network.init_from")


def _fill(module: AdapterNetwork, start: Mapping[str, Tensor], network: NetworkConfig) -> None:
    """Copy the file's parts in, rescaled where the alphas differ, so that the start acts as the file."""
    stored = set(modules_of(start))
    _require_kinds({key: kind_of(parts_of(start, *key)) for key in stored}, network)
    used: set[tuple[str, str]] = set()
    fresh = 0
    for target, layer in module.items():
        found = [path for path in target.paths if (target.component, path) in stored]
        used |= {(target.component, path) for path in found}
        if not found:
            fresh += 1
            continue
        members = {f"{target.component}:{path}": parts_of(start, target.component, path) for path in found}
        layer.start(members, [f"{target.component}:{path}" for path in target.paths])
    for component, path in stored - used:
        raise UsageError(
            f"the file adapts {component}:{path}, the configuration does not",
            where="network.init_from",
            fix='set network.rank to "from_file", or widen the choice of modules',
        )
    if fresh:
        log.info("%d of %d adapted modules are not in the file and start fresh", fresh, len(module.targets))


def _same_down(start: Mapping[str, Tensor], first: Target, other: Target) -> bool:
    """Whether a file gives two linears the same down matrix, as it does for the members of one adapter."""
    downs = [start[f"{target.component}:{target.path}.down"] for target in (first, other)]
    return torch.equal(*downs)
