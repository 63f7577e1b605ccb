"""Which of a model's own weights train, by their names alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tuner.core.types import ModelFacts

BASE = "base"
"""The group of the denoiser's parameters that no pattern of the facts names; other components give theirs its name."""
BITFIT = "bitfit"
"""Preset of ``train.freeze``: everything but biases (Ben Zaken et al. 2022, arXiv:2106.10199)."""


def freeze_patterns(freeze: Sequence[str]) -> list[str]:
    """Full-match patterns on names ``component:path`` for the entries of ``train.freeze``, in their order."""
    return [r".*(?<!\.bias)" if entry == BITFIT else entry for entry in freeze]


def group_of(facts: ModelFacts, name: str) -> str:
    """The group of a parameter ``component:path``: the first of ``facts.groups`` that matches, else ``base``, or the
    component where that is not the denoiser."""
    for group, patterns in facts.groups.items():
        if any(re.fullmatch(pattern, name) for pattern in patterns):
            return group
    component = name.partition(":")[0]
    return BASE if component == "denoiser" else component


def group_name(component: str, group: str) -> str:
    """What a group of a component is called in logs and by ``optimizer.lr_rules``."""
    return component if group == component else f"{component} {group}"
