"""Counts what one training step makes the device do, without doing it.

A denoiser of public size (1024 px, rank-16 adapters on attention and MLPs, bf16) runs under fake tensors while every
operation is counted. Views and allocations cost nothing; any other operation adds the bytes of its inputs and outputs,
broadcast axes once. Matrix products are counted apart (``small`` when an inner or outer size is at most 64: adapters
and matrix-vector products), and so is attention, which fake CPU tensors send to one fused kernel as a GPU would.

    python -m benchmarks.trace [--family anima] [--json] [--size 1024] [--batch 1]
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.families import FAMILIES, fake_step
from benchmarks.models import FULL, build, forward_loss, make_inputs
from tuner.core.memory.checkpointing import LEVELS, apply_checkpointing

SMALL = 64
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addmm_", "baddbmm_"}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
FREE_RESHAPES = {"_unsafe_view", "_reshape_alias", "lift_fresh", "detach", "detach_"}


@dataclass
class Traffic:
    """Bytes by kind, number of operations, and the elementwise bytes of each operation by name."""

    elementwise: int = 0
    small_products: int = 0
    big_products: int = 0
    attention: int = 0
    operations: int = 0
    saved: int = 0
    by_name: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes behind the tensor's elements, axes of stride 0 counted once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride != 0 or size == 0 else 1
    return elements * tensor.element_size()


class Counting(TorchDispatchMode):
    """Adds every operation that runs inside to ``traffic``, and watches the memory that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def alive(self) -> int:
        """Bytes that were made inside and that something still holds."""
        return sum(size for reference, size in self._made.values() if not reference.expired())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {each.untyped_storage()._cdata for each in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in (each.untyped_storage() for each in _tensors(out)):
            if storage._cdata not in given:
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        name = func._schema.name.removeprefix("aten::")
        if not (name in ALLOCATIONS or name in FREE_RESHAPES or _is_view(func)):
            self._count(name, func, args, kwargs or {}, out)
        return out

    def _count(self, name: str, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        # ``out=`` buffers are written only; they appear among the outputs.
        read = [value for key, value in kwargs.items() if key != "out"]
        inputs = list(_tensors((args, read)))
        outputs = list(_tensors(out))
        if not outputs:
            return
        total = sum(map(tensor_bytes, inputs)) + sum(map(tensor_bytes, outputs))
        self.traffic.operations += 1
        self.traffic.counts[name] += 1
        if "scaled_dot_product" in name:
            self.traffic.attention += total
        elif name in PRODUCTS:
            if _is_small(inputs, name):
                self.traffic.small_products += total
            else:
                self.traffic.big_products += total
        else:
            self.traffic.elementwise += total
            self.traffic.by_name[name] += total


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(each.alias_info is not None and not each.alias_info.is_write for each in returns)


def _is_small(inputs: list[Tensor], name: str) -> bool:
    left, right = inputs[-2:]
    return min(left.shape[-2], left.shape[-1], right.shape[-1]) <= SMALL


def trace(*, level: str = "off", size: int = 1024, batch: int = 1, family: str = "anima") -> Traffic:
    """Traffic of forward, loss and backward of the full-size model on ``batch`` square images of ``size`` pixels.

    level: a value of ``memory.checkpointing``.
    """
    with FakeTensorMode():
        loss_of = _anima(level, size, batch) if family == "anima" else _other(family, level, size, batch)
        with Counting() as counting:
            loss = loss_of()
            counting.traffic.saved = counting.alive()
            loss.backward()
    return counting.traffic


def _anima(level: str, size: int, batch: int) -> Callable[[], Tensor]:
    denoiser, _ = build(FULL, torch.bfloat16, "cpu")
    apply_checkpointing(denoiser.blocks, level)
    inputs = make_inputs(FULL, batch, size // 8, size // 8, torch.bfloat16, "cpu")
    return lambda: forward_loss(denoiser, inputs)


def _other(family: str, level: str, size: int, batch: int) -> Callable[[], Tensor]:
    return fake_step(family, level=level, size=size, batch=batch).loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=["anima", *FAMILIES], default="anima", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--size", type=int, default=1024, help="pixels per side (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images per step (default: %(default)s)")
    arguments = parser.parse_args()
    arms = {
        level: trace(level=level, size=arguments.size, batch=arguments.batch, family=arguments.family)
        for level in LEVELS
    }
    if arguments.json:
        print(json.dumps({name: asdict(traffic) for name, traffic in arms.items()}, indent=2))
        return
    print(f"{'level':<16}{'operations':>11}{'elementwise GB':>16}{'small GEMM GB':>15}{'big GEMM GB':>13}"
          f"{'attention GB':>14}{'saved GiB':>11}")  # fmt: skip
    for name, traffic in arms.items():
        print(f"{name:<16}{traffic.operations:>11}{traffic.elementwise / 1e9:>16.1f}"
              f"{traffic.small_products / 1e9:>15.1f}{traffic.big_products / 1e9:>13.1f}"
              f"{traffic.attention / 1e9:>14.1f}{traffic.saved / 2**30:>11.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
