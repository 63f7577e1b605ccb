"""Counter-based random numbers: a value depends on (seed, path) alone, never on what was drawn before.

Every random choice of a run is named by a path such as ``("noise", step, item_id)``. That makes a resumed run, another
number of workers and another number of ranks draw the same values without saving any generator state.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")


class Rng:
    """A named stream of random numbers; ``child`` names a sub-stream. Immutable, cheap, safe to send to workers."""

    __slots__ = ("path", "seed")

    def __init__(self, seed: int, *path: str | int) -> None:
        self.seed = seed
        self.path = path

    def __repr__(self) -> str:
        return f"Rng({self.seed}, {', '.join(map(repr, self.path))})"

    def child(self, *path: str | int) -> Rng:
        return Rng(self.seed, *self.path, *path)

    def key(self) -> int:
        """63 bits that identify (seed, path); the parts are length-prefixed so that no two paths collide by joining."""
        digest = hashlib.blake2b(digest_size=8)
        for part in (self.seed, *self.path):
            text = f"{type(part).__name__}:{part}".encode()
            digest.update(len(text).to_bytes(4, "little"))
            digest.update(text)
        return int.from_bytes(digest.digest(), "little") >> 1

    def _python(self) -> random.Random:
        return random.Random(self.key())

    def random(self) -> float:
        """One float in [0, 1)."""
        return self._python().random()

    def integers(self, upper: int) -> int:
        """One integer in [0, upper)."""
        return self._python().randrange(upper)

    def choice(self, options: Sequence[T]) -> T:
        return options[self.integers(len(options))]

    def permutation(self, count: int) -> list[int]:
        order = list(range(count))
        self._python().shuffle(order)
        return order

    def shuffled(self, items: Sequence[T]) -> list[T]:
        return [items[index] for index in self.permutation(len(items))]

    def generator(self) -> torch.Generator:
        """A fresh CPU generator; drawing on the CPU keeps values equal across devices."""
        import torch

        return torch.Generator("cpu").manual_seed(self.key())

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal draws, float32 on the CPU."""
        import torch

        return torch.randn(tuple(shape), generator=self.generator(), dtype=torch.float32)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Uniform draws in [0, 1), float32 on the CPU."""
        import torch

        return torch.rand(tuple(shape), generator=self.generator(), dtype=torch.float32)
