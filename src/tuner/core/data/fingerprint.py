"""Whether the data is still what a run was started with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.data.plan import PlanItem, Tier


def fingerprint(
    items: Iterable[PlanItem], validation: Iterable[PlanItem], tiers: Sequence[Tier], config: RunConfig
) -> str:
    """Hash of everything that the batches of an epoch depend on, except the seed and the epoch."""
    digest = hashlib.blake2b(digest_size=16)

    def add(value: object) -> None:
        digest.update(json.dumps(value, sort_keys=True, ensure_ascii=True).encode() + b"\n")

    add([config.data.sampling, config.data.short_batches, [[tier.name, tier.batch_size] for tier in tiers]])
    for each in config.data.sets:
        add([each.resize, each.crop.model_dump(mode="json")])
        for source in each.sources:
            settings = {"captions", "augment", "mask"}
            add([source.id, source.model_dump(mode="json", include=settings)])
    for part in (items, validation):
        for item in part:
            record, place = item.record, item.fit
            geometry = [place.bucket, place.resized, place.crop]
            content = [record.digest, record.mask_digest, record.captions_raw]
            add([item.id, *geometry, *content, item.repeats, item.loss_weight, item.sampling_weight])
        add("part")
    return digest.hexdigest()
