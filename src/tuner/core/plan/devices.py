"""What is known about devices: memory, arithmetic, bandwidth. Only the memory is exact.

``products``, ``attention`` and ``attention_backward`` are what a training step can be expected to reach in bfloat16,
not peaks: for the H200 from a measured peak of 790 TFLOP/s, for others from the nominal dense rate with float32 sums.
No entry has been checked by a training of this program on that device.
"""

from __future__ import annotations

import difflib
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from tuner.core.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """memory in bytes, None for the host's own. Rates in operations or bytes per second, None where nothing is known.

    link: of copies from host memory. overhead: memory that the driver and libraries take beside the tensors.
    """

    name: str
    kind: str = "cuda"
    memory: float | None = None
    products: float | None = None
    attention: float | None = None
    attention_backward: float | None = None
    bandwidth: float | None = None
    link: float | None = None
    overhead: float = 0.6e9

    @property
    def is_timed(self) -> bool:
        return self.products is not None


def _gpu(name: str, memory: float, products: float, bandwidth: float, link: float, share: float = 0.9) -> Device:
    """memory in GB; products in TFLOP/s as reached; bandwidth and link in GB/s. share: of products that attention
    reaches in the forward pass."""
    return Device(
        name=name,
        memory=memory * 1e9,
        products=products * 1e12,
        attention=share * products * 1e12,
        attention_backward=0.75 * share * products * 1e12,
        bandwidth=bandwidth * 1e9,
        link=link * 1e9,
    )


DEVICES: Mapping[str, Device] = {
    "h200": _gpu("NVIDIA H200", 141, 670, 4300, 50),
    "h100": _gpu("NVIDIA H100", 80, 640, 3000, 50),
    "a100": _gpu("NVIDIA A100", 80, 230, 1800, 25),
    "l40s": _gpu("NVIDIA L40S", 48, 220, 780, 25),
    "a6000": _gpu("NVIDIA RTX A6000", 48, 110, 700, 25),
    "5090": _gpu("NVIDIA GeForce RTX 5090", 32, 190, 1600, 50, 1.0),
    "4090": _gpu("NVIDIA GeForce RTX 4090", 24, 148, 1000, 25, 1.0),
    "3090": _gpu("NVIDIA GeForce RTX 3090", 24, 64, 850, 25),
    "4080": _gpu("NVIDIA GeForce RTX 4080", 16, 88, 700, 25, 1.0),
    "5070ti": _gpu("NVIDIA GeForce RTX 5070 Ti", 16, 79, 850, 50, 1.0),
    "4060ti": _gpu("NVIDIA GeForce RTX 4060 Ti", 16, 40, 270, 12, 1.0),
    "3060": _gpu("NVIDIA GeForce RTX 3060", 12, 23, 330, 25),
}
"""By the name that ``tuner plan --device`` takes."""
ANY_GPU = Device(name="a GPU")
"""Memory can be predicted for it, time cannot."""
CPU = Device(name="cpu", kind="cpu", overhead=0.0)

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(GB|GiB|MB|MiB)?", re.IGNORECASE)
UNITS = {"gb": 1e9, "gib": 2**30, "mb": 1e6, "mib": 2**20}


def device_named(name: str) -> Device:
    """The device of a short name, ``cpu`` included. UsageError for one that is not in the table."""
    key = name.lower().removeprefix("rtx").strip(" -_").replace(" ", "").replace("_", "")
    if key == "cpu":
        return CPU
    if key not in DEVICES:
        near = difflib.get_close_matches(key, DEVICES, 1)
        raise UsageError(
            f"nothing is known about a device {name!r}",
            where="--device",
            why=f"there are cpu, {', '.join(DEVICES)}",
            fix=f"did you mean {near[0]!r}?" if near else "leave --device out and give --vram: memory is planned then",
        )
    return DEVICES[key]


def device_like(title: str, memory: float) -> Device:
    """The device that a driver calls ``title``; with its memory alone when the table does not have it."""
    words = re.sub(r"[^a-z0-9]", "", title.lower())
    found = next((DEVICES[key] for key in sorted(DEVICES, key=len, reverse=True) if key in words), None)
    if found is None:
        return Device(name=title, memory=memory)
    return Device(
        name=title, memory=memory, products=found.products, attention=found.attention,
        attention_backward=found.attention_backward, bandwidth=found.bandwidth, link=found.link,
    )  # fmt: skip


def device_here() -> Device | None:
    """The first NVIDIA GPU of this machine as its driver's own tool tells, None without one. Does not import torch."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        title, _, megabytes = told.splitlines()[0].rpartition(",")
        return device_like(title.strip(), float(megabytes) * 2**20)
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None


def parse_size(text: str, where: str) -> float:
    """Bytes for ``12GB``, ``11.5GiB``, ``8000MB``; a number alone is in GB."""
    match = SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise UsageError(f"{text!r} is no amount of memory", where=where, fix="write it as 12GB or 11.5GiB")
    return float(match[1]) * UNITS[(match[2] or "GB").lower()]
