"""The start of a plugin: files from templates, with the name filled in."""

from __future__ import annotations

import re
from importlib import metadata, resources
from pathlib import Path
from typing import Literal

from tuner.core.errors import UsageError
from tuner.core.registry.catalog import EXTENSIONS, MODELS, Catalog
from tuner.core.types import API_VERSION

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
COMMON = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    ".gitignore": "gitignore",
    ".github/workflows/test.yml": "ci.yml",
    "src/{package}/__init__.py": "init.py",
    "src/{package}/plugin.py": "plugin.py",
    "src/{package}/hooks.py": "hooks.py",
}
FILES = {
    "model": COMMON
    | {
        "src/{package}/config.py": "config.py",
        "src/{package}/facts.py": "facts.py",
        "src/{package}/denoiser.py": "denoiser.py",
        "src/{package}/presets/__init__.py": "presets_init.py",
        "src/{package}/presets/lora.json": "lora.json",
        "tests/test_conformance.py": "test_conformance.py",
        "tests/tiny.py": "tiny.py",
    },
    "extension": COMMON | {"tests/test_extension.py": "test_extension.py"},
}
"""Where each template goes."""


def write_plugin(name: str, template: Literal["model", "extension"], parent: Path) -> list[Path]:
    """Write ``tuner-NAME`` into ``parent``; returns the files. UsageError: an unfit or taken name, a folder there."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be the name of a plugin",
            fix="use lower-case letters, digits and single hyphens: my-model",
        )
    catalog = Catalog()
    for entry in (*catalog.entries(MODELS), *catalog.entries(EXTENSIONS)):
        if entry.name == name:
            raise UsageError(f"there is a plugin {name!r} already", why=f"from {entry.dist} {entry.version}")
    folder = parent / f"tuner-{name}"
    if folder.exists():
        raise UsageError("the folder is there already", where=str(folder), why="nothing is overwritten")
    package = f"tuner_{name.replace('-', '_')}"
    written = []
    for target, source in FILES[template].items():
        path = folder / target.format(package=package)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_filled(template, source, name), encoding="utf-8")
        written.append(path)
    return written


def _filled(template: str, source: str, name: str) -> str:
    """A template's text with names and versions of here."""
    text = resources.files(__package__).joinpath("templates", template, f"{source}.tmpl").read_text(encoding="utf-8")
    for placeholder, own in (
        ("my-model", name),
        ("my_model", name.replace("-", "_")),
        ("MyModel", "".join(part.capitalize() for part in name.split("-"))),
    ):
        text = text.replace(placeholder, own)
    version = metadata.version("tuner")
    fields = {
        "{version}": version,
        "{next_major}": str(int(version.split(".")[0]) + 1),
        "{api_major}": str(API_VERSION[0]),
        "{api_minor}": str(API_VERSION[1]),
    }
    for field, value in fields.items():
        text = text.replace(field, value)
    return text
