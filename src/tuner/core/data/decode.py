"""Making pixels in worker processes: read, turn upright, resize, crop. The order of the results is that of the jobs."""

from __future__ import annotations

import hashlib
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tuner.core.data.images import load_pixels
from tuner.core.data.looks import Look
from tuner.core.data.probe import ignore_pillow_warnings
from tuner.core.data.records import Fit, ImageRecord
from tuner.core.errors import UsageError

_JOBS_PER_WORKER = 8
"""A worker takes seconds to start, so it is not started for less work than this."""
_AHEAD = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeJob:
    """What is needed to make pixels. mask: ``alpha``, ``file`` or None."""

    record: ImageRecord
    fit: Fit
    resize: str
    look: Look
    mask: str | None


def decode(job: DecodeJob) -> tuple[Tensor, Tensor | None]:
    """Pixels [3,H,W] float32 in -1..1 and mask [H,W] float32 in 0..1, or None when the image has no mask.

    Raises UsageError when a file is not the one that was indexed: its pixels would be stored under a wrong key.
    """
    _check_content(job.record.path, job.record.digest)
    if job.mask == "file" and job.record.mask_path is not None and job.record.mask_digest is not None:
        _check_content(job.record.mask_path, job.record.mask_digest)
    return load_pixels(
        job.record, job.fit, resize=job.resize, crop=job.look.crop, flip=job.look.flip, color=job.look.color,
        mask=job.mask,
    )  # fmt: skip


def decode_all(jobs: Sequence[DecodeJob], workers: int | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """``decode`` for every job. workers: processes; None for one per CPU core, 0 for this process."""
    count = min(_cores() if workers is None else workers, len(jobs) // _JOBS_PER_WORKER)
    if count == 0:
        yield from map(decode, jobs)
        return
    with ProcessPoolExecutor(count, mp_context=_context(), initializer=_start_worker) as pool:
        pending: deque[Future[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]]] = deque()
        try:
            for job in jobs:
                pending.append(pool.submit(_decode_to_arrays, job))
                # A bounded window: decoded images wait for the autoencoder, and memory must not grow meanwhile.
                if len(pending) > count * _AHEAD:
                    yield _tensors(*pending.popleft().result())
            while pending:
                yield _tensors(*pending.popleft().result())
        except BrokenProcessPool as error:
            raise UsageError(
                "a worker process that decodes images died",
                why="the machine ran out of memory, or the calling script lacks 'if __name__ == \"__main__\":'",
                fix="set data.workers.cache to a smaller number, or to 0; what is cached already is kept",
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _check_content(path: Path, digest: str) -> None:
    try:
        found = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    except OSError as error:
        raise UsageError("an image cannot be read", where=str(path), why=error.strerror) from error
    if found != digest:
        raise UsageError(
            "an image changed after it was indexed",
            where=str(path),
            fix='start again: what changed is encoded anew; if this comes back, set cache.verify to "full"',
        )


def _decode_to_arrays(job: DecodeJob) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
    # Arrays travel through the pipe; tensors would need shared memory, which small containers lack.
    pixels, mask = decode(job)
    return pixels.numpy(), None if mask is None else mask.numpy()


def _tensors(pixels: npt.NDArray[np.float32], mask: npt.NDArray[np.float32] | None) -> tuple[Tensor, Tensor | None]:
    return torch.from_numpy(pixels), None if mask is None else torch.from_numpy(mask)


def _start_worker() -> None:
    # The main process decides what Ctrl-C means; a worker that dies of it would look like a crash.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ignore_pillow_warnings()
    torch.set_num_threads(1)


def _context() -> BaseContext:
    """Never fork: the parent may hold a CUDA context and threads."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
