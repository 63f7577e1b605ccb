"""Optimizers by name, parameter groups, learning-rate schedules, and optimizer state without pickle.

Names are imported when first used: a plan needs the table of optimizers and not torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.core.optim.ema import Ema as Ema
    from tuner.core.optim.ema import ema_decay as ema_decay
    from tuner.core.optim.groups import learning_rates as learning_rates
    from tuner.core.optim.groups import torch_groups as torch_groups
    from tuner.core.optim.registry import build_optimizer as build_optimizer
    from tuner.core.optim.registry import check_optimizer as check_optimizer
    from tuner.core.optim.registry import is_separate as is_separate
    from tuner.core.optim.registry import optimizer_names as optimizer_names
    from tuner.core.optim.registry import register as register
    from tuner.core.optim.schedules import LrSchedule as LrSchedule
    from tuner.core.optim.schedules import lr_factor as lr_factor
    from tuner.core.optim.state import eval_weights as eval_weights
    from tuner.core.optim.state import is_schedule_free as is_schedule_free
    from tuner.core.optim.state import load_optimizer_state as load_optimizer_state
    from tuner.core.optim.state import optimizer_state_tensors as optimizer_state_tensors
    from tuner.core.optim.update import FusedUpdate as FusedUpdate
    from tuner.core.optim.update import Update as Update
    from tuner.core.optim.update import add_up_in_float32 as add_up_in_float32

_HOME = {
    "Ema": "ema",
    "FusedUpdate": "update",
    "LrSchedule": "schedules",
    "Update": "update",
    "add_up_in_float32": "update",
    "build_optimizer": "registry",
    "check_optimizer": "registry",
    "ema_decay": "ema",
    "eval_weights": "state",
    "is_schedule_free": "state",
    "is_separate": "registry",
    "learning_rates": "groups",
    "load_optimizer_state": "state",
    "lr_factor": "schedules",
    "optimizer_names": "registry",
    "optimizer_state_tensors": "state",
    "register": "registry",
    "torch_groups": "groups",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
