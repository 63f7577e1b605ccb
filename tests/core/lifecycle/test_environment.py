"""Who made an environment is read from what the tools leave in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tuner.core.errors import UsageError
from tuner.core.lifecycle.environment import Environment, detect

RECEIPT = """
[tool]
requirements = [
    { name = "tuner", extras = ["tensorboard"], specifier = ">=0.1" },
    { name = "tuner-cubist" },
    { name = "tuner-own", editable = "/home/me/tuner-own" },
    { name = "tuner-git", git = "https://example.org/tuner-git?rev=1" },
    { name = "tuner-file", path = "/downloads/tuner_file-1-py3-none-any.whl" },
]
entrypoints = [{ name = "tuner", install-path = "/home/me/.local/bin/tuner" }]
"""


def environment(tmp_path: Path, *, has_pip: bool = True, base: Path | None = None) -> Environment:
    stdlib = tmp_path / "lib" / "python3"
    return detect(tmp_path, base or tmp_path / "base", stdlib, tmp_path / "bin" / "python", has_pip=has_pip)


def test_a_plain_virtual_environment_belongs_to_pip(tmp_path):
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\n")
    found = environment(tmp_path)
    assert (found.tool, found.python) == ("pip", tmp_path / "bin" / "python")


def test_a_uv_tool_is_known_by_its_receipt_and_remembers_what_it_was_made_of(tmp_path):
    (tmp_path / "uv-receipt.toml").write_text(RECEIPT)
    (tmp_path / "pyvenv.cfg").write_text("uv = 0.9\n")
    found = environment(tmp_path, has_pip=False)
    assert found.tool == "uv tool"
    assert found.installed == (
        ("tuner[tensorboard]>=0.1", False),
        ("tuner-cubist", False),
        ("/home/me/tuner-own", True),
        ("tuner-git @ git+https://example.org/tuner-git?rev=1", False),
        ("tuner-file @ /downloads/tuner_file-1-py3-none-any.whl", False),
    )


def test_a_receipt_that_cannot_be_read_is_said_and_not_guessed(tmp_path):
    (tmp_path / "uv-receipt.toml").write_text("[tool]\n")
    with pytest.raises(UsageError, match="records of uv"):
        environment(tmp_path)


def test_a_pipx_environment_has_the_name_of_its_folder(tmp_path):
    folder = tmp_path / "tuner_beta"
    folder.mkdir()
    (folder / "pipx_metadata.json").write_text(json.dumps({"main_package": {"package": "tuner"}}))
    found = environment(folder)
    assert (found.tool, found.name) == ("pipx", "tuner_beta")


def test_a_conda_environment_is_known_by_its_metadata_folder(tmp_path):
    (tmp_path / "conda-meta").mkdir()
    assert environment(tmp_path).tool == "conda"


def test_a_venv_of_uv_without_pip_needs_uv_and_with_pip_does_not(tmp_path):
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\nuv = 0.9.1\n")
    assert environment(tmp_path, has_pip=False).tool == "uv"
    assert environment(tmp_path, has_pip=True).tool == "pip"


def test_an_environment_without_any_installer_is_told_so(tmp_path):
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\n")
    assert environment(tmp_path, has_pip=False).tool == "nothing"


def test_the_python_of_the_system_is_left_alone_but_not_environments_on_top_of_it(tmp_path):
    (tmp_path / "lib" / "python3").mkdir(parents=True)
    (tmp_path / "lib" / "python3" / "EXTERNALLY-MANAGED").touch()
    assert environment(tmp_path, base=tmp_path).tool == "externally managed"
    assert environment(tmp_path).tool == "pip"
