"""The prediction of a whole run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tuner.core.errors import UsageError
from tuner.core.optim.names import entry_of
from tuner.core.plan.devices import Device
from tuner.core.plan.disk import disk_use
from tuner.core.plan.memory import Phase, phases, trained_memory
from tuner.core.plan.time import update_seconds
from tuner.core.plan.trained import streamed_count, trained_values, whole_values
from tuner.core.plan.weights import BYTES, denoiser_weights
from tuner.core.plan.work import Work
from tuner.core.track.progress import byte_size, duration

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.costs import CostRules
    from tuner.core.types import ModelFacts

SLACK = 0.03
"""Share of the tensors that the allocator loses between them."""
UNKNOWN_STATE = 8.0
"""Bytes per value assumed for an optimizer that nothing is known about: two float32 numbers, as AdamW."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is predicted. Bytes and seconds.

    device: name; memory: of it, None when it is not known; overhead: what driver and libraries take of it. phases: in
    the order of the run. seconds: of one update, None without known rates; updates: of the whole run, None when its
    data was not there. trained: values that the optimizer moves. disk: bytes by what they are for. notes: what the
    numbers do not include, or assume.
    """

    device: str
    memory: float | None
    overhead: float
    phases: tuple[Phase, ...]
    seconds: float | None
    updates: int | None
    trained: int
    disk: Mapping[str, float]
    notes: tuple[str, ...]

    @property
    def peak(self) -> float:
        """Tensors on the device at the worst moment."""
        return max((each.device for each in self.phases), default=0.0)

    @property
    def host(self) -> float:
        """The largest memory of the process, pages of open files included."""
        return max((each.host for each in self.phases), default=0.0)

    @property
    def host_needed(self) -> float:
        """Host memory that has to be there: without the pages of files, which give way when memory is short."""
        return max((each.host - each.mapped for each in self.phases), default=0.0)

    def phase(self, name: str) -> Phase:
        return next(each for each in self.phases if each.name == name)

    def needed(self, phase: Phase | None = None) -> float:
        """Memory that the device must have free: tensors, the allocator's losses, and what driver and libraries take.

        phase: of that phase alone, else of the whole run.
        """
        tensors = self.peak if phase is None else phase.device
        return tensors * (1 + SLACK) + self.overhead if tensors else 0.0

    @property
    def run_seconds(self) -> float | None:
        """All updates together; caching, samples and validation not included."""
        return None if self.seconds is None or self.updates is None else self.seconds * self.updates

    def line(self) -> str:
        """The prediction in one line."""
        parts = []
        if self.peak:
            parts.append(
                f"{byte_size(self.phase('step').device)} on the device in a step, {byte_size(self.peak)} at most"
            )
        parts.append(f"{byte_size(self.host)} of host memory")
        if self.seconds is not None:
            parts.append(f"{self.seconds:.2f} s per step")
        if self.run_seconds is not None:
            parts.append(f"{duration(self.run_seconds)} in all")
        return ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            **asdict(self),
            "phases": {
                each.name: {"device": each.device, "host": each.host, "mapped": each.mapped, "parts": dict(each.parts)}
                for each in self.phases
            },
            "disk": dict(self.disk),
            "peak": self.peak,
            "needed": self.needed(),
            "host": self.host,
            "host_needed": self.host_needed,
            "run_seconds": self.run_seconds,
        }


def predict(config: RunConfig, facts: ModelFacts, work: Work, device: Device, *, trained: int | None = None) -> Plan:
    """The plan of a run on a device. trained: values that the optimizer moves, where the caller has counted them.

    UsageError when the model's plugin does not tell what it costs, and for adapter patterns that match nothing.
    """
    costs = costs_of(facts)
    state, known = optimizer_state(config)
    weights = denoiser_weights(config, facts, costs)
    values = trained_values(config, facts, costs) if trained is None else trained
    streamed = 0.0
    if streamed_count(config):
        # Frozen ones among them are taken to be spread evenly.
        streamed = weights.host / BYTES[config.precision.compute] * values / whole_values(config, costs)
    added = trained_memory(config, costs, values, state, streamed)
    return Plan(
        device=device.name,
        memory=device.memory,
        overhead=device.overhead,
        phases=phases(config, facts, costs, work, device, weights, added),
        seconds=update_seconds(config, costs, work, device, weights, values, state, streamed),
        updates=work.updates,
        trained=values,
        disk=disk_use(config, facts, work, added),
        notes=tuple(_notes(config, facts, work, known)),
    )


def costs_of(facts: ModelFacts) -> CostRules:
    """The costs that a model declares."""
    if facts.costs is None:
        raise UsageError(
            f"no plan for the model {facts.family!r}",
            why="its plugin does not declare what the model costs (ModelFacts.costs)",
            fix="ask the plugin's author; training works without a plan",
        )
    return facts.costs


def optimizer_state(config: RunConfig) -> tuple[float, bool]:
    """(bytes of optimizer state per trained value, whether that is known)."""
    entry = entry_of(config.optimizer.name)
    return (UNKNOWN_STATE, False) if entry is None else (float(entry.bytes), True)


def _notes(config: RunConfig, facts: ModelFacts, work: Work, known: bool) -> list[str]:
    notes = []
    if not work.seen:
        notes.append("the pictures are not here: one size per resolution is assumed, and no space for caches")
    if not facts.files:
        absent = f"{work.absent} is not here" if work.absent else "the weights are not here"
        notes.append(f"{absent}: sizes are those of the published model {facts.flavour!r}")
    if not known:
        notes.append(f"nothing is known about the state of {config.optimizer.name!r}: that of AdamW is assumed")
    live = set(config.train.components) - {"denoiser"}
    if live:
        notes.append(f"activations of {', '.join(sorted(live))} are not included")
    if config.network.rank == "from_file":
        notes.append("the ranks are in a file: rank 16 is assumed")
    return notes
