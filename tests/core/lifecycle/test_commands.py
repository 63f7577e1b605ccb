"""The command for each environment, and what is refused before anything runs."""

from __future__ import annotations

from pathlib import Path, PureWindowsPath

import pytest

from tuner.core.errors import UsageError
from tuner.core.lifecycle.commands import install_command, uninstall_command
from tuner.core.lifecycle.environment import Environment

PYTHON = Path("/env/bin/python")
CONSTRAINTS = Path("/config/constraints.txt")
MADE_OF = (("tuner[tensorboard]", False), ("tuner-own", True), ("tuner-cubist", False))


def install(tool: str, *wanted: str, **options: bool) -> str:
    environment = Environment(tool=tool, python=PYTHON, installed=MADE_OF if tool == "uv tool" else ())
    return str(install_command(environment, wanted or ("tuner-x",), CONSTRAINTS, **options))


def uninstall(tool: str, *packages: str) -> str:
    environment = Environment(tool=tool, python=PYTHON, installed=MADE_OF if tool == "uv tool" else ())
    return str(uninstall_command(environment, packages))


LIMITS = "--constraint /config/constraints.txt --only-binary :all:"
ADDED = {
    "pip": f"/env/bin/python -m pip install {LIMITS} tuner-x",
    "conda": f"/env/bin/python -m pip install {LIMITS} tuner-x",
    "uv": f"uv pip install --python /env/bin/python {LIMITS} tuner-x",
    "pipx": f"pipx inject tuner tuner-x '--pip-args={LIMITS}'",
    "uv tool": (
        "uv tool install --constraints /config/constraints.txt --no-build 'tuner[tensorboard]'"
        " --with-editable tuner-own --with tuner-cubist --with tuner-x"
    ),
}
REMOVED = {
    "pip": "/env/bin/python -m pip uninstall --yes tuner-cubist",
    "conda": "/env/bin/python -m pip uninstall --yes tuner-cubist",
    "uv": "uv pip uninstall --python /env/bin/python tuner-cubist",
    "pipx": "pipx uninject tuner tuner-cubist",
    "uv tool": "uv tool install 'tuner[tensorboard]' --with-editable tuner-own",
}


@pytest.mark.parametrize(("tool", "command"), ADDED.items(), ids=str)
def test_plugins_are_installed_by_the_tool_that_made_the_environment(tool, command):
    assert install(tool) == command


@pytest.mark.parametrize(("tool", "command"), REMOVED.items(), ids=str)
def test_plugins_are_removed_by_the_tool_that_made_the_environment(tool, command):
    assert uninstall(tool, "tuner-cubist") == command


def test_paths_of_windows_reach_the_installer_without_backslashes():
    environment = Environment(tool="pipx", python=PYTHON)
    command = install_command(environment, ("tuner-x",), PureWindowsPath(r"C:\Users\me\tuner\constraints.txt"))
    assert command.arguments[-1] == "--pip-args=--constraint C:/Users/me/tuner/constraints.txt --only-binary :all:"


def test_only_uv_tools_are_left_to_the_user_to_change():
    for tool in ADDED:
        environment = Environment(tool=tool, python=PYTHON)
        assert install_command(environment, ["tuner-x"], CONSTRAINTS).runs == (tool != "uv tool")


def test_a_uv_tool_that_has_a_plugin_gets_its_new_version_instead():
    assert install("uv tool", "tuner_cubist>=2").endswith("--with-editable tuner-own --with 'tuner_cubist>=2'")


@pytest.mark.parametrize("tool", ["pip", "uv", "conda"])
def test_sources_are_built_and_versions_renewed_only_on_request(tool):
    command = install(tool, allow_sdist=True, upgrade=True)
    assert "--only-binary" not in command and "--upgrade" in command and "--constraint" in command


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("--index-url=http://evil", "is an option"),
        ("tuner x", "no package requirement"),
        ("./plugin", "not a wheel"),
        ("plugin.tar.gz", "not a wheel"),
        ("git+https://example.org/x", "not a wheel"),
        ("tuner-x @ https://example.org/x.zip", "not a wheel"),
    ],
)
def test_options_and_code_in_disguise_are_refused(wanted, words):
    with pytest.raises(UsageError, match=words):
        install("pip", wanted)


@pytest.mark.parametrize("wanted", ["/x/tuner_x-1-py3-none-any.whl", "tuner-x[extra]>=1,<2", "x @ https://e.org/x.whl"])
def test_requirements_and_wheels_are_taken(wanted):
    assert install("pip", wanted).count("install") == 1


def test_a_python_of_the_system_is_refused_with_the_way_to_an_own_one():
    with pytest.raises(UsageError) as refused:
        install("externally managed")
    assert "EXTERNALLY-MANAGED" in str(refused.value) and "python -m venv" in str(refused.value)


def test_an_environment_without_installer_is_refused_with_the_way_to_one():
    with pytest.raises(UsageError, match="no installer") as refused:
        uninstall("nothing", "x")
    assert "ensurepip" in str(refused.value)
