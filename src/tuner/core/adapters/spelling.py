"""How formats spell the modules and parts of adapters: names alone, without torch.

A `KeyFormat` spells a module as prefix + path + suffix. Names joined by underscores cannot be split again, so names are
read by tables made from the list of the model's module paths.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tuner.core.adapters.members import member_of
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.types import KeyFormat

PAIRS = (
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora.down.weight", ".lora.up.weight"),
)
"""Suffixes of the two matrices that programs use, whatever the rest of the name looks like."""
ALPHA = ".alpha"
LENGTHS = (
    ".dora_scale",
    ".lora_magnitude_vector",
    ".lora_magnitude_vector.weight",
    ".lora_magnitude_vector.default.weight",
)
OTHER_PARTS = (
    *(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b")),
    *(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")),
    *("oft_blocks", "diff", "diff_b", "w_norm", "b_norm", "on_input"),
)
"""Parts whose suffix is their name, as LyCORIS writes them and ComfyUI reads them."""
KIND_PARTS = (
    ("dora_scale", "dora"),
    ("down", "lora"),
    ("hada_w1_a", "loha"),
    ("on_input", "ia3"),
    ("diff", "full"),
    ("diff_b", "full"),
    ("w_norm", "norms"),
)
"""A part to the kind of adapter that has it; the first that is there decides."""
PEFT_METADATA = "lora_adapter_metadata"
"""Where PEFT keeps the settings of an adapter in the metadata of a file, as JSON."""
NUMBERED = re.compile(r"(.*)\.(oft_blocks\.\d+)")


def kind_by_parts(parts: Collection[str], rotation_axes: int = 3) -> str | None:
    """The kind of adapter whose parts have these names, None for none. rotation_axes: of ``oft_blocks``."""
    if any(part.startswith("oft_blocks") for part in parts):
        return "boft" if rotation_axes == 4 else "oft"
    for part, kind in KIND_PARTS:
        if part in parts:
            return kind
    return "lokr" if any(part.startswith("lokr_") for part in parts) else None


@dataclass(frozen=True, slots=True)
class StoredModule:
    """One module of a file: the linears it means, in the order of its rows, and how its values differ from ours."""

    component: str
    paths: tuple[str, ...]
    rows: tuple[int, ...] = ()
    exchange: bool = False


def stored_module(fmt: KeyFormat, component: str, path: str) -> tuple[str, StoredModule]:
    """How a format calls the module that holds a linear, without prefix and suffix, and what that module is."""
    for rule, replacement in fmt.fused.get(component, ()):
        member = member_of((rule,), path)
        if member is not None:
            joint = re.sub(f"^{rule.parent}$", replacement, member.parent)
            return joint.replace(".", fmt.separator), StoredModule(component, member.paths, rule.rows)
    exchange = any(re.fullmatch(pattern, path) for pattern in fmt.exchange.get(component, ()))
    return _spelled(fmt, component, path), StoredModule(component, (path,), exchange=exchange)


def module_name(fmt: KeyFormat, component: str, path: str) -> str:
    """How a format calls the module of a linear, without suffix. UsageError when it has no place for the component."""
    if component not in fmt.prefixes:
        raise UsageError(
            f"the format {fmt.name} cannot hold {component}",
            where="checkpoint.format",
            why=f"it stores {', '.join(fmt.prefixes)}",
            fix="choose another format",
        )
    return fmt.prefixes[component] + stored_module(fmt, component, path)[0]


@dataclass(frozen=True, slots=True)
class Key:
    """A file's key, taken apart. part: its internal name; style: index of the suffix pair of a matrix, else -1."""

    name: str
    part: str
    style: int


def take_apart(key: str) -> Key | None:
    """The module's name and the part of a file's key; None for a key that no adapter has."""
    if key.endswith(ALPHA):
        return Key(key.removesuffix(ALPHA), "alpha", -1)
    for style, pair in enumerate(PAIRS):
        for part, suffix in zip(("down", "up"), pair, strict=True):
            if key.endswith(suffix):
                return Key(key.removesuffix(suffix), part, style)
    for suffix in LENGTHS:
        if key.endswith(suffix):
            return Key(key.removesuffix(suffix), "dora_scale", -1)
    if numbered := NUMBERED.fullmatch(key):
        return Key(numbered[1], numbered[2], -1)
    name, _, part = key.rpartition(".")
    # The last is the whole (IA)^3 module; it must come after every longer name that ends so.
    return Key(name, part, -1) if part in OTHER_PARTS or part == "weight" else None


def _spelled(fmt: KeyFormat, component: str, path: str) -> str:
    for pattern, replacement in fmt.rename.get(component, ()):
        path = re.sub(pattern, replacement, path)
    return path.replace(".", fmt.separator)


def names_table(fmt: KeyFormat, paths: Mapping[str, Sequence[str]]) -> dict[str, StoredModule]:
    """Every name of a format to its module; names that would mean two modules are left out."""
    table: dict[str, StoredModule] = {}
    twice: set[str] = set()
    for component, prefix in fmt.prefixes.items():
        for path in paths.get(component, ()):
            spelled, module = stored_module(fmt, component, path)
            for each in (prefix, *fmt.read_prefixes.get(component, ())):
                if table.setdefault(each + spelled, module) != module:
                    twice.add(each + spelled)
    return {name: place for name, place in table.items() if name not in twice}


def best_format(
    formats: Sequence[KeyFormat], tables: Sequence[Mapping[str, StoredModule]], keys: Mapping[str, Key | None]
) -> int:
    """The format with most keys; between equals, the one whose suffixes and use of alpha agree, then the first."""
    parts = [part for part in keys.values() if part is not None]
    has_alpha = any(part.part == "alpha" for part in parts)

    def score(index: int) -> tuple[int, int, bool]:
        fmt = formats[index]
        known = sum(part.name in tables[index] for part in parts)
        exact = sum(key.endswith((fmt.down, fmt.up)) for key in keys)
        return known, exact, has_alpha == (fmt.alpha is not None)

    return max(range(len(formats)), key=lambda index: (*score(index), -index))


def find_modules(
    formats: Sequence[KeyFormat], paths: Mapping[str, Sequence[str]], keys: Mapping[str, Key | None]
) -> tuple[int, dict[str, StoredModule]]:
    """(index of the format that fits the keys of a file best, the module of every name in them that a format knows).

    Where two formats know a name, the best one decides, then the first.
    """
    tables = [names_table(fmt, paths) for fmt in formats]
    best = best_format(formats, tables, keys)
    names = {part.name for part in keys.values() if part is not None}
    places: dict[str, StoredModule] = {}
    for table in (tables[best], *tables):
        for name in names & table.keys():
            places.setdefault(name, table[name])
    return best, places
