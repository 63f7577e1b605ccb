"""Peak memory of each phase of a run, on the device and in host memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tuner.core.config.network import SPLITTING
from tuner.core.data.texts import live_components
from tuner.core.optim.names import entry_of
from tuner.core.plan.devices import Device
from tuner.core.plan.trained import FULL, component_values, streamed_count, whole_values
from tuner.core.plan.weights import BYTES, Weights, dtype_of, largest_layer, part_bytes
from tuner.core.plan.work import Shape, Work

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.costs import BlockCost, CostRules
    from tuner.core.types import ModelFacts

PROCESS = {"cpu": 0.45e9, "cuda": 1.5e9}
"""Host memory of the program itself: Python, torch and, for a GPU, its libraries."""
IN_FLIGHT = 3
"""Blocks whose gradients are on the device when they go to host memory: one at work, others on their way; as in
`tuner.core.memory.transfers`."""
OPTIMIZER_CHUNK = 1 << 28
"""Bytes of float32 copies while weights in bfloat16 are updated; as in `tuner.core.optim.update`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Bytes at the peak of a phase: tensors on the device, the process in host memory.

    parts: what the device holds. mapped: of host, pages of an open file, which the system takes back when memory is
    short.
    """

    name: str
    device: float
    host: float
    parts: Mapping[str, float] = field(default_factory=dict)
    mapped: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What training adds. values: that the optimizer moves; stored: that a file of them has. weights, gradients, state,
    average: bytes on the device; host: in host memory. saved: bytes of a checkpoint with its state; written: bytes
    in host memory meanwhile."""

    values: int
    stored: int
    weights: float
    gradients: float
    state: float
    average: float
    host: float
    saved: float
    written: float


def phases(
    config: RunConfig,
    facts: ModelFacts,
    costs: CostRules,
    work: Work,
    device: Device,
    weights: Weights,
    trained: Trained,
) -> tuple[Phase, ...]:
    """Every phase that the run has, in its order."""
    found = [
        _encoding(config, facts, costs),
        _latents(config, facts, costs, work),
        _loading(config, costs),
    ]
    step = step_phase(config, facts, costs, work, weights, trained)
    found.append(step)
    if config.sample.enabled and config.sample.prompts:
        found.append(_preview(config, facts, costs, step))
    found.append(_saving(step, trained))
    base = PROCESS["cpu" if device.kind == "cpu" else "cuda"]
    shared = device.kind == "cpu"
    kept = costs.joined * BYTES[config.precision.compute] if shared and not config.quantize.denoiser else 0
    after_loading = ("step", "preview", "save")
    return tuple(
        Phase(
            name=each.name,
            device=0.0 if shared else each.device,
            host=base + each.host + (each.device if shared else 0.0) + (kept if each.name in after_loading else 0.0),
            parts=each.parts,
            mapped=each.mapped,
        )
        for each in found
        if each.device or each.host
    )


def trained_memory(
    config: RunConfig, costs: CostRules, values: int, state_bytes: float, streamed: float = 0
) -> Trained:
    """What the trained values need. state_bytes: of the optimizer per value. streamed: values that live in host memory,
    where their gradients and state are too."""
    full = str(config.train.mode) == FULL
    optimizer = config.optimizer
    item = BYTES[config.precision.compute if full else config.precision.adapter]
    per_value = state_bytes + (2 if optimizer.rounding == "kahan" else 0)
    state = values * per_value
    gradients, sent = _gradients(config, costs, values, streamed, item)
    gradients += _update_copies(config, values, per_value, streamed)
    away = values if optimizer.offload else streamed
    average = 4 * values if config.ema.enabled else 0
    # A start inside the weights is kept beside what trains, and again in checkpoints.
    fixed = 0 if full or config.network.init not in SPLITTING else values * item
    stored = whole_values(config, costs) if full else values
    host = away * per_value + sent + (average if config.ema.device == "cpu" else 0)
    return Trained(
        values=values,
        stored=stored,
        # The model's own weights are counted with the model.
        weights=0 if full else values * item + fixed,
        gradients=gradients,
        state=state - away * per_value,
        average=average if config.ema.device == "accelerator" else 0,
        host=host,
        saved=stored * item + fixed + state + average,
        written=4 * largest_layer(costs.layers()) if full else 2 * (values * item + fixed),
    )


def _gradients(config: RunConfig, costs: CostRules, values: int, streamed: float, item: int) -> tuple[float, float]:
    """Bytes of gradients (on the device, in host memory). Those of an update inside the backward pass exist for one
    part of the model at a time. item: bytes of a trained value."""
    full, fuse, blocks = str(config.train.mode) == FULL, config.optimizer.fuse, streamed_count(config)
    size = 4 if config.precision.gradients == "fp32" else item
    resident = values - streamed
    here, sent = resident * size, streamed * size
    if fuse != "off":
        count = sum(each.count for each in costs.blocks)
        block = max(each.parameters for each in costs.blocks) if full else values // count
        one = largest_layer(costs.layers()) if full else block // 2
        here, sent = item * min(resident, block if fuse == "block" else one), 0
    if streamed:
        here += item * streamed / blocks * min(IN_FLIGHT, blocks)
    return here, sent


def _update_copies(config: RunConfig, values: int, per_value: float, streamed: float) -> float:
    """Bytes on the device beside weights and gradients during an update. per_value: of the optimizer's state."""
    optimizer = config.optimizer
    entry = entry_of(optimizer.name)
    if optimizer.offload and (entry is None or not entry.separate):
        # All of its state comes over for the update.
        return values * per_value
    if optimizer.rounding != "nearest" or optimizer.offload or streamed:
        return min(2 * OPTIMIZER_CHUNK, 8 * values)
    return 0


def step_phase(
    config: RunConfig, facts: ModelFacts, costs: CostRules, work: Work, weights: Weights, trained: Trained
) -> Phase:
    """The training step. Its peak is where most is kept, when the backward pass begins; gradients come after that."""
    item = BYTES[config.precision.compute]
    kept, working = max((activations(config, costs, shape) for shape in work.shapes), key=sum)
    others = sum(
        part_bytes(config, facts, costs, name)
        for name in {*facts.step_components, *config.train.components, *live_components(config, facts)} - {"denoiser"}
    )
    offloaded = kept * item if config.memory.offload_activations != "off" else 0.0
    # With accumulation gradients are there from the second micro-batch on.
    early = trained.gradients if config.train.accumulate > 1 or config.optimizer.fuse != "off" else 0.0
    activity = max(kept * item - offloaded + working * item + early, trained.gradients)
    parts = {
        "weights": weights.device + others,
        "slots of streamed blocks": weights.slots,
        "read back": weights.read_back,
        "adapter": trained.weights,
        "optimizer": trained.state,
        "average": trained.average,
        "activations and gradients": activity,
    }
    return Phase(
        name="step",
        device=sum(parts.values()),
        host=weights.host + trained.host + offloaded,
        parts={name: size for name, size in parts.items() if size},
    )


def activations(config: RunConfig, costs: CostRules, shape: Shape) -> tuple[float, float]:
    """Values (kept, at work) at the worst moment of a backward pass over one micro-batch."""
    image, text = shape.tokens(costs.token), costs.text_rows
    kept, worst = 0.0, (0.0, 0.0)
    batch = shape.batch * (2 if config.guidance.distill and config.guidance.distill.batched else 1)
    for block in costs.blocks:
        kept += _kept(config, block, image, text) * batch
        level = block.levels[config.memory.checkpointing]
        worst = max(worst, (kept, level.work.of(image, text) * batch), key=sum)
    return worst


def _kept(config: RunConfig, block: BlockCost, image: int, text: int) -> float:
    """Values that ``count`` blocks keep, every n-th of them recomputed."""
    memory = config.memory
    every = memory.checkpoint_every if memory.checkpointing != "off" else 1
    recomputed = -(-block.count // every)
    plain = block.levels["off"].kept.of(image, text) * (block.count - recomputed)
    return plain + block.levels[memory.checkpointing].kept.of(image, text) * recomputed


# --- the other phases -------------------------------------------------------------------------------------------------


def _encoding(config: RunConfig, facts: ModelFacts, costs: CostRules) -> Phase:
    """Captions: all encoders whose output is cached, at once."""
    names = [name for name in facts.text_components if name not in live_components(config, facts)]
    if not names:
        return Phase(name="captions", device=0, host=0)
    at_host = [name for name in names if config.text_encoder.device.get(name) == "cpu"]
    on_device = [name for name in names if name not in at_host]
    weights = sum(part_bytes(config, facts, costs, name) for name in on_device)
    tokens = max(facts.max_tokens.values(), default=0) * config.cache.text_batch_size
    busy = {name: costs.parts[name].work * BYTES[dtype_of(config, facts, name)] * tokens for name in names}
    working = max((busy[name] for name in on_device), default=0)
    resident = sum(part_bytes(config, facts, costs, name) for name in at_host)
    return Phase(
        name="captions",
        device=weights + working,
        host=resident
        + max(
            max((busy[name] for name in at_host), default=0),
            max((part_bytes(config, facts, costs, name, stored=False) for name in on_device), default=0),
        ),
        parts={"weights": weights, "at work": working},
    )


def _latents(config: RunConfig, facts: ModelFacts, costs: CostRules, work: Work) -> Phase:
    if config.cache.latents == "off":
        return Phase(name="latents", device=0, host=0)
    weights = part_bytes(config, facts, costs, "vae")
    pixels = max(at_once(config, shape.width, shape.height) for shape in work.shapes)
    together = 1 if (config.latents.posterior or facts.posterior) == "sample" else config.cache.vae_batch_size
    working = costs.parts["vae"].work * BYTES[dtype_of(config, facts, "vae")] * pixels * together
    return Phase(name="latents", device=weights + working, host=weights, parts={"weights": weights, "at work": working})


def _loading(config: RunConfig, costs: CostRules) -> Phase:
    """The denoiser from its file. Mapped pages of the file count as the process's until the file is closed; what is
    quantized or streamed goes through host memory in full."""
    # Files hold two bytes per value as a rule.
    mapped = 2 * component_values(costs, "denoiser") if config.model.mmap else 0
    through_host = config.quantize.denoiser is not None or bool(config.memory.swap_blocks)
    whole = BYTES[config.precision.compute] * component_values(costs, "denoiser")
    return Phase(
        name="loading",
        device=0 if through_host else whole,
        host=mapped + (whole if through_host else 0),
        parts={} if through_host else {"weights": whole},
        mapped=mapped,
    )


def _preview(config: RunConfig, facts: ModelFacts, costs: CostRules, step: Phase) -> Phase:
    """Pictures while training: beside the weights, first the denoiser without gradients, then the autoencoder."""
    pictures = picture_bytes(config, facts, costs, config.sample.size or facts.sample.size)
    resident = step.device - step.parts.get("activations and gradients", 0)
    return Phase(
        name="preview",
        device=resident + pictures,
        host=step.host,
        parts={"weights and training": resident, "autoencoder and picture": pictures},
    )


def picture_bytes(config: RunConfig, facts: ModelFacts, costs: CostRules, size: tuple[int, int]) -> float:
    """What one picture of (width, height) needs beside the weights: the denoiser at work, then the autoencoder."""
    width, height = size
    image = Shape(width=width, height=height, batch=1).tokens(costs.token)
    running = max(block.levels["block"].work.of(image, costs.text_rows) for block in costs.blocks) / 2
    decoder = costs.parts["vae"].decode_work * BYTES[dtype_of(config, facts, "vae")] * at_once(config, width, height)
    return max(running * BYTES[config.precision.compute], part_bytes(config, facts, costs, "vae") + decoder)


def at_once(config: RunConfig, width: int, height: int) -> int:
    """Pixels that the autoencoder works on together."""
    tile = config.latents.tiling
    return width * height if tile is None else min(width, tile) * min(height, tile)


def _saving(step: Phase, trained: Trained) -> Phase:
    """A checkpoint: an adapter is put together in host memory; whole models and states are written tensor by tensor."""
    resident = step.device - step.parts.get("activations and gradients", 0)
    host = step.host + trained.written
    return Phase(name="save", device=resident, host=host, parts={"weights and training": resident})
