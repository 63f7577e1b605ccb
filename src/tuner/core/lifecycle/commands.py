"""The command that installs or removes plugins, for each kind of environment. Nothing is run here."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from tuner.core.errors import UsageError
from tuner.core.lifecycle.environment import Environment


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What to run. ``runs`` is False when the user must do it: it would rebuild the environment of this program."""

    arguments: tuple[str, ...]
    runs: bool = True
    note: str = ""

    def __str__(self) -> str:
        return subprocess.list2cmdline(self.arguments) if os.name == "nt" else shlex.join(self.arguments)


def install_command(
    environment: Environment,
    wanted: Sequence[str],
    constraints: PurePath,
    *,
    upgrade: bool = False,
    allow_sdist: bool = False,
) -> Command:
    """The command that adds ``wanted`` (requirements, paths or addresses). UsageError where nothing can be installed.

    Source packages run their build code when they are installed, so only wheels are taken unless ``allow_sdist``.
    """
    for each in wanted:
        check_wanted(each, allow_sdist=allow_sdist)
    # Forward slashes work everywhere, and survive the splitting of pipx, which leaves quotes in place on Windows.
    limits = ["--constraint", constraints.as_posix()]
    pip = [*limits, *([] if allow_sdist else ["--only-binary", ":all:"]), *(["--upgrade"] if upgrade else [])]
    python = str(environment.python)
    match environment.tool:
        case "uv tool":
            known = _named(environment.installed)
            names = {_name(each) for each in wanted}
            kept = [pair for pair in known if _name(pair[0]) not in names]
            more = ["--constraints", str(constraints), *([] if allow_sdist else ["--no-build"])]
            return _uv_tool([*kept, *((each, False) for each in wanted)], [*more, *(["--upgrade"] if upgrade else [])])
        case "pipx":
            forced = ["--force"] if upgrade else []
            # One word: a value that begins with dashes could be taken for an option of pipx.
            options = f"--pip-args={shlex.join(pip)}"
            return Command(arguments=("pipx", "inject", *forced, environment.name, *wanted, options))
        case "uv":
            return Command(arguments=("uv", "pip", "install", "--python", python, *pip, *wanted))
        case "conda":
            note = "conda does not see packages that pip installs; keep the plugins out of its environment files"
            return Command(arguments=(python, "-m", "pip", "install", *pip, *wanted), note=note)
        case "pip":
            return Command(arguments=(python, "-m", "pip", "install", *pip, *wanted))
        case _:
            raise _refusal(environment)


def uninstall_command(environment: Environment, packages: Sequence[str]) -> Command:
    """The command that removes installed packages. UsageError where nothing can be removed."""
    python = str(environment.python)
    match environment.tool:
        case "uv tool":
            gone = {canonicalize_name(package) for package in packages}
            kept = [pair for pair in _named(environment.installed) if _name(pair[0]) not in gone]
            return _uv_tool(kept, [])
        case "pipx":
            return Command(arguments=("pipx", "uninject", environment.name, *packages))
        case "uv":
            return Command(arguments=("uv", "pip", "uninstall", "--python", python, *packages))
        case "conda" | "pip":
            return Command(arguments=(python, "-m", "pip", "uninstall", "--yes", *packages))
        case _:
            raise _refusal(environment)


def check_wanted(wanted: str, *, allow_sdist: bool) -> None:
    """Refuse options in disguise, requirements that are none, and what would have to be built."""
    if wanted.startswith("-"):
        raise UsageError(f"{wanted!r} is an option, not a package", fix="tuner plugins install --help")
    place = wanted.partition(" @ ")[2].strip() or wanted
    is_place = looks_like_place(place)
    if not is_place:
        try:
            Requirement(wanted)
        except InvalidRequirement as error:
            raise UsageError(
                f"{wanted!r} is no package requirement", why=str(error).splitlines()[0], fix="write NAME or NAME>=1.2"
            ) from error
    if is_place and not allow_sdist and not place.partition("#")[0].endswith(".whl"):
        raise UsageError(
            f"{wanted!r} is not a wheel",
            why="building a package runs its code before you could look at what it installs",
            fix="add --allow-sdist when you trust it, or build a wheel: python -m pip wheel --no-deps PATH",
        )


def looks_like_place(text: str) -> bool:
    """Whether a requirement is a file, a folder or an address instead of a name."""
    return "://" in text or "/" in text or "\\" in text or text.endswith((".whl", ".tar.gz", ".zip")) or text == "."


def _named(installed: Sequence[tuple[str, bool]]) -> list[tuple[str, bool]]:
    return list(installed) or [("tuner", False)]


def _name(requirement: str) -> str:
    """The package of a requirement; places that hide it stand for themselves."""
    head = requirement.partition(" @ ")[0]
    try:
        return canonicalize_name(Requirement(head).name)
    except InvalidRequirement:
        return requirement


def _uv_tool(requirements: Sequence[tuple[str, bool]], options: Sequence[str]) -> Command:
    """uv rebuilds a tool's environment from all of its requirements, so all of them are named, this program first."""
    (main, main_editable), *others = requirements
    arguments = ["uv", "tool", "install", *options, *(["--editable"] if main_editable else []), main]
    for requirement, editable in others:
        arguments += ["--with-editable" if editable else "--with", requirement]
    note = "uv replaces the environment that this program runs in, so run it yourself"
    return Command(arguments=tuple(arguments), runs=False, note=note)


def _refusal(environment: Environment) -> UsageError:
    if environment.tool == "externally managed":
        return UsageError(
            "plugins cannot be installed into this Python",
            where=str(environment.python),
            why="the operating system owns it (EXTERNALLY-MANAGED)",
            fix="python -m venv ~/tuner && ~/tuner/bin/python -m pip install tuner, then use ~/tuner/bin/tuner",
        )
    return UsageError(
        "this environment has no installer",
        where=str(environment.python),
        why="it has no pip, and no other tool left its mark",
        fix=f"{environment.python} -m ensurepip",
    )
