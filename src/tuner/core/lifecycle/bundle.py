"""The file for a bug report: what helps to find the fault, without secrets, texts of the user's, or paths."""

from __future__ import annotations

import getpass
import json
import platform
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner.core.atomic import atomic_path
from tuner.core.config.planned import names_secret
from tuner.core.errors import UsageError
from tuner.core.lifecycle.doctor import Diagnosis
from tuner.core.lifecycle.machine import all_packages
from tuner.core.track.events import read_events
from tuner.core.track.page import hide_folders

REMOVED = "(removed)"
TEXT_KEYS = frozenset(
    {
        "prompt", "prompts", "negative", "caption", "captions_raw", "text", "texts", "prefix", "suffix", "fixed",
        "fallback", "replace", "wildcards_file", "title", "author", "description", "comment", "tags", "trigger",
    }
)  # fmt: skip
"""Keys whose values are words of the user's."""
_SECRET_TEXT = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|AKIA[A-Z0-9]{12,}|eyJ[\w-]{20,}[\w.-]*)"
)
_LOGIN = re.compile(r"(?<=://)[^/\s@]+@")
EVENTS = 200
"""So many of the last events of a run are taken."""


def redacted(value: Any, key: str = "") -> Any:
    """A copy of JSON values that may be shown to strangers.

    Secrets and texts of the user's become ``(removed)``, absolute paths their last name, and the names of the user and
    the machine disappear.
    """
    if isinstance(value, Mapping):
        return {_clean(str(name)): redacted(below, str(name)) for name, below in value.items()}
    hidden = key.lower() in TEXT_KEYS or names_secret(key)
    if hidden and value not in (None, "", [], (), False, True):
        return REMOVED
    if isinstance(value, list | tuple):
        return [redacted(below, key) for below in value]
    return _clean(value) if isinstance(value, str) else value


def _clean(text: str) -> str:
    text = _LOGIN.sub("", _SECRET_TEXT.sub(REMOVED, text))
    text = str(hide_folders(text.replace(str(Path.home()), "~")))
    for name, shown in ((_user(), "USER"), (platform.node(), "HOST")):
        if len(name) > 2:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", shown, text)
    return text


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return ""


def bundle_parts(
    diagnosis: Diagnosis, config: Mapping[str, Any] | None = None, run: Path | None = None
) -> dict[str, tuple[str, str]]:
    """File name to (what it is, its text), redacted. run: a run folder, whose records are added."""
    parts = {
        "doctor.json": ("what tuner doctor found", _text(diagnosis.as_dict())),
        "packages.json": ("names and versions of all installed packages", _text(all_packages())),
    }
    if config is not None:
        parts["config.json"] = ("the configuration, paths and texts removed", _text(config))
    if run is not None:
        parts |= _run_parts(run)
    listed = "\n".join(f"{name}: {what}" for name, (what, _) in parts.items())
    readme = f"{listed}\n\n{PROMISE}\n"
    return {"README.txt": ("this list", f"README.txt: this list\n{readme}")} | parts


PROMISE = """\
Removed: values of keys that hold secrets or texts of yours (prompts, captions, titles), folders of absolute paths, the
names of user and machine, and values of most environment variables. No pictures, captions or weights are in it. Names
of files remain. Look it through before you pass it on."""


def write_bundle(path: Path, parts: Mapping[str, tuple[str, str]]) -> None:
    """Write the files into a new ZIP archive. Raises UsageError when ``path`` exists."""
    if path.exists():
        raise UsageError("this file exists", where=str(path), fix="choose another name")
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (_, text) in parts.items():
            archive.writestr(name, text)


def _run_parts(run: Path) -> dict[str, tuple[str, str]]:
    if not (run / "config.resolved.json").is_file():
        raise UsageError("this is not a run folder", where=str(run), why="it holds no config.resolved.json")
    parts = {}
    for name, what in (("config.resolved.json", "the run's settings"), ("manifest.json", "the run's versions")):
        if (run / name).is_file():
            parts[f"run/{name}"] = (what, _text(_read(run / name)))
    if events := read_events(run / "events.jsonl")[-EVENTS:]:
        told = "\n".join(json.dumps(redacted(event), ensure_ascii=False) for event in events)
        parts["run/events.jsonl"] = (f"the last {EVENTS} events of the run", told + "\n")
    return parts


def _read(path: Path) -> Any:
    """A record of a run; what is wrong with it, when it cannot be read, which may be the very fault."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return {"not readable": f"{type(error).__name__}: {error}"}


def _text(value: Any) -> str:
    return json.dumps(redacted(value), indent=2, ensure_ascii=False, default=str) + "\n"
