"""``tuner plugins install``, ``uninstall`` and ``sync``. No plugin is imported in this process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from packaging.utils import canonicalize_name

from tuner.cli.console import error, out, warn
from tuner.core.errors import UsageError
from tuner.core.lifecycle.commands import Command, install_command, looks_like_place, uninstall_command
from tuner.core.lifecycle.constraints import installed, pinned, write_constraints
from tuner.core.lifecycle.environment import program, this_environment
from tuner.core.lifecycle.installed import package_of, plugin_packages
from tuner.core.lifecycle.record import PluginRecord, config_folder

TRUST = (
    "A plugin is a program: installing and using it runs its code with your rights. Install only what you trust; "
    "there is no sandbox."
)


def install(wanted: Sequence[str], *, upgrade: bool, allow_sdist: bool, dry_run: bool) -> int:
    """Install packages, remember them, and check them in a new process."""
    wanted = [_absolute(each) for each in wanted]
    constraints = write_constraints(config_folder())
    command = install_command(this_environment(), wanted, constraints, upgrade=upgrade, allow_sdist=allow_sdist)
    out(TRUST)
    before, pins = plugin_packages(), pinned(installed())
    if not _run(command, dry_run=dry_run):
        return 0
    after = plugin_packages()
    changed = [package for package, version in after.items() if before.get(package) != version]
    found = _by_package(wanted, changed, after)
    if moved := sorted(set(pins) - set(pinned(installed()))):
        error(f"the installer replaced packages that it was told to keep: {', '.join(moved)}")
        return 1
    if not found:
        warn(f"no plugin came with {', '.join(wanted)}: no entry point in tuner.models or tuner.extensions")
        return 1
    PluginRecord().add(found)
    return _check(sorted({*found, *changed}))


def uninstall(names: Sequence[str], *, dry_run: bool) -> int:
    """Remove the packages that bring these plugins."""
    packages = list(dict.fromkeys(package_of(name) for name in names))
    if _run(uninstall_command(this_environment(), packages), dry_run=dry_run):
        PluginRecord().remove(*packages)
        out(f"removed: {', '.join(packages)}")
    return 0


def sync(*, allow_sdist: bool, dry_run: bool) -> int:
    """Install the recorded plugins that are not here, as after an upgrade that made a new environment."""
    here = plugin_packages()
    missing = {package: wanted for package, wanted in PluginRecord().read().items() if package not in here}
    if not missing:
        out("every recorded plugin is installed")
        return 0
    out(f"missing: {', '.join(missing)}")
    return install(list(missing.values()), upgrade=False, allow_sdist=allow_sdist, dry_run=dry_run)


def _run(command: Command, *, dry_run: bool) -> bool:
    """Print a command and run it unless it is the user's to run. True when it ran; UsageError when it failed."""
    out(f"$ {command}")
    if command.note:
        out(f"note: {command.note}")
    if dry_run or not command.runs:
        return False
    first = command.arguments[0]
    if first != sys.executable and program(first) is None:
        raise UsageError(
            f"{first} is not on the search path",
            why=f"{first} made this environment",
            fix=f"install it, then: {command}",
        )
    # The installer's own output is the report.
    sys.stdout.flush()
    code = subprocess.run(command.arguments, check=False).returncode
    if code:
        raise UsageError(
            f"the installer ended with exit code {code}",
            why="its messages are above; packages that torch or CUDA depend on are held at their versions on purpose",
            fix="choose a version of the plugin that works with what is installed",
        )
    return True


def _check(packages: Sequence[str]) -> int:
    """``tuner plugins check`` in a process of its own: this one has read the old state of the environment."""
    command = [sys.executable, "-m", "tuner", "plugins", "check", *packages]
    sys.stdout.flush()
    code = subprocess.run(command, check=False).returncode
    if code:
        warn(f"to remove it again: tuner plugins uninstall {' '.join(packages)}")
    return code


def _by_package(wanted: Sequence[str], changed: Sequence[str], after: dict[str, str]) -> dict[str, str]:
    """Package to what the user asked for; a place that does not tell its package is matched by what changed."""
    found = {}
    unclear = []
    for each in wanted:
        package = _package_in(each)
        if package in after:
            found[package] = each
        elif package is None:
            unclear.append(each)
    left = [package for package in changed if package not in found]
    return found | dict(zip(left, unclear, strict=False))


def _package_in(wanted: str) -> str | None:
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename

    try:
        if wanted.endswith(".whl"):
            return parse_wheel_filename(Path(wanted).name)[0]
        return canonicalize_name(Requirement(wanted).name)
    except (InvalidRequirement, InvalidWheelFilename):
        return None


def _absolute(wanted: str) -> str:
    """Paths are made absolute: the record is read from other folders."""
    if not looks_like_place(wanted) or "://" in wanted or " @ " in wanted:
        return wanted
    path = Path(wanted).expanduser().absolute()
    if not path.exists():
        raise UsageError("no such file", where=str(path))
    return str(path)
