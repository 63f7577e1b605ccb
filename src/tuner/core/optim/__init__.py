"""Optimizers by name, parameter groups, learning-rate schedules, and optimizer state without pickle."""

from __future__ import annotations

from tuner.core.optim.ema import Ema, ema_decay
from tuner.core.optim.groups import learning_rates, torch_groups
from tuner.core.optim.registry import build_optimizer, check_optimizer, is_separate, optimizer_names, register
from tuner.core.optim.schedules import LrSchedule, lr_factor
from tuner.core.optim.state import eval_weights, is_schedule_free, load_optimizer_state, optimizer_state_tensors
from tuner.core.optim.update import FusedUpdate, Update

__all__ = [
    "Ema",
    "FusedUpdate",
    "LrSchedule",
    "Update",
    "build_optimizer",
    "check_optimizer",
    "ema_decay",
    "eval_weights",
    "is_schedule_free",
    "is_separate",
    "learning_rates",
    "load_optimizer_state",
    "lr_factor",
    "optimizer_names",
    "optimizer_state_tensors",
    "register",
    "torch_groups",
]
