"""What ``tuner plugins new`` writes works as it comes: it builds, passes the kit, trains."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.fixtures.wheels import build_wheel, call, environment, install_wheels
from tuner.cli.main import main
from tuner.core.errors import UsageError
from tuner.core.lifecycle.scaffold import write_plugin

TUNER = (sys.executable, "-m", "tuner")
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist")


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new model and a new extension."""
    folder = tmp_path_factory.mktemp("projects")
    assert main(["plugins", "new", "paint-box", "--path", str(folder)]) == 0
    assert main(["plugins", "new", "echo-2", "--template", "extension", "--path", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def site(projects: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both as installed wheels."""
    folder = tmp_path_factory.mktemp("site")
    wheels = [build_wheel(projects / name, folder) for name in ("tuner-paint-box", "tuner-echo-2")]
    return install_wheels(wheels, folder / "packages")


def test_no_placeholder_is_left_and_the_style_is_ours(projects):
    for path in projects.rglob("*"):
        if path.is_file():
            text = path.read_text(encoding="utf-8").lower()
            assert not any(word in text for word in ("my_model", "my-model", "mymodel", "{version}")), path
    for project in projects.iterdir():
        call([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=project)
        call([sys.executable, "-m", "ruff", "format", "--no-cache", "--check", "."], cwd=project)


def test_both_are_in_order_once_installed(site, tmp_path):
    env = environment(site, TUNER_CACHE_DIR=str(tmp_path))
    assert "model paint-box (tuner-paint-box 0.1.0): in order" in call(
        [*TUNER, "plugins", "check", "paint-box", "echo-2"], env=env
    ).stdout  # fmt: skip


def test_the_new_model_passes_the_kit(projects, site):
    result = call([*PYTEST, "."], env=environment(site), cwd=projects / "tuner-paint-box")
    assert " passed" in result.stdout and "failed" not in result.stdout


def test_the_new_extension_passes_its_test(projects, site):
    call([*PYTEST, "."], env=environment(site), cwd=projects / "tuner-echo-2")


def test_the_new_model_is_checked_and_trains_from_its_preset_with_the_new_extension(projects, site, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    Image.effect_noise((64, 64), 50).convert("RGB").save(images / "a.png")
    (images / "a.txt").write_text("noise", encoding="utf-8")
    call([sys.executable, str(projects / "tuner-paint-box/tests/tiny.py"), "tiny.safetensors"],
         env=environment(site), cwd=tmp_path)  # fmt: skip
    config = {
        "model": {"path": "tiny.safetensors"},
        "data": {"sets": [{"resolution": 64, "sources": [{"id": "a", "path": "images"}],
                           "buckets": {"min": 32, "step": 8}}],
                 "workers": {"scan": 0, "cache": 0, "load": 0}},
        "cache": {"dir": "cache"},
        "checkpoint": {"dir": "out"},
        "extensions": ["echo-2"],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    settings = ["config.json", "--model", "paint-box", "--preset", "paint-box/lora", "--set", "train.steps=3"]
    checked = call([*TUNER, "check", *settings], env=environment(site), cwd=tmp_path).stdout
    assert "vae: code alone, without weights" in checked and "no problems found" in checked
    call([*TUNER, "train", *settings], env=environment(site), cwd=tmp_path)
    assert (tmp_path / "out/out.safetensors").is_file()
    assert '"train": {\n    "mode": "lora"' in (tmp_path / "out/config.resolved.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["Paint", "paint_box", "-x", "paint--box", "9lives", ""])
def test_an_unfit_name_is_refused(name, tmp_path):
    with pytest.raises(UsageError, match="name of a plugin"):
        write_plugin(name, "model", tmp_path)


def test_taken_names_and_folders_are_refused(projects):
    with pytest.raises(UsageError, match="already"):
        write_plugin("anima", "model", projects)
    with pytest.raises(UsageError, match="is there already"):
        write_plugin("paint-box", "model", projects)
