"""``train``, ``precision``, ``memory``: what trains, for how long, and in which arithmetic."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tuner.core.config.base import Count, CountOrZero, Dtype, Positive, Section, StepCount


class ClipGrad(Section):
    """Limit on gradients: one of the two."""

    norm: Positive | None = None
    """Largest norm over all gradients."""
    value: Positive | None = None
    """Largest absolute value of an element."""

    @model_validator(mode="after")
    def _one(self) -> ClipGrad:
        if (self.norm is None) == (self.value is None):
            raise ValueError("give norm or value")
        return self


class TrainConfig(Section):
    """What trains and for how long. A step is one optimizer update."""

    mode: Literal["lora", "full"] = "lora"
    """Train an adapter and keep the base frozen, or train the weights themselves. Those are kept and updated in
    ``precision.compute``; see ``optimizer.rounding`` for bfloat16."""
    components: tuple[str, ...] = Field(("denoiser",), min_length=1)
    """Parts of the model that train."""
    steps: Count | None = None
    """Length in updates; give this or ``epochs``."""
    epochs: Count | None = None
    """Length in passes over the data; give this or ``steps``."""
    batch_size: Count = 1
    """Images per micro-batch, for sets that do not name their own."""
    accumulate: Count = 1
    """Micro-batches per update. The loss is the mean over all samples of the update."""
    clip_grad: ClipGrad | None = ClipGrad(norm=1.0)
    """Limit on gradients; null for none."""
    freeze: tuple[str, ...] = ()
    """Full training: regular expressions of parameters that do not train; each must match a whole name,
    ``component:path``. ``bitfit`` freezes all but the biases."""
    stop_component_at: dict[str, StepCount] = Field(default_factory=dict)
    """By component: the update, or the share of the run, from which on it no longer trains."""
    seed: int = Field(0, ge=0)
    """Every random choice follows from it."""
    cpu_threads: Count | None = None
    """Threads of CPU arithmetic. Left out: what torch chooses."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self


class PrecisionConfig(Section):
    """Dtypes."""

    compute: Dtype = "bf16"
    """Arithmetic of the denoiser and storage of its frozen weights."""
    adapter: Dtype = "fp32"
    """Storage of the adapter's weights."""
    vae: Dtype | None = None
    """The image autoencoder. Left out: the model's own choice."""
    text_encoder: dict[str, Dtype] = Field(default_factory=dict)
    """Text encoders by name. Left out: the model's own choice."""
    gradients: Literal["weights", "fp32"] = "weights"
    """Dtype in which the micro-batches of an update are added up. ``fp32`` is for weights that train in bfloat16: the
    sum is rounded once, or with ``optimizer.rounding`` not at all, and takes four bytes per value."""
    tf32: bool = True
    """Multiply float32 matrices in TF32 on NVIDIA GPUs from Ampere on: faster, with 10 bits of mantissa in place of 23.
    Nothing changes for products in bfloat16 and on other devices. Not run on a GPU by this project yet."""


class MemoryConfig(Section):
    """Trading time for memory."""

    checkpointing: Literal["off", "block", "keep_attention", "selective"] = "off"
    """What blocks compute again in the backward pass instead of keeping it. ``block``: everything but their inputs.
    ``keep_attention``: that, with the results of attention kept. ``selective``: with those of all matrix products kept
    too, so that only norms, rotations, activations and the like run again."""
    checkpoint_every: Count = 1
    """Recompute every n-th block only, from the first on."""
    offload_activations: Literal["off", "sync", "async"] = "off"
    """Hold the inputs of recomputed blocks in host memory; ``async`` copies them while the device computes."""
    swap_blocks: CountOrZero = 0
    """Blocks whose weights live in host memory and are brought to the device for each pass, up to all but two. Three of
    them have room on the device at a time. With ``train.mode`` ``full`` their optimizer state lives in host memory too,
    and without ``optimizer.fuse`` their gradients."""
    empty_cache_every: Count | None = None
    """Give unused memory of the allocator back to the device every n updates. Costs time; it can help where another
    program needs the memory, or where sizes vary much."""
