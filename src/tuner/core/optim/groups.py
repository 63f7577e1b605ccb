"""From a network's parameter groups to the groups of a torch optimizer."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from tuner.core.errors import UsageError

if TYPE_CHECKING:
    import torch

    from tuner.core.config import OptimizerConfig
    from tuner.core.config.optimizer import LrRule
    from tuner.core.types import ParamGroup


def torch_groups(
    config: OptimizerConfig, groups: Sequence[ParamGroup], text_components: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Groups with ``params``, ``lr``, ``base_lr`` (the rate that a schedule multiplies), ``name`` and ``component``.

    The rate of a parameter: the first of ``lr_rules`` that matches ``component:name``, else the group's own from the
    network's rules, else ``lr_by_component``, else ``lr``; times the LoRA+ ratio for up matrices. A rate of 0 freezes:
    the parameters stop requiring gradients and belong to no group. text_components: components that
    ``loraplus.text_encoder`` speaks of. Raises UsageError for a rule, component or ratio that reaches no parameter.
    """
    _check_reach(config, groups, text_components)
    result: list[dict[str, Any]] = []
    for group in groups:
        by_rate: dict[float, list[torch.nn.Parameter]] = {}
        ratio = _loraplus_ratio(config, group, text_components)
        for name, parameter in group.params.items():
            rate = own_rate(config, group, name) * ratio
            if rate == 0:
                parameter.requires_grad_(False)
            else:
                by_rate.setdefault(rate, []).append(parameter)
        for number, (rate, params) in enumerate(by_rate.items()):
            label = group.name if number == 0 else f"{group.name}#{number + 1}"
            result.append({"params": params, "lr": rate, "base_lr": rate, "name": label, "component": group.component})
    if not result:
        raise UsageError(
            "nothing would train: every learning rate is 0", where="optimizer.lr", fix="give some part a rate above 0"
        )
    return result


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Rate by group name as it acts now; for optimizers that estimate a step size ``d``, rate times d."""
    return {
        str(group.get("name", index)): float(group["lr"]) * float(group.get("d", 1.0))
        for index, group in enumerate(optimizer.param_groups)
    }


def full_name(component: str, name: str) -> str:
    """``component:name``, the spelling that rules match and error messages show."""
    return name if ":" in name else f"{component}:{name}"


def _matches(rule: LrRule, group: ParamGroup, path: str) -> bool:
    if rule.match is None:
        return rule.group == _short_name(group)
    return re.fullmatch(rule.match, path) is not None


def _short_name(group: ParamGroup) -> str:
    """The name without the component before it."""
    return group.name.removeprefix(f"{group.component} ")


def own_rate(config: OptimizerConfig, group: ParamGroup, name: str) -> float:
    """The rate of the parameter ``name`` of a group, before LoRA+."""
    path = full_name(group.component, name)
    for rule in config.lr_rules:
        if _matches(rule, group, path):
            return rule.lr
    if group.lr is not None:
        return group.lr
    return config.lr_by_component.get(group.component, config.lr)


def _loraplus_ratio(config: OptimizerConfig, group: ParamGroup, text_components: Collection[str]) -> float:
    if config.loraplus is None or group.role != "up":
        return 1.0
    ratios = config.loraplus
    ratio = ratios.text_encoder if group.component in text_components else ratios.denoiser
    return 1.0 if ratio is None else ratio


def _check_reach(config: OptimizerConfig, groups: Sequence[ParamGroup], text_components: Collection[str]) -> None:
    components = {group.component for group in groups}
    for component in config.lr_by_component:
        if component not in components:
            near = difflib.get_close_matches(component, components, 1)
            raise UsageError(
                f"{component!r} is not a component that trains",
                where="optimizer.lr_by_component",
                why=f"this run trains {', '.join(sorted(components))}",
                fix=f"did you mean {near[0]!r}?" if near else "remove it, or add it to train.components",
            )
    paths = [(group, full_name(group.component, name)) for group in groups for name in group.params]
    for number, rule in enumerate(config.lr_rules):
        if rule.group is not None and not any(_matches(rule, *each) for each in paths):
            known = dict.fromkeys(_short_name(group) for group in groups)
            raise UsageError(
                f"no parameter that trains is in a group {rule.group!r}",
                where=f"optimizer.lr_rules[{number}].group",
                why=f"there are {', '.join(known)}",
            )
        if not any(_matches(rule, *each) for each in paths):
            raise UsageError(
                "this learning-rate rule matches no parameter",
                where=f"optimizer.lr_rules[{number}].match",
                why=f"{rule.match!r} must match a whole name such as {paths[0][1]!r}" if paths else None,
            )
    if config.loraplus is None:
        return
    ups = {group.component for group in groups if group.role == "up"}
    for key, reached in (("denoiser", ups - set(text_components)), ("text_encoder", ups & set(text_components))):
        if getattr(config.loraplus, key) is not None and not reached:
            raise UsageError(
                "this LoRA+ ratio reaches no adapter",
                where=f"optimizer.loraplus.{key}",
                why="no up matrix of such a component trains",
            )
