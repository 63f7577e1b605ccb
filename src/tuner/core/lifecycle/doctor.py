"""``tuner doctor``: what is here, and what is wrong with it. Nothing is fetched or changed."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tuner.core.config.attention import KERNELS
from tuner.core.lifecycle.check import plugin_problems
from tuner.core.lifecycle.machine import (
    Disk,
    Extra,
    Package,
    asks_for_other_torch,
    cpu_count,
    disks,
    extras,
    packages,
    system_facts,
    torch_facts,
    variables,
)
from tuner.core.registry import EXTENSIONS, MODELS, Catalog

LITTLE_SPACE = 5e9
"""Bytes below which a disk is mentioned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something that is wrong, or may be: ``serious`` ones keep runs from working."""

    what: str
    fix: str
    serious: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginState:
    """An installed plugin; problems: why it cannot be used."""

    name: str
    kind: str
    dist: str
    version: str
    problems: tuple[str, ...]


@dataclass(kw_only=True)
class Diagnosis:
    """Everything that was looked at. faults: serious ones first."""

    system: dict[str, Any]
    torch: dict[str, Any]
    packages: list[Package]
    extras: list[Extra]
    plugins: list[PluginState]
    disks: list[Disk]
    variables: dict[str, str]
    faults: list[Fault] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing serious is wrong."""
        return not any(fault.serious for fault in self.faults)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"ok": self.ok} | asdict(self)


def diagnose(folders: Mapping[str, Path], catalog: Catalog) -> Diagnosis:
    """Look at this environment. folders: further places where something is written, by their use."""
    found = Diagnosis(
        system=system_facts(),
        torch=torch_facts(),
        packages=packages(),
        extras=extras(),
        plugins=_plugins(catalog),
        disks=disks(folders),
        variables=variables(),
    )
    faults = [*_package_faults(found), *_device_faults(found), *_extra_faults(found), *_plugin_faults(found, catalog)]
    faults += [*_thread_faults(found), *_place_faults(found)]
    found.faults = sorted(faults, key=lambda fault: not fault.serious)
    return found


def _plugins(catalog: Catalog) -> list[PluginState]:
    return [
        PluginState(
            name=entry.name, kind=entry.kind, dist=entry.dist, version=entry.version,
            problems=tuple(plugin_problems(catalog, entry)),
        )
        for group in (MODELS, EXTENSIONS)
        for entry in catalog.entries(group)
    ]  # fmt: skip


def _package_faults(found: Diagnosis) -> Iterator[Fault]:
    for package in found.packages:
        if not package.fits:
            here = "is not installed" if package.version is None else f"is {package.version}"
            fix = f'pip install "{package.name}{package.wanted}"'
            yield Fault(what=f"{package.name} {here}; {package.wanted} is needed", fix=fix, serious=True)


def _device_faults(found: Diagnosis) -> Iterator[Fault]:
    torch = found.torch
    if torch.get("error"):
        yield Fault(what=f"torch cannot be imported: {torch['error']}", fix="install torch again", serious=True)
        return
    card = shutil.which("nvidia-smi") is not None
    if card and not torch["cuda"]:
        what = "there is an NVIDIA driver, but this torch is built without CUDA: everything would run on the CPU"
        yield Fault(what=what, fix="install the CUDA build of torch from pytorch.org", serious=True)
    elif torch["cuda"] and not torch["cuda_available"]:
        what = "torch is built for CUDA and sees no device"
        fix = "see whether nvidia-smi works, and whether CUDA_VISIBLE_DEVICES hides the device"
        yield Fault(what=what, fix=fix, serious=card)
    if torch["pinned"]:
        fix = "raise the limit on locked memory (ulimit -l), or give the container more; streaming is slow without it"
        yield Fault(what=f"no pinned host memory: {torch['pinned']}", fix=fix)
    for device in torch["devices"]:
        if device["error"]:
            what = f"{device['name']} cannot be used: {device['error']}"
            yield Fault(what=what, fix="see with nvidia-smi whether another program holds it", serious=True)
        elif device["capability"] < [8, 0]:
            what = f"{device['name']} computes bfloat16 slowly or not at all"
            yield Fault(what=what, fix='set precision.compute to "fp32"')


def _extra_faults(found: Diagnosis) -> Iterator[Fault]:
    for extra in found.extras:
        if extra.version is None:
            continue
        wanted = asks_for_other_torch(extra.name)
        if wanted is not None:
            what = f"{extra.name} {extra.version} is made for torch{wanted}, here is {found.torch['version']}"
            fix = f"install the {extra.name} that belongs to this torch, or uninstall it"
            yield Fault(what=what, fix=fix)
        if extra.error is not None:
            install = next((each.install for each in KERNELS.values() if each.module == extra.name), "")
            fix = f"install it again ({install or f'pip install {extra.name}'}), or uninstall it"
            yield Fault(what=f"{extra.name} {extra.version} is installed and fails: {extra.error}", fix=fix)


def _plugin_faults(found: Diagnosis, catalog: Catalog) -> Iterator[Fault]:
    for plugin in found.plugins:
        for problem in plugin.problems:
            told = problem.splitlines()[0]
            fix = f"tuner plugins check {plugin.name}"
            yield Fault(what=f"{plugin.kind} {plugin.name}: {told}", fix=fix)
    for each in catalog.problems:
        if each.stage == "metadata":
            yield Fault(what=str(each), fix=each.hint)


def _thread_faults(found: Diagnosis) -> Iterator[Fault]:
    threads, cpus = found.torch.get("threads"), cpu_count()
    if threads is None:
        return
    told = found.variables.get("OMP_NUM_THREADS")
    if threads > cpus:
        what = f"torch uses {threads} threads on {cpus} processors, which is slower than as many"
        yield Fault(what=what, fix="unset OMP_NUM_THREADS, or set train.cpu_threads")
    elif told == "1" and cpus > 2 and not found.torch["devices"]:
        what = f"OMP_NUM_THREADS=1: one thread of {cpus} processors computes"
        yield Fault(what=what, fix="unset it for training on the CPU")


def _place_faults(found: Diagnosis) -> Iterator[Fault]:
    for disk in found.disks:
        if disk.free < LITTLE_SPACE:
            what = f"{disk.free / 1e9:.1f} GB are free for {disk.use}"
            yield Fault(what=what, fix="free some space, or choose another folder")
    overrides = [name for name in found.variables if name.startswith("TUNER__")]
    if overrides:
        what = f"environment variables change every configuration: {', '.join(overrides)}"
        yield Fault(what=what, fix="unset them unless that is meant")
    if "microsoft" in platform.release().lower():
        what = "this is WSL: mapped weight files below /mnt are slow"
        yield Fault(what=what, fix="keep weights inside the Linux file system, or set model.mmap to false")
