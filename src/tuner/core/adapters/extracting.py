"""A LoRA that says what a tuned checkpoint has learned: the difference of two checkpoints, at low rank.

    W_tuned - W_base ~ up down        truncated SVD in float32, the singular values shared between the factors

Only one pair of matrices is in memory at a time. What a LoRA cannot hold, changed biases and norms, is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tuner.core.adapters.bases import Parameters
from tuner.core.adapters.combining import Layer
from tuner.core.adapters.formats import split_module
from tuner.core.adapters.low_rank import factors_of
from tuner.core.adapters.spelling import StoredModule, stored_module
from tuner.core.adapters.streams import silent
from tuner.core.adapters.targets import compiled
from tuner.core.compute.dtypes import all_finite
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.adapters.low_rank import Wanted
    from tuner.core.types import KeyFormat, KeyMaps


@dataclass(frozen=True, slots=True, kw_only=True)
class Extracted:
    """tensors: internal. unchanged: modules that are equal in both. rest: parameters with changes that were left out.

    kept: share of the squared norm of all changes, those of ``rest`` included, that the adapter holds.
    """

    tensors: dict[str, Tensor]
    layers: list[Layer]
    unchanged: int
    rest: tuple[str, ...]
    kept: float


@torch.no_grad()
def extract(
    base: Parameters,
    tuned: Parameters,
    maps: KeyMaps,
    fmt: KeyFormat,
    wanted: Wanted,
    *,
    only: Sequence[str] = (),
    device: str = "cpu",
    progress: Callable[[int, int], None] = silent,
) -> Extracted:
    """The adapter that makes ``tuned`` out of ``base``, for every linear that the model's formats know.

    fmt: linears that it joins share one down of the wanted rank. only: full-match patterns on ``component:path`` or
    ``path``. progress: gets how many modules are done, and of how many. UsageError: checkpoints of different sizes,
    patterns that match nothing, or no difference at all.
    """
    both = [name for name in base if name in tuned]
    _same_sizes(base, tuned, both)
    modules = _chosen(list(_modules(base, both, maps, fmt)), only)
    tensors: dict[str, Tensor] = {}
    layers: list[Layer] = []
    held = total = 0.0
    used: set[str] = set()
    for number, (name, place) in enumerate(modules):
        names = [f"{place.component}:{path}.weight" for path in place.paths]
        used.update(names)
        delta = _delta(base, tuned, names, device)
        if not all_finite(delta):
            raise UsageError(f"{name} is not finite in one of the checkpoints", fix="use checkpoints that work")
        if bool(delta.any()):
            found = factors_of(delta.flatten(1), wanted)
            held += found.norm**2 * found.kept
            total += found.norm**2
            layers.append(
                Layer(
                    name=name, rank=found.rank, old_rank=min(delta.flatten(1).shape), kept=found.kept, norm=found.norm
                )
            )
            ones = (1,) * (delta.ndim - 2)
            parts = {
                "down": found.down.reshape(found.rank, *delta.shape[1:]).cpu(),
                "up": found.up.reshape(delta.shape[0], found.rank, *ones).cpu(),
                "alpha": torch.tensor(float(found.rank)),
            }
            tensors |= split_module(place, parts, name)
        progress(number + 1, len(modules))
    rest = {name: norm for name in both if name not in used and (norm := _difference(base, tuned, name))}
    total += sum(rest.values())
    if not layers:
        raise UsageError(
            "the checkpoints do not differ where an adapter could hold it",
            why=f"{len(modules)} matrices are equal, {len(rest)} other parameters differ",
        )
    return Extracted(
        tensors=tensors,
        layers=layers,
        unchanged=len(modules) - len(layers),
        rest=tuple(rest),
        kept=held / total,
    )


def _delta(base: Parameters, tuned: Parameters, names: Sequence[str], device: str) -> Tensor:
    """What was learned in some matrices, one below the other, in float32: the only copy that is made."""
    shapes = [base.shape(name) for name in names]
    delta = torch.empty((sum(shape[0] for shape in shapes), *shapes[0][1:]), device=device)
    for rows, name in zip(torch.split(delta, [shape[0] for shape in shapes]), names, strict=True):
        rows.copy_(tuned.read(name))
        rows.sub_(base.read(name).to(device))
    return delta


def _modules(
    base: Parameters, both: Collection[str], maps: KeyMaps, fmt: KeyFormat
) -> Iterator[tuple[str, StoredModule]]:
    """The matrices that an adapter may change, joined as the format joins them."""
    linears = {name.removesuffix(".weight") for name in both if name.endswith(".weight") and len(base.shape(name)) > 1}
    seen: set[str] = set()
    for component, paths in maps.paths([name.replace(":", ".") for name in linears]).items():
        for path in paths:
            if f"{component}:{path}" not in linears or component not in fmt.prefixes or f"{component}:{path}" in seen:
                continue
            spelled, place = stored_module(fmt, component, path)
            if any(f"{component}:{each}" not in linears for each in place.paths):
                place = StoredModule(component, (path,))
            # Rows stand in our order here; the format's is made when the file is written.
            place = StoredModule(component, place.paths, place.rows)
            seen.update(f"{component}:{each}" for each in place.paths)
            yield fmt.prefixes[component] + spelled, place


def _chosen(modules: list[tuple[str, StoredModule]], only: Sequence[str]) -> list[tuple[str, StoredModule]]:
    if not only:
        return modules
    patterns = [compiled(pattern, "--only") for pattern in only]
    found: list[tuple[str, StoredModule]] = []
    used: set[str] = set()
    for name, place in modules:
        names = [text for path in place.paths for text in (f"{place.component}:{path}", path)]
        matching = [pattern.pattern for pattern in patterns if any(map(pattern.fullmatch, names))]
        used.update(matching)
        if matching:
            found.append((name, place))
    unused = [pattern for pattern in only if pattern not in used]
    if unused:
        raise UsageError(f"the pattern {unused[0]!r} matches no matrix of the checkpoints", where="--only")
    return found


def _same_sizes(base: Parameters, tuned: Parameters, both: Collection[str]) -> None:
    different = next((name for name in both if base.shape(name) != tuned.shape(name)), None)
    if different is not None:
        raise UsageError(
            "the checkpoints are of different models",
            why=f"{different} has shape {list(base.shape(different))} and {list(tuned.shape(different))}",
        )
    for one, other, which in ((base, tuned, "tuned"), (tuned, base, "base")):
        missing = sorted(name for name in one if name not in other and name.startswith("denoiser:"))
        if missing:
            raise UsageError(
                f"the {which} checkpoint lacks {missing[0]}",
                why=f"{len(missing)} tensors of the other are not in it",
                fix="compare checkpoints of one model",
            )


def _difference(base: Parameters, tuned: Parameters, name: str) -> float:
    return float((tuned.read(name).double() - base.read(name).double()).square().sum())
