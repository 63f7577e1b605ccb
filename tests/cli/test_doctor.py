"""``tuner doctor``: faults are named with what mends them, and the bundle gives nothing away."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Project
from tests.cli.test_report import make_run
from tests.core.registry.toys import Site
from tests.helpers import no_network
from tuner.cli.main import main
from tuner.core.lifecycle import machine
from tuner.core.lifecycle.bundle import REMOVED, redacted
from tuner.core.lifecycle.machine import asks_for_other_torch, import_error, packages


@pytest.fixture(autouse=True)
def in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def few_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing the extras of this environment would take seconds each."""
    find = machine.find_spec
    monkeypatch.setattr(machine, "find_spec", lambda name: find(name) if name == "xformers" else None)


def foreign_xformers(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package for another torch, which fails when it is imported."""
    (site.folder / "xformers").mkdir()
    (site.folder / "xformers" / "__init__.py").write_text("raise ImportError('made for another torch')\n")
    info = site.folder / "xformers-0.0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: xformers\nVersion: 0.0.1\nRequires-Dist: torch==1.0\n")
    (info / "top_level.txt").write_text("xformers\n")
    monkeypatch.setenv("PYTHONPATH", str(site.folder))


def test_faults_come_with_what_mends_them_and_the_bundle_keeps_secrets(
    project: Project, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site.model("dadaist", descriptor="raise RuntimeError('boom')")
    foreign_xformers(site, monkeypatch)
    no_network(monkeypatch)
    monkeypatch.setenv("TUNER__SAMPLE__SEED", "3")
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz")
    config = project.config(
        sample={"prompts": ["a very private dragon"], "negative": "my neighbour"},
        checkpoint={"metadata": {"author": "Jane Roe"}},
    )
    make_run("earlier", rank=4, losses=[0.5], deltas=[])
    assert main(["doctor", config, "--bundle", "report.zip", "--run", "earlier", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    faults = {each["what"]: each["fix"] for each in found["faults"]}
    text = "\n".join(faults)
    assert "xformers 0.0.1 is made for torch==1.0" in text
    assert "xformers 0.0.1 is installed and fails: ImportError: made for another torch" in text
    assert "model dadaist: plugin 'dadaist' (tuner-dadaist 0.3) is not usable: RuntimeError: boom" in text
    assert faults["environment variables change every configuration: TUNER__SAMPLE__SEED"].startswith("unset them")
    assert {each["name"] for each in found["plugins"] if not each["problems"]} >= {"cubist"}
    assert {each["use"] for each in found["disks"]} >= {"the run", "this folder", "downloads"}

    with zipfile.ZipFile("report.zip") as archive:
        parts = {name: archive.read(name).decode() for name in archive.namelist()}
    run = {"run/config.resolved.json", "run/manifest.json", "run/events.jsonl"}
    assert set(parts) == {"README.txt", "doctor.json", "packages.json", "config.json"} | run
    assert set(parts) == set(found["bundle"]["files"])
    whole = "\n".join(parts.values())
    for secret in ("hf_abc", "dragon", "neighbour", "Jane", str(tmp_path), str(Path.home())):
        assert secret not in whole
    assert json.loads(parts["config.json"])["train"] == {"steps": 4}
    assert "config.json: the configuration, paths and texts removed" in parts["README.txt"]
    assert main(["doctor", "--bundle", "report.zip"]) == 2
    assert "this file exists" in capsys.readouterr().err


def test_what_is_redacted() -> None:
    value: dict[str, Any] = {
        "api_key": "x1", "token": "t", "max_tokens": {"t5": 512}, "prompts": ["a", "b"], "enabled": True,
        "path": "/srv/data/hero.safetensors", "url": "https://jane:pw@host.example/x",
        "note": "read /srv/data/a.png with hf_0123456789abcdefghij",
        "steps": 4, "captions": {"prefix": "me", "from": "file"}, "/srv/data/b.png": 1,
    }  # fmt: skip
    assert redacted(value) == {
        "api_key": REMOVED, "token": REMOVED, "max_tokens": {"t5": 512}, "prompts": REMOVED, "enabled": True,
        "path": "…/hero.safetensors", "url": "https://host.example/x",
        "note": f"read …/a.png with {REMOVED}", "steps": 4, "captions": {"prefix": REMOVED, "from": "file"},
        "…/b.png": 1,
    }  # fmt: skip


def test_a_package_that_works_and_one_that_is_not_there_are_no_faults() -> None:
    assert import_error("json") is None
    assert "No module named 'nothing_here'" in str(import_error("nothing_here"))
    assert asks_for_other_torch("safetensors") is None
    assert all(package.fits for package in packages())


def test_what_the_system_does_not_tell_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(path)

    class Cuda:
        def get_device_name(self, index: int) -> str:
            return "Card"

        def get_device_capability(self, index: int) -> tuple[int, int]:
            return 9, 0

        def mem_get_info(self, index: int) -> tuple[int, int]:
            raise RuntimeError("CUDA error: device is busy\nand more")

        def is_available(self) -> bool:
            return True

        def device_count(self) -> int:
            return 1

    monkeypatch.setattr("shutil.disk_usage", refuse)
    monkeypatch.setattr("torch.cuda", Cuda())
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["disks"] == []
    assert any("Card cannot be used: CUDA error: device is busy" in fault["what"] for fault in found["faults"])
    assert main(["doctor"]) == 1
    assert "device is busy" in capsys.readouterr().err


def test_a_torch_that_breaks_the_process_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(machine.sys.modules, "torch")
    monkeypatch.setattr(machine, "import_error", lambda module: f"importing {module} ends the process with -6")
    assert main(["doctor", "--json"]) == 1
    (fault,) = [each for each in json.loads(capsys.readouterr().out)["faults"] if each["serious"]]
    assert fault["what"] == "torch cannot be imported: importing torch ends the process with -6"


def test_records_of_a_run_that_are_damaged_are_told_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.resolved.json").write_text("{ half", encoding="utf-8")
    main(["doctor", "--bundle", "x.zip", "--run", str(tmp_path)])
    with zipfile.ZipFile("x.zip") as archive:
        assert "not readable" in json.loads(archive.read("run/config.resolved.json"))


def test_a_run_folder_is_needed_for_its_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--run", "x"]) == 2
    assert "--run is for --bundle" in capsys.readouterr().err
    assert main(["doctor", "--bundle", "x.zip", "--run", str(tmp_path)]) == 2
    assert "this is not a run folder" in capsys.readouterr().err
    assert not (tmp_path / "x.zip").exists()
