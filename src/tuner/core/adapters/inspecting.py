"""What a weight file is, told from its header alone: names, shapes and metadata. No torch, and no values but alphas."""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.core.adapters.spelling import Key, StoredModule, find_modules, kind_by_parts, names_table, take_apart
from tuner.core.errors import UsageError
from tuner.core.types import COMFYUI_KINDS

if TYPE_CHECKING:
    from tuner.core.files import TensorInfo, WeightHeader
    from tuner.core.types import Header, KeyFormat, KeyMaps, StoredTensor, WeightMaps

RANK_PARTS = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
"""Parts whose first axis is the rank of their module."""
ELSEWHERE = frozenset({"weight", "alpha"})
"""Parts that alone do not make a file an adapter: checkpoints have names that end so."""
TOGETHER = (
    frozenset({"down", "up"}),
    frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
    frozenset({"lokr_w1_a", "lokr_w1_b"}),
    frozenset({"lokr_w2_a", "lokr_w2_b"}),
)
"""Parts of a module of which none works without the others."""
CHUNK = 1 << 22
READ_KINDS = {"ComfyUI": COMFYUI_KINDS}
"""Programs that read the same kinds under every name that they know, with alphas or without."""
SCALARS = {"F32": "<f", "F16": "<e", "F64": "<d"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A model as far as its plugin declares names. detect: (header) to a flavour or None."""

    name: str
    detect: Callable[[Header], str | None]
    adapters: KeyMaps | None = None
    weights: WeightMaps | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRow:
    """A module of an adapter file. name: in the file. paths: the linears it stands for, none when it fits nothing."""

    name: str
    component: str
    paths: tuple[str, ...]
    kind: str
    rank: int | None
    alpha: float | None
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What a file is. what: ``adapter``, ``checkpoint``, the name of a component, or ``unknown``.

    unmapped: keys that belong to no module or parameter of the family. unread: programs to the modules that they would
    not understand, by name. problems: why a family that knows the names refuses the file. parts: component to (tensors,
    bytes). dtypes: the same by dtype as the file spells it.
    """

    path: Path
    size: int
    what: str
    tensors: int
    metadata: Mapping[str, str]
    dtypes: Mapping[str, tuple[int, int]]
    family: str | None = None
    flavour: str | None = None
    format: str | None = None
    modules: Sequence[ModuleRow] = ()
    parts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    unmapped: Sequence[str] = ()
    unread: Mapping[str, Sequence[str]] = field(default_factory=dict)
    problems: Sequence[str] = ()

    @property
    def ranks(self) -> dict[tuple[str, int | None, float | None], int]:
        """(kind, rank, alpha) to how many modules have them, the most frequent first."""
        return dict(Counter((row.kind, row.rank, row.alpha) for row in self.modules).most_common())


def is_adapter(names: Iterable[str]) -> bool:
    """Whether names of tensors are those of an adapter file."""
    return any(part is not None and part.part not in ELSEWHERE for part in map(take_apart, names))


def inspect(header: WeightHeader, families: Sequence[Family]) -> Inspection:
    """Find out what a file is. The family with the most names that fit wins."""
    size = sum(path.stat().st_size for path in header.files) or header.path.stat().st_size
    keys = {key: take_apart(key) for key in header}
    base = Inspection(
        path=header.path,
        size=size,
        what="unknown",
        tensors=len(header),
        metadata=header.metadata,
        dtypes=_totals((info.dtype, info) for info in header.values()),
    )
    if is_adapter(header):
        return _adapter(header, keys, families, base)
    problems = []
    for family in families:
        try:
            flavour = family.detect(header)
            if flavour is not None:
                return _checkpoint(header, family, flavour, base)
        except UsageError as error:
            problems.append(f"as {family.name}: {error.what}{f' ({error.why})' if error.why else ''}")
    found = _components(header, families)
    if not found:
        return replace(base, unmapped=tuple(header), problems=problems)
    [stored, *_] = found.values()
    lost = tuple(key for key in header if key not in stored)
    components = dict.fromkeys(component for _, component in found)
    what = " or ".join(components)
    return replace(
        base,
        problems=problems,
        what="checkpoint" if what == "denoiser" else what,
        family=" or ".join(dict.fromkeys(family for family, _ in found)),
        parts={what: _total(header[key] for key in stored)},
        unmapped=lost,
    )


def _components(header: WeightHeader, families: Sequence[Family]) -> dict[tuple[str, str], Mapping[str, StoredTensor]]:
    """(family, component) to the tensors of it, for every one that the file could be: families share encoders."""
    return {
        (family.name, component): stored
        for family in families
        if family.weights is not None
        for component in family.weights.folders
        if (stored := family.weights.stored(header, component))
    }


def _adapter(
    header: WeightHeader, keys: Mapping[str, Key | None], families: Sequence[Family], base: Inspection
) -> Inspection:
    best: tuple[int, Family, KeyFormat, dict[str, StoredModule], Mapping[str, tuple[str, ...]]] | None = None
    for family in families:
        if family.adapters is None:
            continue
        paths = family.adapters.paths(tuple(header))
        number, places = find_modules(family.adapters.formats, paths, keys)
        known = sum(part is not None and part.name in places for part in keys.values())
        if best is None or known > best[0]:
            best = (known, family, family.adapters.formats[number], places, paths)
    if best is None or not best[0]:
        rows = _rows(header, keys, {})
        return replace(base, what="adapter", modules=rows, unmapped=tuple(header), problems=_incomplete(keys))
    _, family, fmt, places, paths = best
    rows = _rows(header, keys, places)
    lost = tuple(key for key, part in keys.items() if part is None or part.name not in places)
    inside = _totals(
        (places[part.name].component, header[key])
        for key, part in keys.items()
        if part is not None and part.name in places
    )
    assert family.adapters is not None
    return replace(
        base,
        what="adapter",
        family=family.name,
        format=fmt.name,
        modules=rows,
        parts=inside,
        unmapped=lost,
        unread=_unread(rows, family.adapters, paths),
        problems=_incomplete(keys),
    )


def _rows(
    header: WeightHeader, keys: Mapping[str, Key | None], places: Mapping[str, StoredModule]
) -> tuple[ModuleRow, ...]:
    found: dict[str, dict[str, TensorInfo]] = {}
    for key, part in keys.items():
        if part is not None:
            found.setdefault(part.name, {})[part.part] = header[key]
    rows = []
    for name, parts in found.items():
        place = places.get(name)
        rotation = next((info for part, info in parts.items() if part.startswith("oft_blocks")), None)
        rank = next((parts[part].shape[0] for part in RANK_PARTS if part in parts), None)
        rows.append(
            ModuleRow(
                name=name,
                component=place.component if place is not None else "",
                paths=place.paths if place is not None else (),
                kind=kind_by_parts(parts, len(rotation.shape) if rotation is not None else 0) or "unknown",
                rank=rank,
                alpha=scalar(parts["alpha"]) if "alpha" in parts else None,
                dtype=max((info.dtype for part, info in parts.items() if part != "alpha"), default="", key=len),
            )
        )
    return tuple(rows)


def _incomplete(keys: Mapping[str, Key | None]) -> list[str]:
    """One line for every module that has some of the matrices that only work together."""
    found: dict[str, set[str]] = {}
    for part in keys.values():
        if part is not None:
            found.setdefault(part.name, set()).add(part.part)
    lacking = {
        name: missing
        for name, parts in found.items()
        for together in TOGETHER
        if (missing := sorted(together - parts)) and together & parts
    }
    return [f"{name} is not complete: it lacks {', '.join(missing)}" for name, missing in lacking.items()]


def _unread(rows: Sequence[ModuleRow], maps: KeyMaps, paths: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """By program, the modules of a file that none of the spellings it knows would give it."""
    understood: dict[str, set[tuple[str, str, bool]]] = {}
    for fmt in maps.formats:
        # Prefixes that only this program reads are left out: others were not made for them.
        for name in names_table(replace(fmt, read_prefixes={}), paths):
            for program in fmt.readers:
                # Some kinds are never written for a joint matrix, yet read when another program trained them there.
                kinds = READ_KINDS.get(program, fmt.kinds)
                alphas = (False, True) if program in READ_KINDS or fmt.alpha is not None else (False,)
                understood.setdefault(program, set()).update(product((name,), kinds, alphas))
    missing = {
        program: tuple(row.name for row in rows if (row.name, row.kind, row.alpha is not None) not in known)
        for program, known in understood.items()
    }
    return {program: names for program, names in missing.items() if names}


def _checkpoint(header: WeightHeader, family: Family, flavour: str, base: Inspection) -> Inspection:
    if family.weights is None:
        return replace(base, what="checkpoint", family=family.name, flavour=flavour)
    stored = family.weights.stored(header, None)
    owners = {key: tensor.names[0].partition(":")[0] for key, tensor in stored.items()}
    for component, prefix in family.weights.prefixes.items():
        if component != "denoiser":
            owners |= {key: component for key in header if key.startswith(prefix) and key not in owners}
    return replace(
        base,
        what="checkpoint",
        family=family.name,
        flavour=flavour,
        parts=_totals((owner, header[key]) for key, owner in owners.items()),
        unmapped=tuple(key for key in header if key not in owners),
    )


def scalar(info: TensorInfo) -> float | None:
    """The value of a tensor with one number, read from its file; None for another dtype or size."""
    with info.path.open("rb") as file:
        file.seek(info.start)
        data = file.read(info.stop - info.start)
    if info.dtype == "BF16" and len(data) == 2:
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    form = SCALARS.get(info.dtype)
    return float(struct.unpack(form, data)[0]) if form is not None and len(data) == struct.calcsize(form) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hashes:
    """Hexadecimal digests. sha256: of the file, its first ten digits are AutoV2 of model browsers.

    tensors: SHA-256 of the bytes after the header, which metadata do not change; its first twelve digits are AutoV3,
    and kohya-ss/sd-scripts stores it as ``sshs_model_hash``. stored: whether the file has that value in its metadata,
    None when it stores none.
    """

    sha256: str
    tensors: str
    stored: bool | None


def hashes(header: WeightHeader) -> Hashes:
    """Hash one file; every byte of it is read."""
    whole, inside = hashlib.sha256(), hashlib.sha256()
    with header.path.open("rb") as file:
        start = file.read(8)
        text = file.read(int.from_bytes(start, "little"))
        whole.update(start + text)
        while data := file.read(CHUNK):
            whole.update(data)
            inside.update(data)
    told = header.metadata.get("sshs_model_hash")
    return Hashes(
        sha256=whole.hexdigest(),
        tensors=inside.hexdigest(),
        stored=None if told is None else told.removeprefix("0x") == inside.hexdigest(),
    )


def _totals(pairs: Iterable[tuple[str, TensorInfo]]) -> dict[str, tuple[int, int]]:
    found: dict[str, list[TensorInfo]] = {}
    for name, info in pairs:
        found.setdefault(name, []).append(info)
    return {name: _total(infos) for name, infos in found.items()}


def _total(infos: Iterable[TensorInfo]) -> tuple[int, int]:
    sizes = [info.stop - info.start for info in infos]
    return len(sizes), sum(sizes)
