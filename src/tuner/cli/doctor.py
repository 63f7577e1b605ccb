"""Look at this environment: versions, devices, extras, plugins, disks, and common faults with what mends them.

--bundle writes a ZIP file for a bug report without secrets, prompts and folders. Nothing is fetched or changed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.cli.console import error, heading, out, out_json, table, warn
from tuner.cli.settings import add_config_arguments, load

if TYPE_CHECKING:
    from tuner.core.lifecycle.doctor import Diagnosis


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--bundle", metavar="FILE", help="write a redacted ZIP file for a bug report")
    parser.add_argument("--run", metavar="FOLDER", help="--bundle: a run folder whose records are added", dest="folder")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(command="doctor")


def run(arguments: argparse.Namespace) -> int:
    from tuner.core.errors import UsageError
    from tuner.core.lifecycle.bundle import bundle_parts, write_bundle
    from tuner.core.lifecycle.doctor import diagnose
    from tuner.core.registry import Catalog

    if arguments.folder is not None and arguments.bundle is None:
        raise UsageError("--run is for --bundle", fix="tuner doctor --bundle report.zip --run FOLDER")
    catalog = Catalog()
    named = arguments.config or arguments.preset or arguments.sets
    raw = load(arguments, catalog) if named else None
    folders = {}
    for section, key, use in (("cache", "dir", "the cache"), ("checkpoint", "dir", "the run")):
        value = raw.get(section) if raw is not None else None
        if isinstance(value, dict) and isinstance(value.get(key), str):
            folders[use] = Path(value[key])
    found = diagnose(folders, catalog)
    parts = {}
    if arguments.bundle is not None:
        parts = bundle_parts(found, raw, Path(arguments.folder) if arguments.folder else None)
        write_bundle(Path(arguments.bundle), parts)
    if arguments.json:
        told = {"path": arguments.bundle, "files": {name: what for name, (what, _) in parts.items()}}
        out_json(found.as_dict() | {"bundle": told if parts else None})
    else:
        _show(found)
        if parts:
            heading(f"\nwrote {arguments.bundle}")
            for name, (what, _) in parts.items():
                out(f"  {name}: {what}")
            out("secrets, texts of yours and folders are removed, names of files are not: look it through first")
    return 0 if found.ok else 1


def _show(found: Diagnosis) -> None:
    from tuner.core.track.progress import byte_size

    heading("system")
    for name, value in found.system.items():
        out(f"  {name}: {byte_size(value) if name == 'memory' and value else value}")
    heading("devices")
    for device in found.torch["devices"]:
        if device["error"]:
            continue  # it is told with the faults
        capability = ".".join(map(str, device["capability"]))
        out(f"  {device['name']}: {byte_size(device['free'])} of {byte_size(device['memory'])} free, {capability}")
    if not found.torch["devices"]:
        out("  no GPU that torch sees")
    heading("packages")
    table(("package", "version", "needed"), [(p.name, p.version or "missing", p.wanted) for p in found.packages])
    heading("extras")
    states = [
        (e.name, e.version or "-", "fails" if e.error else "works" if e.usable else "", e.use) for e in found.extras
    ]
    table(("module", "version", "", "for"), states)
    heading("plugins")
    for plugin in found.plugins:
        state = "not usable" if plugin.problems else "in order"
        out(f"  {plugin.kind} {plugin.name} ({plugin.dist} {plugin.version}): {state}")
    heading("disks")
    for disk in found.disks:
        out(f"  {disk.use}: {byte_size(disk.free)} of {byte_size(disk.total)} free, {disk.path}")
    if found.variables:
        heading("environment variables")
        for name, value in found.variables.items():
            out(f"  {name}: {value}")
    for fault in found.faults:
        (error if fault.serious else warn)(f"{fault.what}\n  fix: {fault.fix}")
    if not found.faults:
        out("no faults found")
