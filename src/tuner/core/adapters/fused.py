"""Adapters of projections that some files hold as one matrix: finding the groups, joining parts, cutting them apart.

A joint adapter has one down [R, in] and an up whose rows are those of the members one below the other. Separate members
are stored in it as a block-diagonal up over stacked downs, and found again by that pattern of zeros.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.types import Fused


@dataclass(frozen=True, slots=True)
class Part:
    """The adapter of one linear, or a joint one: down [r, in], up [out, r], alpha; the update is alpha/r * up down."""

    down: Tensor
    up: Tensor
    alpha: Tensor

    @property
    def scale(self) -> float:
        return float(self.alpha) / self.down.shape[0]


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


def join_parts(parts: Sequence[Part | None], rows: Sequence[int], name: str) -> Part:
    """One joint adapter with the same updates; None is a member without adapter. rows: in multiples of the input.

    A down that all parts share stays as it is, others are stacked. UsageError for a part of another shape.
    """
    present = [part for part in parts if part is not None]
    first = present[0]
    width = first.down.shape[1]
    sizes = [count * width for count in rows]
    for part, size in zip(parts, sizes, strict=True):
        if part is not None and (part.down.shape[1] != width or part.up.shape[0] != size or part.down.ndim != 2):
            shapes = f"{list(part.down.shape)} and {list(part.up.shape)}"
            raise UsageError(f"an adapter does not fit into {name}", why=f"its matrices are {shapes}")
    if all(part.scale == first.scale and torch.equal(part.down, first.down) for part in present):
        ups = [
            torch.zeros(size, first.down.shape[0], dtype=first.up.dtype) if part is None else part.up
            for part, size in zip(parts, sizes, strict=True)
        ]
        return Part(first.down, torch.cat(ups), first.alpha)
    ranks = [part.down.shape[0] for part in present]
    total = sum(ranks)
    even = all(part.scale == first.scale for part in present)
    up = torch.zeros(sum(sizes), total, dtype=first.up.dtype)
    row = column = 0
    for part, size in zip(parts, sizes, strict=True):
        if part is not None:
            rank = part.down.shape[0]
            # One alpha must do for all: scales that differ move into the matrices.
            up[row : row + size, column : column + rank] = part.up if even else part.up.float() * part.scale
            column += rank
        row += size
    alpha = first.scale * total if even else float(total)
    return Part(torch.cat([part.down for part in present]), up, torch.tensor(alpha))


def split_joint(joint: Part, rows: Sequence[int], name: str) -> list[Part | None]:
    """The members of a joint adapter. None for a member whose rows are all zero, unless all are.

    A block-diagonal up gives each member its own columns back; else every member gets the whole down.
    UsageError when the rows are not those of the group.
    """
    width = joint.down.shape[1] if joint.down.ndim == 2 else 0
    sizes = [count * width for count in rows]
    if joint.up.ndim != 2 or joint.up.shape[0] != sum(sizes):
        raise UsageError(
            f"the adapter of {name} has {joint.up.shape[0]} rows",
            why=f"with {width} inputs the joint matrix has {sum(sizes)}",
        )
    ups = torch.split(joint.up, sizes)
    used = torch.stack([(up != 0).any(dim=0) for up in ups])
    if not bool(used.any()):
        return [Part(joint.down, up, joint.alpha) for up in ups]
    places = _own_columns(used)
    if places is None:
        return [
            Part(joint.down, up, joint.alpha) if bool(mine.any()) else None for up, mine in zip(ups, used, strict=True)
        ]
    rank = joint.down.shape[0]
    return [
        Part(joint.down[place], up[:, place], joint.alpha * (len(place) / rank)) if len(place) else None
        for up, place in zip(ups, places, strict=True)
    ]


def _own_columns(used: Tensor) -> list[Tensor] | None:
    """Indices of each member's columns in a block-diagonal matrix; None when members share a column.

    used [members, rank]: whether a member has any value in a column. Equal blocks are preferred, so that a component
    that was never trained does not lower the rank.
    """
    members, rank = used.shape
    if int(used.any(dim=1).sum()) < 2 or int(used.sum(dim=0).max()) > 1:
        return None
    blocks = torch.arange(rank).reshape(members, -1) if rank % members == 0 else None
    if blocks is not None and bool(used.any(dim=1).all()):
        inside = torch.stack([used[index, block].sum() for index, block in enumerate(blocks)])
        if torch.equal(inside, used.sum(dim=1)):
            return list(blocks)
    return [mine.nonzero().flatten() for mine in used]


def exchange_halves(down: Tensor, up: Tensor) -> Tensor:
    """``up`` with its two halves of rows exchanged, where there are twice as many rows as inputs; else ``up``."""
    if up.shape[0] != 2 * down[0].numel():
        return up
    return torch.cat(up.chunk(2)[::-1])
