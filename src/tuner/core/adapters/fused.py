"""Adapters of projections that some files hold as one matrix: joining parts, cutting them apart.

A joint adapter has one down [R, in] and an up whose rows are those of the members one below the other. Separate members
are stored in it as a block-diagonal up over stacked downs, and found again by that pattern of zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.core.adapters.products import as_dense, as_product, lokr_columns, lokr_rows
from tuner.core.adapters.rotation import limited
from tuner.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Part:
    """The adapter of one linear, or a joint one: down [r, in], up [out, r], alpha; the update is alpha/r * up down."""

    down: Tensor
    up: Tensor
    alpha: Tensor

    @property
    def scale(self) -> float:
        return float(self.alpha) / self.down.shape[0]


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
    """``up`` [rows, rank] with its halves of rows exchanged, where there are twice as many as inputs of ``down``."""
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
    if any("diff" in parts or "diff_b" in parts for parts in present):
        return _join_full(members, rows, name)
    if not all("up" in parts for parts in present):
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
    if "hada_w1_a" in parts:
        return _cut_some(parts, ("hada_w1_a", "hada_w2_a"), rows)
    if "lokr_w2" in parts or "lokr_w2_a" in parts:
        first, groups, size = lokr_rows(parts)
        if _whole(groups * size, size, rows):
            return _cut_some(parts, (first,), rows)
        return split_members(as_product(parts), rows, name)
    if "on_input" in parts:
        return _cut_some(parts, () if bool(parts["on_input"]) else ("weight",), rows)
    if "oft_blocks" in parts and parts["oft_blocks"].ndim == 3:
        groups, size, _ = parts["oft_blocks"].shape
        if _whole(groups * size, size, rows):
            # The limit is one for all rows together: it is applied before they part.
            blocks = limited(parts["oft_blocks"], float(parts["alpha"]), groups * size)
            return _cut_some({"oft_blocks": blocks, "alpha": torch.zeros(())}, ("oft_blocks",), rows)
    raise UsageError(
        f"the adapter of {name} cannot be cut into its projections",
        why=f"{', '.join(parts)} belong to the joint matrix as a whole",
        fix="train or convert it with separate projections",
    )


def _whole(total: int, size: int, rows: Sequence[int]) -> bool:
    """Whether groups of ``size`` rows lie inside of the members; rows: of each, in proportion to ``total``."""
    return total % sum(rows) == 0 and all(total // sum(rows) * count % size == 0 for count in rows)


def _cut_some(parts: Mapping[str, Tensor], names: Sequence[str], rows: Sequence[int]) -> list[dict[str, Tensor] | None]:
    """Members that have their own rows of the parts ``names``, and share the others."""
    cut = {part: _cut(parts[part], rows) for part in names}
    return [{**parts, **{part: cut[part][index] for part in names}} for index in range(len(rows))]


def exchange_rows(parts: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Parts of a module whose halves of rows change places, where there are twice as many rows as inputs."""
    if "lokr_w2" in parts or "lokr_w2_a" in parts:
        first, groups, size = lokr_rows(parts)
        if groups * size != 2 * lokr_columns(parts):
            return dict(parts)
        if groups % 2 == 0:
            return {**parts, first: torch.cat(parts[first].chunk(2)[::-1])}
        return exchange_rows(as_product(parts), name)
    narrow = next((parts[part] for part in ("down", "diff", "hada_w1_b") if part in parts), None)
    if narrow is None:
        raise UsageError(
            f"the adapter of {name} cannot be stored in this format",
            why="the two halves of the weight's rows stand in the other order there",
            fix="exclude the module by network.exclude, or choose a format with other names",
        )
    return {part: exchange_halves(narrow, value) if part in BY_ROWS else value for part, value in parts.items()}


def _join_full(members: Sequence[Mapping[str, Tensor] | None], rows: Sequence[int], name: str) -> dict[str, Tensor]:
    whole = [{} if parts is None else _whole_change(parts, name) for parts in members]
    joint = {}
    for part in dict.fromkeys(part for parts in whole for part in parts):
        known = [parts.get(part) for parts in whole]
        like, unit = next(
            (value, len(value) // count) for value, count in zip(known, rows, strict=True) if value is not None
        )
        joint[part] = torch.cat(
            [
                torch.zeros(count * unit, *like.shape[1:], dtype=like.dtype) if value is None else value.to(like.dtype)
                for value, count in zip(known, rows, strict=True)
            ]
        )
    return joint


def _whole_change(parts: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The parts of a dense change; a product beside one becomes dense."""
    if set(parts) <= {"diff", "diff_b"}:
        return dict(parts)
    if set(parts) <= {"up", "down", "alpha"}:
        return {"diff": as_dense(parts)}
    raise UsageError(f"the adapters inside {name} cannot be stored as one", why="they are of different kinds")


def _cut(value: Tensor, rows: Sequence[int]) -> tuple[Tensor, ...]:
    unit, rest = divmod(value.shape[0], sum(rows))
    if rest:
        raise UsageError(f"a joint matrix cannot have {value.shape[0]} rows", why=f"its parts are as {[*rows]}")
    return torch.split(value, [count * unit for count in rows])
