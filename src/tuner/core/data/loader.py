"""Batches in the order of the plan, prepared ahead by background threads.

A batch is a pure function of (plan, seed, epoch, index): threads only decide when it is made, never what is in it. A
thread holds one batch at a time, so memory does not grow with the dataset or the number of items.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tuner.core.data.captions import draw_caption, plain_caption
from tuner.core.data.looks import Look, draw_look
from tuner.core.data.order import PlannedBatch, Visit, epoch_order, validation_order
from tuner.core.rng import Rng
from tuner.core.types import Batch, Item, TextEmbeds

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.data.encode import LatentCache
    from tuner.core.data.plan import DataPlan, PlanItem
    from tuner.core.data.text_cache import TextCache


class BatchLoader:
    """Makes the batches of any epoch from any place.

    text None (``cache.text`` off, or every text component trains): batches carry captions only.
    """

    def __init__(
        self,
        plan: DataPlan,
        config: RunConfig,
        *,
        latents: LatentCache,
        text: TextCache | None,
        seed: int | None = None,
    ) -> None:
        self.plan, self.latents, self.text = plan, latents, text
        self.seed = config.train.seed if seed is None else seed
        self.accumulate = config.train.accumulate
        self.total_steps = plan.total_steps(config.train)
        self.threads = config.data.workers.load
        self.ahead = config.data.prefetch * max(1, self.threads)

    def batches(self, epoch: int, start: int = 0, step: int | None = None) -> Iterator[Batch]:
        """The batches of an epoch (from 0), from index ``start`` on.

        step: updates done before the batch at ``start``; by default as many as a run without changes would have done.
        Raises in the caller what went wrong in a thread. Closing the iterator stops the threads.
        """
        first = epoch * self.plan.steps_per_epoch(self.accumulate) if step is None else step - start // self.accumulate
        order = epoch_order(self.plan, self.seed, epoch)

        def make(index: int) -> Batch:
            return self.batch(order[index], epoch, first + index // self.accumulate)

        return self._ahead(make, range(start, len(order)))

    def validation_batches(self) -> Iterator[Batch]:
        """The held-out items in a fixed order: no flip, no random crop, plain captions."""
        order = validation_order(self.plan)
        return self._ahead(lambda index: self._validation_batch(order[index]), range(len(order)))

    def batch(self, visits: PlannedBatch, epoch: int, step: int) -> Batch:
        """One training batch; ``step`` is the number of updates done before it."""
        items = [self.plan.items[visit.item] for visit in visits]
        rngs = [self._rng(item, epoch, visit) for item, visit in zip(items, visits, strict=True)]
        captions = [
            draw_caption(
                self.plan.sources[item.source].captions, item.record.captions_raw, rng=rng.child("caption"),
                epoch=epoch + 1, step=step, max_steps=self.total_steps,
            )
            for item, rng in zip(items, rngs, strict=True)
        ]  # fmt: skip
        looks = [draw_look(self.plan, item, rng.child("look")) for item, rng in zip(items, rngs, strict=True)]
        return self._joined(items, [visit.visit for visit in visits], captions, looks)

    def _rng(self, item: PlanItem, epoch: int, visit: Visit) -> Rng:
        return Rng(self.seed, "data", "visit", epoch, item.source, item.id, visit.visit)

    def _validation_batch(self, indices: Sequence[int]) -> Batch:
        items = [self.plan.validation[index] for index in indices]
        captions = [plain_caption(self.plan.sources[each.source].captions, each.record.captions_raw) for each in items]
        looks = [draw_look(self.plan, item, Rng(self.seed)) for item in items]
        return self._joined(items, [0] * len(items), captions, looks)

    def _joined(
        self, items: Sequence[PlanItem], visits: Sequence[int], captions: Sequence[str], looks: Sequence[Look]
    ) -> Batch:
        encoded = [self.latents.get(item, look) for item, look in zip(items, looks, strict=True)]
        return Batch(
            latents=torch.stack([latents for latents, _ in encoded]),
            text=TextEmbeds(tensors={}) if self.text is None else self.text.collate(captions),
            loss_mask=_stacked([mask for _, mask in encoded]),
            loss_weight=torch.tensor([item.loss_weight for item in items], dtype=torch.float32),
            items=tuple(
                Item(id=item.id, source=item.source, caption=caption, visit=visit)
                for item, caption, visit in zip(items, captions, visits, strict=True)
            ),
        )

    def _ahead(self, make: Callable[[int], Batch], indices: range) -> Iterator[Batch]:
        if self.threads == 0 or self.ahead == 0:
            yield from map(make, indices)
            return
        with ThreadPoolExecutor(self.threads, thread_name_prefix="batches") as pool:
            pending: deque[Future[Batch]] = deque()
            try:
                for index in indices:
                    pending.append(pool.submit(make, index))
                    if len(pending) > self.ahead:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)


def _stacked(masks: Sequence[Tensor | None]) -> Tensor | None:
    """Masks [B,1,h,w]; an image without one is trained on everywhere. None when no image has a mask."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    return torch.stack([torch.ones_like(given[0]) if mask is None else mask for mask in masks])
