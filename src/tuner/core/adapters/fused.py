"""Adapters of projections that some files hold as one matrix: finding the groups, joining parts, cutting them apart.

A joint adapter has one down [R, in] and an up whose rows are those of the members one below the other. Separate members
are stored in it as a block-diagonal up over stacked downs, and found again by that pattern of zeros.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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


# --- parts of every kind ----------------------------------------------------------------------------------------------

BY_ROWS = ("diff", "diff_b", "dora_scale", "up", "hada_w1_a", "hada_w2_a")
"""Parts with one row for each row of the weight."""


def join_members(members: Sequence[Mapping[str, Tensor] | None], rows: Sequence[int], name: str) -> dict[str, Tensor]:
    """One module with the updates of several, by the internal parts of each; None is a member without adapter.

    UsageError for a kind that has no joint form, and for a DoRA that lacks a member, whose lengths are unknown.
    """
    present = [parts for parts in members if parts is not None]
    first = present[0]
    if "diff" in first:
        return _join_full(members, rows, first)
    if "up" not in first:
        raise UsageError(
            f"the adapters inside {name} cannot be stored as one",
            where="checkpoint.format",
            why="this kind of adapter has no joint form",
            fix="choose a format that keeps the projections apart",
        )
    lengths = [parts["dora_scale"] for parts in present if "dora_scale" in parts]
    if lengths and len(lengths) < len(members):
        raise UsageError(
            f"the adapters inside {name} cannot be stored as one",
            where="checkpoint.format",
            why="the lengths of the rows that are not adapted are not known",
            fix="adapt every projection of the joint matrix, or choose a format that keeps them apart",
        )
    joint = join_parts(
        [None if parts is None else Part(parts["down"], parts["up"], parts["alpha"]) for parts in members], rows, name
    )
    found = {"down": joint.down, "up": joint.up, "alpha": joint.alpha}
    return found | {"dora_scale": torch.cat(lengths)} if lengths else found


def split_members(parts: Mapping[str, Tensor], rows: Sequence[int], name: str) -> list[dict[str, Tensor] | None]:
    """The members of a joint module, by parts; None for a member that it leaves alone. UsageError as `split_joint`."""
    if "up" in parts:
        joint = Part(parts["down"], parts["up"], parts["alpha"])
        found = split_joint(joint, rows, name)
        ups, lengths = (_cut(parts[part], rows) if part in parts else None for part in ("up", "dora_scale"))
        members: list[dict[str, Tensor] | None] = []
        for index, part in enumerate(found):
            if part is None and lengths is not None and ups is not None:
                part = Part(joint.down, ups[index], joint.alpha)
            own = None if part is None else {"down": part.down, "up": part.up, "alpha": part.alpha}
            members.append(own if own is None or lengths is None else own | {"dora_scale": lengths[index]})
        return members
    if set(parts) <= {"diff", "diff_b"}:
        cut = {part: _cut(value, rows) for part, value in parts.items()}
        found_parts = [{part: values[index] for part, values in cut.items()} for index in range(len(rows))]
        used = [any(bool(value.any()) for value in each.values()) for each in found_parts]
        return [each if mine or not any(used) else None for each, mine in zip(found_parts, used, strict=True)]
    raise UsageError(
        f"the adapter of {name} cannot be cut into its projections",
        why=f"{', '.join(parts)} belong to the joint matrix as a whole",
        fix="train or convert it with separate projections",
    )


def exchange_rows(parts: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Parts of a module whose halves of rows change places, where there are twice as many rows as inputs."""
    narrow = next((parts[part] for part in ("down", "diff", "hada_w1_b") if part in parts), None)
    if narrow is None:
        raise UsageError(
            f"the adapter of {name} cannot be stored in this format",
            why="the two halves of the weight's rows stand in the other order there",
            fix="exclude the module by network.exclude, or choose a format with other names",
        )
    return {part: exchange_halves(narrow, value) if part in BY_ROWS else value for part, value in parts.items()}


def _join_full(
    members: Sequence[Mapping[str, Tensor] | None], rows: Sequence[int], first: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    width = first["diff"].shape[1]
    joint = {}
    for part in first:
        rest = first[part].shape[1:]
        joint[part] = torch.cat(
            [
                torch.zeros(count * width, *rest, dtype=first[part].dtype) if parts is None else parts[part]
                for parts, count in zip(members, rows, strict=True)
            ]
        )
    return joint


def _cut(value: Tensor, rows: Sequence[int]) -> tuple[Tensor, ...]:
    unit = value.shape[0] // sum(rows)
    return torch.split(value, [count * unit for count in rows])
