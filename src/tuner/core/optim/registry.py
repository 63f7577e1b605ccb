"""Optimizers by name.

A name is one of `BUILTIN`, something a program registered, an entry point of the group ``tuner.optimizers``, or the
import path of a class. Whatever it is, it is called like a torch optimizer: ``(param_groups, lr=..., **options)``.
"""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Callable, Collection, Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import torch

from tuner.core.errors import UsageError
from tuner.core.optim.groups import torch_groups
from tuner.core.optim.imports import import_class
from tuner.core.optim.names import BUILTIN, entry_of
from tuner.core.optim.state import is_schedule_free

if TYPE_CHECKING:
    from tuner.core.config import OptimizerConfig
    from tuner.core.types import ParamGroup

log = logging.getLogger(__name__)

Factory = Callable[..., torch.optim.Optimizer]

ENTRY_POINTS = "tuner.optimizers"
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
"""Device kinds for which torch has a fused AdamW."""


NOT_OFFERED = {
    "sdnq": "its optimizers quantize the weights they train; use one of the 8-bit optimizers",
    "sgdnesterov8bit": "bitsandbytes takes nesterov and does nothing with it; use sgd8bit, or sgd_nesterov",
    "sgd_nesterov8bit": "bitsandbytes takes nesterov and does nothing with it; use sgd8bit, or sgd_nesterov",
}
"""Beginnings of names that people know from elsewhere, and what to do instead."""

_registered: dict[str, Factory] = {}


def register(name: str, factory: Factory) -> None:
    """Make ``factory`` available as ``optimizer.name`` in this process. Built-in names cannot be taken."""
    key = name.lower()
    if key in BUILTIN or "." in key:
        raise ValueError(f"{name!r} is a built-in name or an import path")
    _registered[key] = factory


def optimizer_names() -> list[str]:
    """Names that ``optimizer.name`` takes besides import paths, sorted."""
    return sorted({*BUILTIN, *_registered, *(point.name.lower() for point in entry_points(group=ENTRY_POINTS))})


def build_optimizer(
    config: OptimizerConfig,
    param_groups: Sequence[ParamGroup],
    device: torch.device | str,
    text_components: Collection[str] = (),
    *,
    scale: float = 1.0,
) -> torch.optim.Optimizer:
    """The optimizer of a run, with one torch group per rate. See `torch_groups` for the rates, which ``scale``
    multiplies.

    Raises UsageError for an unknown name, a missing package, or an option that the optimizer does not take.
    """
    groups = torch_groups(config, param_groups, text_components)
    for group in groups:
        group["lr"] *= scale
        group["base_lr"] *= scale
    factory = find_factory(config.name)
    entry = entry_of(config.name)
    options = _options(config, factory)
    if entry is not None and (entry.module, entry.attribute) == ("torch.optim", "AdamW"):
        options |= _fused(options, torch.device(device))
    if entry is not None and entry.own_rate:
        _check_own_rate(config, groups)
    try:
        optimizer = factory(groups, lr=config.lr, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"the optimizer {config.name!r} refuses its settings", where="optimizer", why=str(error)
        ) from error
    if is_schedule_free(optimizer):
        # They start in the mode for looking, and refuse to step there.
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def check_optimizer(config: OptimizerConfig) -> None:
    """Raise what `build_optimizer` would raise about name, package and options, with no parameter at hand."""
    _options(config, find_factory(config.name))


def is_separate(name: str) -> bool:
    """Whether ``optimizer.name`` updates every parameter by itself; False when that is not known."""
    entry = entry_of(name)
    return entry is not None and entry.separate


def find_factory(name: str) -> Factory:
    """What ``optimizer.name`` stands for; imports its package. Import paths are case-sensitive, names are not."""
    if "." in name:
        module, _, attribute = name.rpartition(".")
        found: Factory = import_class(f"the optimizer {name!r}", module, attribute, where="optimizer.name")
        return found
    key = name.lower()
    if key in BUILTIN:
        entry = BUILTIN[key]
        named: Factory = import_class(
            f"the optimizer {name!r}", entry.module, entry.attribute, where="optimizer.name", package=entry.package
        )
        return named
    if key in _registered:
        return _registered[key]
    for point in entry_points(group=ENTRY_POINTS):
        if point.name.lower() == key:
            factory: Factory = point.load()
            return factory
    names = optimizer_names()
    # Of equally close names, one that begins alike is meant.
    near = sorted(difflib.get_close_matches(key, names, 3), key=lambda each: each[:1] != key[:1])
    not_offered = next((why for start, why in NOT_OFFERED.items() if key.startswith(start)), None)
    raise UsageError(
        f"no optimizer is called {name!r}",
        where="optimizer.name",
        why=not_offered or f"there are {', '.join(names)}, and import paths such as package.module.Class",
        fix=f"did you mean {near[0]!r}?" if near and not not_offered else None,
    )


def _options(config: OptimizerConfig, factory: Factory) -> dict[str, Any]:
    """Constructor arguments from the named keys and from ``args``, each checked against the signature."""
    named = {key: getattr(config, key) for key in ("betas", "eps", "weight_decay") if getattr(config, key) is not None}
    parameters = inspect.signature(factory).parameters
    free = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    known = [key for key in parameters if key not in ("self", "params", "lr")]
    for key in named:
        if key not in known and not free:
            raise UsageError(f"the optimizer {config.name!r} takes no {key}", where=f"optimizer.{key}",
                             why=f"it takes {', '.join(known)}")  # fmt: skip
    own = parameters["betas"].default if "betas" in parameters else None
    if "betas" in named and isinstance(own, tuple) and len(own) != len(named["betas"]):
        raise UsageError(f"the optimizer {config.name!r} takes {len(own)} betas, not {len(named['betas'])}",
                         where="optimizer.betas", fix=f"write {len(own)} numbers; its own are {list(own)}")  # fmt: skip
    entry = BUILTIN.get(config.name.lower())
    fixed = dict(entry.fixed) if entry is not None else {}
    for key in config.args:
        where = f"optimizer.args.{key}"
        if key == "lr" or key in named:
            raise UsageError(f"{key} is set twice or in the wrong place", where=where, fix=f"use optimizer.{key}")
        if key not in known and not free:
            near = difflib.get_close_matches(key, known, 1)
            raise UsageError(f"the optimizer {config.name!r} takes no argument {key!r}", where=where,
                             why=f"it takes {', '.join(known)}",
                             fix=f"did you mean {near[0]!r}?" if near else None)  # fmt: skip
    args = {key: tuple(value) if isinstance(value, list) else value for key, value in config.args.items()}
    return fixed | named | args


def _fused(options: dict[str, Any], device: torch.device) -> dict[str, bool]:
    """One kernel for all parameters where torch has it and the user did not choose a variant."""
    chosen = {"fused", "foreach", "differentiable"} & set(options)
    return {"fused": True} if device.type in FUSED_DEVICES and not chosen else {}


def _check_own_rate(config: OptimizerConfig, groups: list[dict[str, Any]]) -> None:
    if len({group["lr"] for group in groups}) > 1:
        raise UsageError(
            f"the optimizer {config.name!r} cannot train parts at different rates",
            where="optimizer",
            why="it estimates one step size for all parameters",
            fix="remove lr_by_component, lr_rules, loraplus and the rates of network rules",
        )
    if config.lr < 0.1:
        log.warning("%s finds its own step size and multiplies it by optimizer.lr: 1.0 is usual, not %g",
                    config.name, config.lr)  # fmt: skip
