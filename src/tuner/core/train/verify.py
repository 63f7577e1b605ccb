"""``tuner verify``: whether each thing that saves time or memory here leaves the loss and the gradients as they are.

The yardstick is the model itself: the same step with its noisy input changed by half a unit in the last place of the
arithmetic's dtype. What differs by no more than a few times that differs by rounding.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tuner.core.adapters.network import adapter_eval, adapter_layers
from tuner.core.compute.attention_kernels import check_attention
from tuner.core.compute.dtypes import dtype_by_name
from tuner.core.compute.quantized import multiplying
from tuner.core.data.plan import plan_data
from tuner.core.errors import UsageError
from tuner.core.registry import open_run
from tuner.core.train.blocks import prepare_blocks
from tuner.core.train.caching import Caches
from tuner.core.train.compiling import check_compile, compiler, token_counts
from tuner.core.train.device import empty_cache, pick_device
from tuner.core.train.measure import losses_and_gradient, shake
from tuner.core.train.quantizing import check_quantize
from tuner.core.train.run import cache_folder, set_torch

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.data.plan import DataPlan
    from tuner.core.registry import Run
    from tuner.core.types import Batch

BATCHES = 2
ROUNDING = 4.0
"""How many times the yardstick still counts as rounding: every operation rounds, the yardstick's input only once."""
TF32_EPS = 2.0**-10
LEAST = 4 * torch.finfo(torch.float32).eps
"""Smallest yardstick: the loss is a float32 sum, which two inputs can share to the last bit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lever:
    """Keys of one section that change how a step is computed and not what it computes, with their neutral values."""

    name: str
    section: str
    neutral: Mapping[str, Any]
    exact: bool = True

    def active(self, config: RunConfig) -> bool:
        section = getattr(config, self.section)
        return any(getattr(section, key) != value for key, value in self.neutral.items())

    def neutralised(self, config: RunConfig) -> RunConfig:
        return self._changed(config, self.neutral)

    def taken_from(self, config: RunConfig, plain: RunConfig) -> RunConfig:
        """``plain`` with this lever as in ``config``."""
        return self._changed(plain, {key: getattr(getattr(config, self.section), key) for key in self.neutral})

    def _changed(self, config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
        section = getattr(config, self.section).model_copy(update=dict(values))
        return config.model_copy(update={self.section: section})


LEVERS = (
    Lever(name="streamed blocks", section="memory", neutral={"swap_blocks": 0}),
    Lever(
        name="recomputed blocks",
        section="memory",
        neutral={"checkpointing": "off", "checkpoint_every": 1, "offload_activations": "off"},
    ),
    Lever(name="attention", section="attention", neutral={"backend": "sdpa", "split": False, "fuse_qkv": True}),
    Lever(
        name="compiled blocks",
        section="compile",
        neutral={"enabled": False, "backend": "inductor", "mode": "default", "dynamic": "auto"},
    ),
    Lever(name="quantized arithmetic", section="quantize", neutral={"activations": None}, exact=False),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to compute the step against the plain way.

    loss: largest relative difference of a batch's loss. gradient: norm of the gradient's difference, relative.
    seconds: of the compared steps, without loading. allowed: limits of the two. ok: within both.
    """

    name: str
    loss: float
    gradient: float
    seconds: float
    allowed: tuple[float, float]
    ok: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """floor: the yardstick as (loss, gradient). plain_seconds: of the plain steps."""

    device: str
    batches: int
    plain_seconds: float
    floor: tuple[float, float]
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def verify(raw: Mapping[str, Any], *, base_dir: Path | None = None) -> Verification:
    """Compare the configured way to compute a step with plain execution, on this device and this data.

    Encodes what is not cached yet. Every way loads the model anew, so only one is in memory at a time. UsageError for
    what `train` would refuse, and when plain execution does not fit into memory.
    """
    run = open_run(raw, base_dir=base_dir)
    config = run.config
    set_torch(config)
    device = pick_device()
    check_quantize(config, device)
    check_compile(config, device)
    check_attention(config, run.facts, device)
    plan = plan_data(config, run.facts)
    with cache_folder(config):
        caches = Caches(run, plan, device, None)
        caches.fill()
        batches = list(islice(caches.data.loader().batches(0), BATCHES))
    plain = config
    for lever in LEVERS:
        plain = lever.neutralised(plain)
    try:
        base = _measure(open_run(plain), plan, batches, device, prepared=False)
    except torch.OutOfMemoryError as error:
        raise UsageError(
            "plain execution does not fit into this device's memory",
            why="every way is compared with it",
            fix="make it smaller for this check: --set train.batch_size=1, or a lower resolution of the data",
        ) from error
    nudged = _measure(open_run(plain), plan, batches, device, prepared=False, nudge=_half_ulp(config, device))
    loss, gradient = base.difference(nudged)
    floor = max(loss, LEAST), max(gradient, LEAST)
    rows = []
    for name, variant, exact in _variants(config, plain):
        found = _measure(open_run(variant), plan, batches, device)
        loss, gradient = base.difference(found)
        parity = config.quantize.parity
        limits = (ROUNDING * floor[0], ROUNDING * floor[1]) if exact else (parity.loss, parity.gradient)
        # Written so that a result that is not a number fails.
        ok = loss <= limits[0] and gradient <= limits[1]
        rows.append(Row(name=name, loss=loss, gradient=gradient, seconds=found.seconds, allowed=limits, ok=ok))
    return Verification(
        device=str(device), batches=len(batches), plain_seconds=base.seconds, floor=floor, rows=tuple(rows)
    )


def _half_ulp(config: RunConfig, device: torch.device) -> float:
    """Largest relative error of a number that takes part in a product."""
    dtype = dtype_by_name(config.precision.compute)
    if dtype == torch.float32 and config.precision.tf32 and device.type == "cuda":
        return TF32_EPS / 2
    return torch.finfo(dtype).eps / 2


def _variants(config: RunConfig, plain: RunConfig) -> Iterator[tuple[str, RunConfig, bool]]:
    """(name, configuration, whether only rounding may differ): each active lever alone, then all as configured."""
    active = [lever for lever in LEVERS if lever.active(config)]
    for lever in active:
        yield lever.name, lever.taken_from(config, plain), lever.exact
    if len(active) != 1:
        yield "all as configured", config, all(lever.exact for lever in active)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    losses: list[float]
    gradient: Tensor
    seconds: float

    def difference(self, other: _Measured) -> tuple[float, float]:
        loss = max(abs(now - before) / before for now, before in zip(other.losses, self.losses, strict=True))
        return loss, float((other.gradient - self.gradient).norm() / self.gradient.norm())


def _measure(
    run: Run, plan: DataPlan, batches: Sequence[Batch], device: torch.device, *, prepared: bool = True, nudge: float = 0
) -> _Measured:
    """The step of ``run`` with an adapter that acts. prepared: with everything that a run does to the blocks."""
    try:
        with compiler(run.config):
            return _measure_loaded(run, Caches(run, plan, device, None), batches, device, prepared, nudge)
    finally:
        gc.collect()
        empty_cache(device)


def _measure_loaded(
    run: Run, caches: Caches, batches: Sequence[Batch], device: torch.device, prepared: bool, nudge: float
) -> _Measured:
    models = caches.load_for_steps()
    network = run.model.build_network(models)
    if prepared:
        tokens = token_counts(caches.plan, (), run.facts)
        prepare_blocks(models, adapter_layers(network), run.config, run.facts, device, tokens)
    shake(network, run.config.train.seed)
    parameters = [each for group in network.param_groups for each in group.params.values() if each.requires_grad]
    denoiser, arithmetic = models.denoiser, run.config.quantize.activations
    assert denoiser is not None
    with adapter_eval(network), multiplying(denoiser, arithmetic) if arithmetic else nullcontext():
        started = time.perf_counter()
        losses, gradient = losses_and_gradient(
            run.model,
            models,
            batches,
            parameters,
            text=lambda batch: caches.text(models, [item.caption for item in batch.items]),
            device=device,
            seed=run.config.train.seed,
            nudge=nudge,
        )
        gradient = gradient.cpu()
        seconds = time.perf_counter() - started
    return _Measured(losses=losses, gradient=gradient, seconds=seconds)
