"""Host memory that can be locked: in pages of its own, from their beginning."""

from __future__ import annotations

import mmap

import torch

from tuner.core.compute.pinned import HostCopies, own_pages


def test_buffers_share_no_page() -> None:
    buffers = [own_pages(size) for size in (1, 100, mmap.PAGESIZE, 3 * mmap.PAGESIZE + 1)]
    pages = [
        set(range(flat.data_ptr() // mmap.PAGESIZE, (flat.data_ptr() + flat.numel() - 1) // mmap.PAGESIZE + 1))
        for flat in buffers
    ]
    assert [flat.numel() for flat in buffers] == [1, 100, mmap.PAGESIZE, 3 * mmap.PAGESIZE + 1]
    assert all(flat.data_ptr() % mmap.PAGESIZE == 0 and flat.storage_offset() == 0 for flat in buffers)
    assert len(set.union(*pages)) == sum(map(len, pages))
    for number, flat in enumerate(buffers):
        flat.fill_(number)
    assert [int(flat.float().mean()) for flat in buffers] == [0, 1, 2, 3]


def test_what_is_in_host_memory_is_not_copied() -> None:
    value = torch.ones(3)
    assert HostCopies("optimizer.offload").put("value", value) is value
