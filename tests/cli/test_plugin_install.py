"""Installing plugins from an index on the loopback into throw-away environments: what changes, and what must not."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.package_index import new_environment, serve, write_sdist, write_wheel
from tuner.core.errors import UsageError

MODELS = "[tuner.models]\n{name} = tuner_{name}:plugin\n"
EXTENSION = """
import sys
from tuner import ExtensionPlugin
plugin = ExtensionPlugin(name="quiet", api=(1, 0), hooks="tuner_quiet")
"""


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """Good and bad plugins, another torch, and a package that brings no plugin."""
    folder = tmp_path_factory.mktemp("index")
    quiet = "[tuner.extensions]\nquiet = tuner_quiet:plugin\n"
    for version in ("0.9", "1.0"):
        write_wheel(
            folder, "tuner-quiet", version, entry=quiet, requires=["pluggy>=1"], modules={"tuner_quiet.py": EXTENSION}
        )
    broken = {"tuner_broken.py": "import a_library_that_is_not_there\n"}
    write_wheel(folder, "tuner-broken", entry=MODELS.format(name="broken"), modules=broken)
    write_wheel(folder, "tuner-greedy", entry=MODELS.format(name="greedy"), requires=["torch==1.0"])
    write_wheel(folder, "torch", "1.0")
    write_wheel(folder, "pure-library")
    write_sdist(folder, "tuner-source")
    with serve(folder) as served:
        yield served


class Installation:
    """An environment, the user's folder, and the program inside."""

    def __init__(self, folder: Path, index: str) -> None:
        self.python = new_environment(folder / "environment")
        self.config = folder / "config"
        # Settings of this machine's pip could name other indexes.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
        self.variables = kept | {
            "PIP_INDEX_URL": index, "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_CACHE_DIR": "1", "TUNER_CONFIG_DIR": str(self.config), "TUNER_CACHE_DIR": str(folder / "cache"),
            "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def run(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        return self.call(str(self.python), "-m", "tuner", "plugins", *arguments, code=code)

    def call(self, *command: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=self.variables)
        assert result.returncode == code, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result

    def record(self) -> dict[str, str]:
        return json.loads((self.config / "plugins.json").read_text())["plugins"]

    def torch(self) -> str:
        return self.call(
            str(self.python), "-c", "from importlib.metadata import version; print(version('torch'))"
        ).stdout


@pytest.fixture
def here(tmp_path: Path, index: tuple[str, list[str]]) -> Installation:
    return Installation(tmp_path, index[0])


def test_a_plugin_is_installed_checked_listed_and_removed(here, index):
    index[1].clear()
    done = here.run("install", "tuner-quiet<1")
    assert "runs its code with your rights" in done.stdout
    assert "--only-binary :all: 'tuner-quiet<1'" in done.stdout
    assert "extension quiet (tuner-quiet 0.9): in order" in done.stdout
    assert {path.split("/")[2] for path in index[1]} == {"tuner-quiet"}
    assert here.record() == {"tuner-quiet": "tuner-quiet<1"}
    assert here.run("list", "--requirements").stdout == "tuner-quiet==0.9\n"
    assert "in order" in here.run("install", "--upgrade", "tuner-quiet").stdout
    assert here.run("list", "--requirements").stdout == "tuner-quiet==1.0\n"
    assert "removed: tuner-quiet" in here.run("uninstall", "quiet").stdout
    assert here.run("list", "--requirements").stdout == ""
    assert here.record() == {}


def test_a_dry_run_prints_the_command_and_the_resolver_would_add_the_plugin_alone(here):
    printed = here.run("install", "--dry-run", "tuner-quiet").stdout
    [command] = [line.removeprefix("$ ") for line in printed.splitlines() if line.startswith("$ ")]
    assert here.run("list", "--requirements").stdout == ""
    assert not (here.config / "plugins.json").exists()
    report = here.call(*shlex.split(command), "--dry-run", "--quiet", "--report", "-").stdout
    assert [each["metadata"]["name"] for each in json.loads(report)["install"]] == ["tuner-quiet"]


def test_torch_is_never_swapped_for_a_plugin(here):
    before = here.torch()
    refused = here.run("install", "tuner-greedy", code=2)
    assert "held at their versions on purpose" in refused.stderr
    assert here.torch() == before
    assert here.run("list", "--requirements").stdout == ""


def test_sources_are_not_built_unless_allowed(here, index, tmp_path):
    assert "the installer ended with exit code" in here.run("install", "tuner-source", code=2).stderr
    assert not list(tmp_path.parent.glob("index*/built"))


def test_a_broken_plugin_is_told_at_once_does_not_stop_others_and_can_be_removed(here):
    done = here.run("install", "tuner-broken", code=1)
    assert "model broken (tuner-broken 1.0): not usable" in done.stdout
    assert "a_library_that_is_not_there" in done.stderr and "tuner plugins uninstall tuner-broken" in done.stderr
    assert "in order" in here.run("install", "tuner-quiet").stdout
    assert "plugin 'broken' (tuner-broken 1.0) is not usable" in here.run("list").stderr
    here.run("uninstall", "broken")
    assert here.run("list").stderr == ""
    assert here.record() == {"tuner-quiet": "tuner-quiet"}


def test_a_package_without_plugin_is_not_recorded(here):
    assert "no plugin came with pure-library" in here.run("install", "pure-library", code=1).stderr
    assert not (here.config / "plugins.json").exists()
    assert "brings no plugin" in here.run("check", "pure-library", code=2).stderr
    assert "there is no installed plugin" in here.run("uninstall", "pure-library", code=2).stderr


def test_sync_puts_back_what_a_new_environment_lacks(here, tmp_path, index):
    assert "every recorded plugin is installed" in here.run("sync").stdout
    here.run("install", "tuner-quiet<1")
    fresh = Installation(tmp_path / "fresh", index[0])
    fresh.variables["TUNER_CONFIG_DIR"] = str(here.config)
    assert "missing: tuner-quiet" in fresh.run("sync", "--dry-run").stdout
    assert fresh.run("list", "--requirements").stdout == ""
    assert "extension quiet (tuner-quiet 0.9): in order" in fresh.run("sync").stdout


def test_built_in_models_cannot_be_removed(here):
    assert "is built in" in here.run("uninstall", "anima", code=2).stderr


def test_a_folder_is_handed_on_and_remembered_by_its_full_path(tmp_path, monkeypatch, capsys):
    from tuner.cli.plugin_install import install

    monkeypatch.setenv("TUNER_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plugins/tuner-own").mkdir(parents=True)
    install(["plugins/tuner-own"], upgrade=False, allow_sdist=True, dry_run=True)
    assert str(tmp_path / "plugins/tuner-own") in "".join(capsys.readouterr().out.split("\n"))
    with pytest.raises(UsageError, match="no such file"):
        install(["plugins/tuner-other"], upgrade=False, allow_sdist=True, dry_run=True)
