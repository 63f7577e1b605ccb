"""Optimizers by name.

A name is one of `BUILTIN`, something a program registered, an entry point of the group ``tuner.optimizers``, or the
import path of a class. Whatever it is, it is called like a torch optimizer: ``(param_groups, lr=..., **options)``.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import torch

from tuner.core.errors import UsageError
from tuner.core.optim.groups import torch_groups
from tuner.core.optim.state import is_schedule_free

if TYPE_CHECKING:
    from tuner.core.config import OptimizerConfig
    from tuner.core.types import ParamGroup

log = logging.getLogger(__name__)

Factory = Callable[..., torch.optim.Optimizer]

ENTRY_POINTS = "tuner.optimizers"
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
"""Device kinds for which torch has a fused AdamW."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A built-in name. package: what to install when ``module`` is not there. own_rate: it scales lr by an estimate
    of its own, so all groups must share one rate near 1."""

    module: str
    attribute: str
    package: str | None = None
    own_rate: bool = False


BUILTIN = {
    "adamw": Entry("torch.optim", "AdamW"),
    "adamw8bit": Entry("bitsandbytes.optim", "AdamW8bit", package="bitsandbytes"),
    "adafactor": Entry("tuner.core.optim.adafactor", "Adafactor"),
    "prodigy": Entry("prodigyopt", "Prodigy", package="prodigyopt", own_rate=True),
    "lion": Entry("tuner.core.optim.lion", "Lion"),
    "adamw_schedulefree": Entry("schedulefree", "AdamWScheduleFree", package="schedulefree"),
    "sgd": Entry("torch.optim", "SGD"),
}

PLANNED = {"adamw_bf16": "it needs rounding that this version does not have; use adamw, which keeps float32 adapters"}

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
) -> torch.optim.Optimizer:
    """The optimizer of a run, with one torch group per rate. See `torch_groups` for the rates.

    Raises UsageError for an unknown name, a missing package, or an option that the optimizer does not take.
    """
    groups = torch_groups(config, param_groups, text_components)
    factory = find_factory(config.name)
    entry = BUILTIN.get(config.name.lower())
    options = _options(config, factory)
    if entry is not None and entry.attribute == "AdamW":
        options |= _fused(options, torch.device(device))
    if entry is not None and entry.own_rate:
        _check_own_rate(config, groups)
    try:
        optimizer = factory(groups, lr=config.lr, **options)
    except (TypeError, ValueError) as error:
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


def find_factory(name: str) -> Factory:
    """What ``optimizer.name`` stands for; imports its package. Import paths are case-sensitive, names are not."""
    if "." in name:
        module, _, attribute = name.rpartition(".")
        return _import(name, module, attribute, module.partition(".")[0])
    key = name.lower()
    if key in BUILTIN:
        entry = BUILTIN[key]
        return _import(name, entry.module, entry.attribute, entry.package)
    if key in _registered:
        return _registered[key]
    for point in entry_points(group=ENTRY_POINTS):
        if point.name.lower() == key:
            factory: Factory = point.load()
            return factory
    names = optimizer_names()
    near = difflib.get_close_matches(key, names, 1)
    raise UsageError(
        f"no optimizer is called {name!r}",
        where="optimizer.name",
        why=PLANNED.get(key) or f"there are {', '.join(names)}, and import paths such as package.module.Class",
        fix=f"did you mean {near[0]!r}?" if near and key not in PLANNED else None,
    )


def _import(name: str, module: str, attribute: str, package: str | None) -> Factory:
    top = module.partition(".")[0]
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
            raise UsageError(
                f"the optimizer {name!r} cannot be imported", where="optimizer.name", why=f"{module}: {error}"
            ) from error
        found = _installed(top)
        raise UsageError(
            f"the optimizer {name!r} needs the package {package or top}, which "
            + (f"has no module {module}" if found else "is not installed"),
            where="optimizer.name",
            fix="check the import path" if found else f"pip install {package or top}",
        ) from error
    except ImportError as error:
        raise UsageError(
            f"the optimizer {name!r} cannot be imported", where="optimizer.name", why=f"{module}: {error}"
        ) from error
    factory: Factory | None = getattr(loaded, attribute, None)
    if factory is None:
        near = difflib.get_close_matches(attribute, dir(loaded), 1)
        raise UsageError(
            f"the module {module} has no {attribute!r}",
            where="optimizer.name",
            fix=f"did you mean {module}.{near[0]}?" if near else None,
        )
    return factory


def _installed(top: str) -> bool:
    try:
        return importlib.util.find_spec(top) is not None
    except ValueError:  # sys.modules says that it is not to be imported
        return False


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
    return named | args


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
