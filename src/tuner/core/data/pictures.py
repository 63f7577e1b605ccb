"""What pixels tell about a picture that its header does not: blur, flatness, and a hash of what it shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from tuner.core.data.images import open_upright, to_rgb
from tuner.core.data.inspect import thread_count
from tuner.core.errors import UsageError

EDGE = 512
"""Pictures are judged at this longer side, so that a large one is not called sharper than a small one."""
HASH_SIDE = 8
FLAT = 3.0
"""Below this deviation of brightness (0..255) a picture is almost one colour; blur and likeness mean nothing then."""
BLURRED, BLURRED_SHARE = 20.0, 0.1
"""A picture is perhaps blurred below this sharpness, or below this share of its source's median."""
ALIKE_BITS = 3
"""Hashes that differ in at most so many of their 64 bits belong to pictures that look alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """sharpness: variance of the Laplacian of the brightness (0..255). spread: deviation of the brightness. hash: 64
    bits, which neighbour of two in a 9 x 8 copy is brighter. grey: whether it has no colours."""

    sharpness: float
    spread: float
    hash: int
    grey: bool

    @property
    def flat(self) -> bool:
        return self.spread < FLAT


def look_at(path: Path) -> Picture | UsageError:
    """Decode and measure one picture; the error when it cannot be decoded."""
    from PIL import Image

    try:
        image, _ = to_rgb(open_upright(path))
    except UsageError as error:
        return error
    image.thumbnail((EDGE, EDGE), Image.Resampling.BOX)
    colours = np.asarray(image, dtype=np.float32)
    grey = np.asarray(image.convert("L"), dtype=np.float32)
    small = np.asarray(image.convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX), dtype=np.int16)
    bits = (small[:, 1:] > small[:, :-1]).reshape(-1)
    return Picture(
        sharpness=_sharpness(grey),
        spread=float(grey.std()),
        hash=int("".join("1" if bit else "0" for bit in bits), 2),
        grey=bool(np.abs(colours - colours.mean(axis=2, keepdims=True)).max() < 4),
    )


def look_at_all(
    paths: Iterable[Path], workers: int | None, on_progress: Callable[[int], None] | None = None
) -> dict[Path, Picture | UsageError]:
    """``look_at`` of many files by threads; on_progress is called with 1 after each."""
    files = list(dict.fromkeys(paths))
    found: dict[Path, Picture | UsageError] = {}
    with ThreadPoolExecutor(max_workers=thread_count(workers)) as pool:
        for path, picture in zip(files, pool.map(look_at, files), strict=True):
            found[path] = picture
            if on_progress is not None:
                on_progress(1)
    return found


def blurred(pictures: Mapping[str, Picture]) -> list[str]:
    """Names of pictures that are perhaps blurred, the worst first."""
    judged = {name: picture.sharpness for name, picture in pictures.items() if not picture.flat}
    if not judged:
        return []
    limit = max(BLURRED, BLURRED_SHARE * median(judged.values()))
    return sorted((name for name, value in judged.items() if value < limit), key=lambda name: judged[name])


def alike(pictures: Mapping[str, Picture]) -> list[list[str]]:
    """Groups of at least two names whose pictures look alike; flat pictures are in none."""
    names = [name for name, picture in pictures.items() if not picture.flat]
    group = {name: name for name in names}

    def home(name: str) -> str:
        while group[name] != name:
            group[name] = group[group[name]]
            name = group[name]
        return name

    for first, second in _candidates([pictures[name].hash for name in names]):
        if (pictures[names[first]].hash ^ pictures[names[second]].hash).bit_count() <= ALIKE_BITS:
            group[home(names[second])] = home(names[first])
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(home(name), []).append(name)
    return [members for members in found.values() if len(members) > 1]


def _candidates(hashes: Sequence[int]) -> set[tuple[int, int]]:
    """Pairs that agree in one of 4 bands of 16 bits: any pair that differs in at most 3 bits does."""
    pairs: set[tuple[int, int]] = set()
    for band in range(ALIKE_BITS + 1):
        bands: dict[int, list[int]] = {}
        for index, value in enumerate(hashes):
            bands.setdefault(value >> (16 * band) & 0xFFFF, []).append(index)
        for members in bands.values():
            # A chain is enough to join equal hashes; all pairs of a crowd would be too many.
            ordered = sorted(members, key=lambda index: hashes[index])
            pairs.update((a, b) for place, a in enumerate(ordered) for b in ordered[place + 1 : place + 17])
    return pairs


def _sharpness(grey: npt.NDArray[np.float32]) -> float:
    if min(grey.shape) < 3:
        return 0.0
    inside = 4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]
    return float(inside.var())
