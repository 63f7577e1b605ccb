"""Projections that some files hold as one matrix: finding the groups. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tuner.core.types import Fused


@dataclass(frozen=True, slots=True)
class Member:
    """Place of a linear in a group: the group's rule, the path in front of its members, its number among them."""

    rule: Fused
    parent: str
    index: int

    @property
    def paths(self) -> tuple[str, ...]:
        """All members of this group, in the order of the rows."""
        return tuple(f"{self.parent}.{member}" for member in self.rule.members)


def member_of(rules: Sequence[Fused], path: str) -> Member | None:
    """The group that a module path belongs to, None for a linear that stands alone."""
    for rule in rules:
        for index, member in enumerate(rule.members):
            parent = path.removesuffix(f".{member}")
            if parent != path and re.fullmatch(rule.parent, parent):
                return Member(rule, parent, index)
    return None
