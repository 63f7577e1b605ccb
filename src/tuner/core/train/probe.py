"""A run against its plan: the first updates correct the prediction, the end tells how far off it was."""

from __future__ import annotations

import logging
import statistics
import sys
from typing import TYPE_CHECKING

import torch

from tuner.core.errors import UsageError
from tuner.core.plan.devices import CPU, Device, device_like
from tuner.core.plan.plan import Plan, predict
from tuner.core.plan.work import work_of_plan
from tuner.core.track.progress import byte_size, duration, process_memory

if TYPE_CHECKING:
    from tuner.core.data.plan import DataPlan
    from tuner.core.registry import Run
    from tuner.core.track.events import EventLog

log = logging.getLogger(__name__)

STEPS = 3
"""Updates that correct the plan. The first one also warms up, so its time does not count where there are others."""


class Probe:
    """Follows a run. ``plan`` is None for a model that declares no costs: then it only measures."""

    def __init__(self, run: Run, data: DataPlan, device: torch.device, events: EventLog) -> None:
        self.device, self.events, self.total = device, events, data.total_steps(run.config.train)
        self.plan: Plan | None = None
        # What the device's peak is made of: pictures between the updates take more than an update may.
        self.phases = ("step", "preview") if run.config.sample.every is not None else ("step",)
        self.seconds: list[float] = []
        self.all_seconds = 0.0
        try:
            self.plan = predict(run.config, run.facts, work_of_plan(data, run.config), plan_device(device))
        except UsageError as error:
            log.info("%s: %s", error.what, error.why)

    def start(self) -> None:
        """Tell the prediction, and measure from here on."""
        if self.device.type == "cuda":
            # What caching took is not what steps take.
            torch.cuda.reset_peak_memory_stats(self.device)
        if self.plan is None:
            return
        log.info("plan: %s", self.plan.line())
        self.events.emit(
            "plan",
            state="predicted",
            device_bytes=self.plan.phase("step").device,
            host_bytes=self.plan.host,
            step_seconds=self.plan.seconds,
            run_seconds=self.plan.run_seconds,
        )

    def add(self, step: int, seconds: float) -> None:
        """An update is done; ``step`` counts from the beginning of the run, also after a resume."""
        self.all_seconds += seconds
        self.seconds.append(seconds)
        if len(self.seconds) == STEPS:
            pace = statistics.mean(self.seconds[1:])
            left = pace * (self.total - step)
            device = device_peak(self.device)
            told = "" if device is None else f", {byte_size(device)} on the device"
            log.info("measured: %.2f s per step%s, %s left", pace, told, duration(left))
            self.events.emit(
                "plan",
                state="measured",
                step=step,
                device_bytes=device,
                host_bytes=peak_memory(),
                step_seconds=pace,
                run_seconds=self.all_seconds + left,
            )

    def finish(self) -> None:
        """Tell how far the prediction was off; nothing when there was none, or no update."""
        if self.plan is None or not self.seconds:
            return
        updates = self.seconds[1:] or self.seconds
        found = {
            "step_seconds": (self.plan.seconds, statistics.median(updates)),
            "device_bytes": (self._device_planned(self.plan), device_peak(self.device)),
            "host_bytes": (self.plan.host, peak_memory()),
        }
        errors = {
            name: measured / predicted - 1
            for name, (predicted, measured) in found.items()
            if predicted is not None and measured is not None
        }
        words = {"step_seconds": "time of a step", "device_bytes": "memory of the device", "host_bytes": "host memory"}
        told = ", ".join(f"{words[name]} {error:+.0%}" for name, error in errors.items())
        log.info("measured against the plan: %s", told or "nothing could be compared")
        self.events.emit(
            "plan",
            state="compared",
            step_host_bytes=process_memory(),
            **{name: measured for name, (_, measured) in found.items()},
            **{f"{name}_error": error for name, error in errors.items()},
        )

    def _device_planned(self, plan: Plan) -> float | None:
        return max(each.device for each in plan.phases if each.name in self.phases) or None


def plan_device(device: torch.device) -> Device:
    """What is known about the device of a run."""
    if device.type != "cuda":
        return CPU
    properties = torch.cuda.get_device_properties(device)
    return device_like(properties.name, float(properties.total_memory))


def device_peak(device: torch.device) -> int | None:
    """The largest memory of the device so far in bytes, None where it is the host's.

    Beside the tensors it counts what the allocator does not see: the driver, libraries, compiled code, and other
    programs on the device.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    beside = total - free - torch.cuda.memory_reserved(device)
    return torch.cuda.max_memory_allocated(device) + max(0, beside)


def peak_memory() -> int | None:
    """The largest resident memory of this process so far in bytes, None where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
