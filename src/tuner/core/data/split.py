"""Which samples are held out for validation, and which make up a limited source."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

Sample = tuple[str, str]
"""(source id, content digest of the image)."""


def _position(*parts: str | int) -> float:
    """A number in [0, 1) that depends on the parts alone."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def split_validation(samples: Iterable[Sample], share: float, seed: int) -> frozenset[Sample]:
    """The samples held out for validation: those whose hash of (seed, source, content) lies below ``share``.

    A sample's side does not depend on the others, so it stays when images are added, and copies of one image in a
    source stay together. The exception: for 0 < share < 1 each side gets at least one of two or more samples.
    """
    unique = sorted(set(samples), key=lambda sample: (_position("validation", seed, *sample), sample))
    held_out = [sample for sample in unique if _position("validation", seed, *sample) < share]
    if 0 < share < 1 and len(unique) > 1:
        count = min(max(len(held_out), 1), len(unique) - 1)
        held_out = unique[:count]
    return frozenset(held_out)


def own_draw(source: str, digest: str) -> float:
    """A number in [0, 1) that an image of a source keeps over runs."""
    return _position("own", source, digest)


def limited(source: str, digests: Sequence[str], limit: int | None) -> list[int]:
    """Indices of the fixed random subset of ``limit`` images of a source, in the original order."""
    if limit is None or limit >= len(digests):
        return list(range(len(digests)))
    ranked = sorted(range(len(digests)), key=lambda index: (_position("limit", source, digests[index]), index))
    return sorted(ranked[:limit])
