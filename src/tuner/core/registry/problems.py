"""What is wrong with installed plugins, and a memory of it, so that ``--help`` can warn without importing them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tuner.core.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginProblem:
    """Why a plugin cannot be used.

    stage: ``metadata``, ``descriptor`` or ``hooks``. error: one line. hint: what to do. trace: the traceback, which
    ``TUNER_DEBUG_PLUGINS=1`` shows.
    """

    name: str
    dist: str
    version: str
    stage: str
    error: str
    hint: str
    trace: str = ""

    def __str__(self) -> str:
        return f"plugin '{self.name}' ({self.dist} {self.version}) is not usable: {self.error}"

    def as_error(self) -> UsageError:
        debug = bool(os.environ.get("TUNER_DEBUG_PLUGINS"))
        why = self.trace.rstrip() if debug and self.trace else None
        hint = self.hint if debug or not self.trace else f"{self.hint}; TUNER_DEBUG_PLUGINS=1 shows the traceback"
        return UsageError(str(self), why=why, fix=hint)


class ProblemMemory:
    """Import failures by distribution and version, in a small file of the user's cache folder."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or _cache_folder() / "plugin-problems.json"

    def recall(self) -> dict[str, PluginProblem]:
        """Problems by ``dist version name``; an unreadable file is an empty memory."""
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            return {key: PluginProblem(**entry) for key, entry in stored.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def remember(self, problem: PluginProblem) -> None:
        self._write(self.recall() | {problem_key(problem.dist, problem.version, problem.name): problem})

    def forget(self, dist: str, version: str, name: str) -> None:
        known = self.recall()
        if known.pop(problem_key(dist, version, name), None) is not None:
            self._write(known)

    def _write(self, problems: Mapping[str, PluginProblem]) -> None:
        text = json.dumps({key: asdict(problem) | {"trace": ""} for key, problem in problems.items()}, indent=1)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(f".{os.getpid()}")
            partial.write_text(text, encoding="utf-8")
            partial.replace(self.path)
        except OSError:
            # Only a warning is lost: a home folder may be read-only.
            return


def problem_key(dist: str, version: str, name: str) -> str:
    """What a problem is remembered under: another version of the package is asked anew."""
    return f"{dist} {version} {name}"


def _cache_folder() -> Path:
    if folder := os.environ.get("TUNER_CACHE_DIR"):
        return Path(folder)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "tuner"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "tuner"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tuner"
