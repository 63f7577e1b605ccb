"""What may differ between a run and its continuation: how long, what is shown, what is kept, how it is worked on."""

from __future__ import annotations

FREE_ON_RESUME = (
    "train.steps", "train.epochs", "train.cpu_threads", "sample", "validate.every", "validate.max_batches",
    "validate.pool", "validate.timesteps", "log", "checkpoint", "memory", "compile",
    "text_encoder.device", "cache.dir", "cache.verify", "data.workers", "data.prefetch",
)  # fmt: skip


def free_on_resume(key: str) -> bool:
    """Whether a dotted key, or a section around it, may change when a run goes on."""
    return any(key == free or key.startswith(f"{free}.") for free in FREE_ON_RESUME)
