"""Page-locked host memory, which a GPU reads and writes by itself while the host goes on. It has not run on a GPU yet.

Torch's own page-locked memory is rounded up to powers of two; this is as large as it has to be.
"""

from __future__ import annotations

import mmap
import weakref
from typing import Any

import torch
from torch import Tensor

from tuner.core.errors import UsageError


def own_pages(size: int) -> Tensor:
    """``size`` bytes as uint8 at the beginning of a page, in pages that hold nothing else: a page is locked as a whole,
    and only once."""
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)


def page_locked(size: int, where: str) -> Tensor:
    """``size`` bytes as uint8, locked while this very tensor lives. UsageError, which names the configuration key
    ``where``, when the system does not allow it."""
    flat = own_pages(size)
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = flat.data_ptr()
    code = int(cudart.cudaHostRegister(address, size, 0))
    if code != 0:
        raise UsageError(
            f"cannot lock {size / 2**20:.0f} MiB of host memory",
            where=where,
            why=f"CUDA says error {code}",
            fix="keep less in host memory, or allow more locked memory (ulimit -l, or the container's limits)",
        )
    weakref.finalize(flat, _unlock, cudart, address).atexit = False
    return flat


def _unlock(cudart: Any, address: int) -> None:
    # A copy that was asked for ahead, and that nobody came to need, may still read it.
    torch.cuda.synchronize()
    cudart.cudaHostUnregister(address)


class HostCopies:
    """Host copies of tensors by name, for tensors that come and go: page-locked and asynchronous for those on CUDA.

    ``settle`` must be called before the host reads what `put` returned.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self._buffers: dict[object, Tensor] = {}

    def put(self, key: object, value: Tensor) -> Tensor:
        """``value`` in host memory, in the place that it had there before."""
        size = value.numel() * value.element_size()
        if value.device.type != "cuda" or type(value) is not Tensor or size == 0:
            return value.to("cpu")
        flat = self._buffers.get(key)
        if flat is None or flat.numel() != size:
            flat = self._buffers[key] = page_locked(size, self.where)
        host = flat.view(value.dtype).view(value.shape)
        host.copy_(value, non_blocking=True)
        return host
