"""Which tool made this Python environment, and therefore must change it."""

from __future__ import annotations

import json
import shutil
import sys
import sysconfig
import tomllib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from tuner.core.errors import UsageError

Tool = Literal["uv tool", "pipx", "conda", "uv", "pip", "externally managed", "nothing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """An environment and its owner.

    python: its interpreter. name: what uv or pipx call it. installed: for ``uv tool``, the requirements it was made of,
    as (requirement, editable) pairs, this program first.
    """

    tool: Tool
    python: Path
    name: str = "tuner"
    installed: tuple[tuple[str, bool], ...] = ()


def detect(prefix: Path, base_prefix: Path, stdlib: Path, python: Path, *, has_pip: bool) -> Environment:
    """The owner of the environment at ``prefix``, from the files that each tool leaves in the environments it makes.

    uv tool: ``uv-receipt.toml``. pipx: ``pipx_metadata.json``. conda: ``conda-meta``. A venv of uv: ``uv`` in
    ``pyvenv.cfg``, and no pip inside. A Python that the system owns: ``EXTERNALLY-MANAGED`` beside its standard
    library (PEP 668), which does not bind virtual environments on top of it.
    """
    if (prefix / "uv-receipt.toml").is_file():
        return Environment(tool="uv tool", python=python, name=prefix.name, installed=_receipt(prefix))
    if (prefix / "pipx_metadata.json").is_file():
        return Environment(tool="pipx", python=python, name=_pipx_name(prefix))
    if (prefix / "conda-meta").is_dir():
        return Environment(tool="conda", python=python)
    if not has_pip:
        return Environment(tool="uv" if _made_by_uv(prefix) else "nothing", python=python)
    if prefix == base_prefix and (stdlib / "EXTERNALLY-MANAGED").is_file():
        return Environment(tool="externally managed", python=python)
    return Environment(tool="pip", python=python)


def this_environment() -> Environment:
    """The environment of the running interpreter."""
    return detect(
        Path(sys.prefix),
        Path(sys.base_prefix),
        Path(sysconfig.get_path("stdlib")),
        Path(sys.executable),
        has_pip=find_spec("pip") is not None,
    )


def program(name: str) -> str | None:
    """Where a tool is, None when it is not on the search path."""
    return shutil.which(name)


def _made_by_uv(prefix: Path) -> bool:
    try:
        text = (prefix / "pyvenv.cfg").read_text(encoding="utf-8")
    except OSError:
        return False
    return any(line.partition("=")[0].strip() == "uv" for line in text.splitlines())


def _pipx_name(prefix: Path) -> str:
    """The name of a pipx environment is that of its folder, suffix included."""
    try:
        json.loads((prefix / "pipx_metadata.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError("the records of pipx cannot be read", where=str(prefix), why=str(error)) from error
    return prefix.name


def _receipt(prefix: Path) -> tuple[tuple[str, bool], ...]:
    path = prefix / "uv-receipt.toml"
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))["tool"]["requirements"]
        return tuple(_requirement(entry) for entry in entries)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError("the records of uv cannot be read", where=str(path), why=str(error)) from error


def _requirement(entry: dict[str, Any] | str) -> tuple[str, bool]:
    """An entry of uv's receipt as (requirement, whether it is editable)."""
    if isinstance(entry, str):
        return entry, False
    if editable := entry.get("editable"):
        return str(editable), True
    extras = f"[{','.join(entry['extras'])}]" if entry.get("extras") else ""
    name = f"{entry['name']}{extras}"
    for kind in ("url", "path", "directory"):
        if kind in entry:
            return f"{name} @ {entry[kind]}", False
    if "git" in entry:
        return f"{name} @ git+{entry['git']}", False
    return f"{name}{entry.get('specifier', '')}", False
