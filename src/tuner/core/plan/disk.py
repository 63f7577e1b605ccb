"""What a run writes: encoded images and captions, checkpoints, the final file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuner.core.config.base import steps_of
from tuner.core.config.network import SPLITTING
from tuner.core.data.texts import cached_fields
from tuner.core.plan.memory import Trained
from tuner.core.plan.trained import FULL
from tuner.core.plan.weights import BYTES

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.plan.work import Work
    from tuner.core.types import ModelFacts


def latent_bytes(pixels: int, config: RunConfig, facts: ModelFacts) -> int:
    """Encoded images of so many pixels in all."""
    return facts.latent_channels * BYTES[config.cache.dtype] * (pixels // facts.spatial_factor**2)


def text_bytes(count: int, config: RunConfig, facts: ModelFacts) -> int:
    """So many encoded captions, each as long as the limit allows."""
    longest = max(facts.max_tokens.values(), default=1)
    total = 0
    for name in cached_fields(config, facts):
        description = facts.text_fields[name]
        size = BYTES.get(description.dtype, 4)
        if description.dtype in ("float32", "bfloat16"):
            size = BYTES[config.cache.dtype]
        for axis in description.shape:
            size *= longest if isinstance(axis, str) else axis
        total += size
    return total * count


def disk_use(config: RunConfig, facts: ModelFacts, work: Work, trained: Trained) -> dict[str, float]:
    """Bytes by what they are for. Those of captions are an upper limit."""
    kept_in = config.precision.compute if str(config.train.mode) == FULL else config.precision.adapter
    item = BYTES[config.checkpoint.dtype or kept_in]
    exported = trained.stored * item * (2 if config.ema.enabled and config.checkpoint.save_ema else 1)
    if config.network.init in SPLITTING:
        exported *= 2
    kept = _checkpoints(config, work)
    states = {"none": 0, "last": min(kept, 1), "every": kept}[config.checkpoint.state]
    found = {"checkpoints": (kept + 1) * exported + states * trained.saved}
    if work.seen and config.cache.latents == "disk":
        found["encoded images"] = latent_bytes(work.pixels, config, facts)
    if work.seen and config.cache.text == "disk":
        found["encoded captions"] = text_bytes(work.captions, config, facts)
    return found


def _checkpoints(config: RunConfig, work: Work) -> int:
    """How many are there at the end, the last one included."""
    every = config.checkpoint.every
    count = 1
    if every is not None and work.updates is not None:
        per_epoch = max(sum(shape.batches for shape in work.shapes) // config.train.accumulate, 1)
        due = [work.updates] if every.steps is None else [max(steps_of(every.steps, work.updates), 1)]
        due += [] if every.epochs is None else [every.epochs * per_epoch]
        count = max(-(-work.updates // min(due)), 1)
    rolling = config.checkpoint.rolling
    return min(count, config.checkpoint.keep_last or count) + (0 if rolling is None else rolling.keep)
