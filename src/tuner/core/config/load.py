"""Reading a configuration: file, then environment, then ``--set``; the later wins."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

from tuner.core.config.data import CacheConfig
from tuner.core.config.document import RawConfig, loose_value, merged, split_path
from tuner.core.config.jsonc import Document, Path, parse
from tuner.core.config.locations import absolute_paths
from tuner.core.errors import UsageError

# Defaults that are places: they start where other relative paths of the document start.
_PLACES = {"cache": {"dir": CacheConfig.model_fields["dir"].default}}
ENV_PREFIX = "TUNER__"


def load_config(
    source: str | FilePath | Mapping[str, Any],
    *,
    model: str | None = None,
    sets: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    base_dir: FilePath | None = None,
    preset: Mapping[str, Any] | None = None,
) -> RawConfig:
    """Merge all sources of settings into one document with absolute paths.

    source: a file, or a dict whose relative paths start at ``base_dir`` (the current directory when None).
    model: the model's name from the command line; must agree with ``model.family``. sets: ``key.path=value`` texts.
    env: environment to read ``TUNER__KEY__PATH`` from; None reads the process's own. preset: settings below all others.
    """
    base = base_dir or FilePath.cwd()
    if isinstance(source, RawConfig):
        raw = RawConfig(source, source.origins)
    elif isinstance(source, Mapping):
        raw = RawConfig(_include(absolute_paths(dict(source), base), {}))
    else:
        raw, base = read_file(FilePath(source)), FilePath(source).absolute().parent
    origins = preset.origins | raw.origins if isinstance(preset, RawConfig) else raw.origins
    raw = RawConfig(merged(absolute_paths(_PLACES, base), merged(preset or {}, raw)), origins)
    cwd = FilePath.cwd()
    for name, text in sorted((os.environ if env is None else env).items()):
        if name.upper().startswith(ENV_PREFIX):
            parts = name[len(ENV_PREFIX) :].lower().split("__")
            path: Path = tuple(int(part) if part.isdigit() else part for part in parts)
            _override(raw, path, absolute_paths(loose_value(text), cwd, path), f"environment variable {name}")
    for text in sets:
        set_path, value = split_set(text)
        _override(raw, set_path, absolute_paths(value, cwd, set_path), f"--set {text}")
    return _with_family(raw, model)


def _override(raw: RawConfig, path: Path, value: Any, origin: str) -> None:
    """Put a setting from outside the file in its place; including happens before that, so it cannot be one."""
    if path[:2] == ("data", "include") or (path == ("data",) and isinstance(value, Mapping) and "include" in value):
        raise UsageError(
            "data.include has an effect in a file only", where=origin, fix="write it into the configuration file"
        )
    raw.overlay(path, value, origin)


def read_file(path: FilePath) -> RawConfig:
    """Read one file; relative paths in it become absolute from its folder."""
    document = _document(path)
    origins: dict[Path, str] = {key: f"{path}:{line}" for key, line in document.lines.items()}
    value = absolute_paths(document.value, path.absolute().parent)
    return RawConfig(_include(value, origins), origins)


def split_set(text: str) -> tuple[Path, Any]:
    """``key.path=value`` as path and value; a value that is not JSON is taken as text."""
    name, equals, value = text.partition("=")
    path = split_path(name.strip())
    if not equals or path is None:
        raise UsageError(
            f"cannot read --set {text!r}",
            why="it has the form KEY.PATH=VALUE",
            fix="for example: --set optimizer.lr=2e-4",
        )
    return path, loose_value(value.strip())


def _document(path: FilePath) -> Document:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(
            "the configuration file does not exist",
            where=str(path),
            fix="check the path; tuner configure writes a configuration",
        ) from None
    except IsADirectoryError:
        raise UsageError("the configuration must be a file, this is a folder", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise UsageError("the configuration is not UTF-8 text", where=f"{path}, byte {error.start}") from None
    except OSError as error:
        raise UsageError(f"cannot read the configuration: {error.strerror}", where=str(path)) from None
    if path.suffix.lower() == ".toml":
        raise _of_another_program(path, "sd-scripts", "configurations here are JSON; sd-scripts has TOML files")
    document = parse(text, str(path))
    if program := _program_of(document.value):
        raise _of_another_program(path, program, f"it is laid out as those of {program}")
    if not isinstance(document.value, dict):
        raise UsageError(
            "the configuration must be a JSON object", where=str(path), fix='start it with { "model": ... }'
        )
    return document


def _program_of(value: Any) -> str | None:
    """Whose data sets a document describes, by its shape; None for anything else."""
    if isinstance(value, dict) and isinstance(value.get("datasets"), list):
        return "sd-scripts"
    if isinstance(value, list) and value and all(isinstance(entry, dict) and "id" in entry for entry in value):
        return "simpletuner"
    return None


def _of_another_program(path: FilePath, program: str, why: str) -> UsageError:
    # Not read on the fly: what changes its meaning, or is left out, belongs into a report that somebody reads.
    return UsageError(
        "this file is for another program",
        where=str(path),
        why=why,
        fix=f"translate it: tuner config import {program} {path}",
    )


def _include(value: dict[str, Any], origins: dict[Path, str]) -> dict[str, Any]:
    """Replace ``data.include`` by what that file holds; keys beside it win."""
    data = value.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("include"), str):
        return value
    file = FilePath(data["include"])
    document = _document(file)
    inner = document.value["data"] if set(document.value) == {"data"} else document.value
    nested = inner is not document.value
    if not isinstance(inner, dict):
        raise UsageError("the included file must hold the data section as an object", where=str(file))
    if "include" in inner:
        raise UsageError("an included file cannot include another", where=f"{file}, data.include")
    for key, line in document.lines.items():
        path = key if nested else ("data", *key)
        if path not in origins:
            origins[path] = f"{file}:{line}"
    located = absolute_paths({"data": inner}, file.absolute().parent)["data"]
    outer = {key: below for key, below in data.items() if key != "include"}
    return value | {"data": merged(located, outer)}


def _with_family(raw: RawConfig, model: str | None) -> RawConfig:
    section = raw.get("model")
    if model is None or (section is not None and not isinstance(section, dict)):
        return raw
    family = (section or {}).get("family")
    if family is not None and family != model:
        raise UsageError(
            f"--model says {model!r}, the configuration says {family!r}",
            where=raw.where(("model", "family")),
            fix="make them agree, or leave one of them out",
        )
    raw["model"] = {"family": model} | (section or {})
    return raw
