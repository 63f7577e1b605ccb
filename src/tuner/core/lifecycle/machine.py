"""What this machine and this Python are: versions, devices, memory, disks. Nothing is fetched or changed."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from tuner.core.config.attention import KERNELS
from tuner.core.lifecycle.environment import this_environment

SHOWN_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF",
    "CUDA_LAUNCH_BLOCKING", "HF_HUB_OFFLINE", "NO_COLOR",
)  # fmt: skip
"""Environment variables whose values are told; of others that matter, only the names."""
_NAMED_PREFIXES = ("TUNER_", "HF_", "TORCH", "PYTORCH_", "CUDA_", "NCCL_")
_IMPORT_SECONDS = 180


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """An installed package. wanted: the versions that this program needs, empty for one it does not ask for."""

    name: str
    version: str | None
    wanted: str = ""
    fits: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Extra:
    """A package that is not needed. error: why it cannot be imported although it is installed."""

    name: str
    use: str
    version: str | None
    error: str | None = None

    @property
    def usable(self) -> bool:
        return self.version is not None and self.error is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """Space where something is written. Bytes."""

    use: str
    path: str
    free: int
    total: int


def system_facts() -> dict[str, Any]:
    """Operating system, Python, processors and memory."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "interpreter": sys.executable,
        "environment": this_environment().tool,
        "cpus": cpu_count(),
        "memory": total_memory(),
        "encoding": sys.getfilesystemencoding(),
    }


def cpu_count() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total_memory() -> int | None:
    """Bytes of host memory; None where the system does not tell."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def packages() -> list[Package]:
    """This program and what it needs, with the versions that are here."""
    found = [Package(name="tuner", version=metadata.version("tuner"))]
    for requirement in requirements_of("tuner"):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = version_of(requirement.name)
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        found.append(
            Package(name=requirement.name, version=version, wanted=str(requirement.specifier), fits=fits)
        )  # fmt: skip
    return found


def requirements_of(package: str) -> Iterator[Requirement]:
    """What a package asks for, as its metadata says; nothing for what cannot be read."""
    for text in metadata.requires(package) or ():
        try:
            yield Requirement(text)
        except InvalidRequirement:
            continue


def version_of(package: str) -> str | None:
    """The version of an installed distribution, None for one that is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def all_packages() -> dict[str, str]:
    """Every installed package, by name."""
    found = {(each.metadata["Name"] or ""): each.version for each in metadata.distributions()}
    return dict(sorted(((name, version) for name, version in found.items() if name), key=lambda row: row[0].lower()))


def torch_facts() -> dict[str, Any]:
    """What torch is built for and which devices it sees; ``error`` where it cannot be imported."""
    # In a process of its own first: a broken torch may end the process instead of raising.
    error = None if "torch" in sys.modules else import_error("torch")
    if error is not None:
        return {"version": version_of("torch"), "error": error, "devices": []}
    torch = import_module("torch")
    available = torch.cuda.is_available()
    devices = [_device(torch, index) for index in range(torch.cuda.device_count())] if available else []
    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cuda_available": available,
        "mps_available": torch.backends.mps.is_available(),
        "threads": torch.get_num_threads(),
        "devices": devices,
        "pinned": pinned_problem(torch) if devices else None,
    }


def _device(torch: Any, index: int) -> dict[str, Any]:
    """One device; error: why it cannot be asked, as when another program has it for itself."""
    found: dict[str, Any] = {"name": f"device {index}", "error": None} | dict.fromkeys(("capability", "memory", "free"))
    try:
        found |= {"name": torch.cuda.get_device_name(index)}
        found |= {"capability": list(torch.cuda.get_device_capability(index))}
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        return found | {"error": str(error).partition("\n")[0]}
    return found | {"memory": total, "free": free}


def pinned_problem(torch: Any) -> str | None:
    """Why memory that the device can copy from by itself cannot be had; None when it can."""
    try:
        torch.empty(1 << 20, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def extras() -> list[Extra]:
    """Optional packages that something asks for; those that are installed are imported, each in its own process."""
    wanted = {kernel.module: f"attention.backend {name!r}" for name, kernel in KERNELS.items() if kernel.module}
    wanted |= {"tensorboard": "log.to", "questionary": "menus of tuner configure"} | _optimizer_modules()
    return [_extra(module, use) for module, use in sorted(wanted.items())]


def _optimizer_modules() -> dict[str, str]:
    try:
        from tuner.core.optim.names import BUILTIN
    except (ImportError, OSError):
        return {}
    modules: dict[str, list[str]] = {}
    for name, entry in BUILTIN.items():
        if entry.package is not None:
            modules.setdefault(entry.module.split(".")[0], []).append(name)
    return {module: f"optimizer.name {names[0]!r}{' and others' if names[1:] else ''}"
            for module, names in modules.items()}  # fmt: skip


def _extra(module: str, use: str) -> Extra:
    if find_spec(module) is None:
        return Extra(name=module, use=use, version=None)
    package = next(iter(metadata.packages_distributions().get(module, ())), module)
    return Extra(name=module, use=use, version=version_of(package) or "?", error=import_error(module))


def import_error(module: str) -> str | None:
    """The last line of what importing a module says in a process of its own; None when it works."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"importing it takes more than {_IMPORT_SECONDS} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"importing it ends the process with {done.returncode}"


def asks_for_other_torch(module: str) -> str | None:
    """The version of torch that the package of a module wants, when it is not the one that is here."""
    here = version_of("torch")
    package = next(iter(metadata.packages_distributions().get(module, ())), None)
    if here is None or package is None:
        return None
    for requirement in requirements_of(package):
        unconditional = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if canonicalize_name(requirement.name) == "torch" and unconditional:
            public = here.partition("+")[0]
            if not requirement.specifier.contains(public, prereleases=True):
                return str(requirement.specifier)
    return None


def disks(folders: Mapping[str, Path]) -> list[Disk]:
    """Space in the folders where something is written; those of downloads and temporary files are added."""
    hub = (
        os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface") / "hub"
    )
    every = {
        "this folder": Path.cwd(),
        **folders,
        "downloads": Path(hub),
        "temporary files": Path(tempfile.gettempdir()),
    }
    found = []
    for use, path in every.items():
        usage = _usage(path.absolute())
        if usage is not None:
            found.append(Disk(use=use, path=str(path), free=usage.free, total=usage.total))
    return found


def _usage(path: Path) -> shutil._ntuple_diskusage | None:
    """Of the nearest folder that is there; None where the system does not tell."""
    for each in (path, *path.parents):
        try:
            return shutil.disk_usage(each)
        except OSError:
            continue
    return None


def variables() -> dict[str, str]:
    """Environment variables that change what happens; values only of those that hold no secret."""
    found = {}
    for name, value in sorted(os.environ.items()):
        if name in SHOWN_VARIABLES:
            found[name] = value
        elif name.startswith(_NAMED_PREFIXES):
            found[name] = "(set)"
    return found
