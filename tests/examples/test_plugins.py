"""The example plugins as strangers install them: wheels beside the program, with a broken plugin among them."""

from __future__ import annotations

import json
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from tests.fixtures.wheels import ROOT, build_wheel, call, environment, install_wheels
from tuner.core.track.events import read_events

PLUGINS = ROOT / "examples" / "plugins"
MOSAIC, CAPTION_LOG = PLUGINS / "tuner-mosaic", PLUGINS / "tuner-caption-log"
LINES = 300
BROKEN = "raise ImportError('this build is for another machine')\n"


def program() -> str:
    """The installed command line."""
    found = shutil.which("tuner", path=sysconfig.get_path("scripts"))
    assert found, "tuner is not installed in this environment"
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model and the extension, installed from wheels."""
    folder = tmp_path_factory.mktemp("site")
    return install_wheels([build_wheel(project, folder) for project in (MOSAIC, CAPTION_LOG)], folder / "packages")


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plugin that cannot be imported, and one that needs a version of this program that does not exist."""
    folder = tmp_path_factory.mktemp("broken")
    for name, requires in (("shattered", ""), ("tomorrow", "Requires-Dist: tuner>=99\n")):
        (folder / f"tuner_{name}").mkdir()
        (folder / f"tuner_{name}" / "__init__.py").write_text(BROKEN, encoding="utf-8")
        info = folder / f"tuner_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tuner-{name}\nVersion: 1.0\n{requires}")
        (info / "entry_points.txt").write_text(f"[tuner.models]\n{name} = tuner_{name}:plugin\n")
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, site: Path) -> Path:
    """Weights, pictures and a configuration."""
    folder = tmp_path_factory.mktemp("project")
    call([sys.executable, str(MOSAIC / "tests/tiny.py"), "tiny.safetensors"], env=environment(site), cwd=folder)
    (folder / "images").mkdir()
    for number, size in enumerate(((64, 64), (96, 48))):
        Image.effect_noise(size, 60).convert("RGB").save(folder / f"images/{number}.png")
        (folder / f"images/{number}.txt").write_text(f"noise of kind {number}", encoding="utf-8")
    config = {
        "model": {"path": "tiny.safetensors"},
        "data": {"sets": [{"resolution": 64, "sources": [{"id": "a", "path": "images"}],
                           "buckets": {"min": 32, "step": 8}}],
                 "workers": {"scan": 0, "cache": 0, "load": 0}},
        "cache": {"dir": "cache"},
        "train": {"steps": 4},
        "sample": {"prompts": ["noise --w 64 --h 64 --s 2"]},
        "extensions": ["caption-log"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def train(project: Path, name: str, *paths: Path) -> tuple[Path, str]:
    """Train through the command line; the run folder and what was said on standard error."""
    env = environment(*paths, TUNER_CACHE_DIR=str(project / f"memory-{name}"))
    command = [program(), "train", "config.json", "--model", "mosaic", "--preset", "mosaic/lora-text"]
    result = call([*command, "--set", f"checkpoint.dir={name}"], env=env, cwd=project)
    return project / name, result.stderr


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in read_events(folder / "events.jsonl") if event["kind"] == "step"]


def test_the_model_is_small_enough_to_read():
    texts = [path.read_text(encoding="utf-8") for path in (MOSAIC / "src").rglob("*.py")]
    assert sum(bool(line.strip()) for text in texts for line in text.splitlines()) <= LINES


def test_the_model_passes_the_kit(site):
    result = call(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "."],
        env=environment(site), cwd=MOSAIC,
    )  # fmt: skip
    assert " passed" in result.stdout


def test_the_model_trains_through_the_installed_program_and_the_extension_sees_its_captions(site, project):
    folder, _ = train(project, "alone", site)
    with safe_open(folder / "alone.safetensors", framework="pt") as file:
        assert file.metadata()["modelspec.architecture"] == "mosaic/lora"
        assert any(key.startswith("bytes.") for key in file.keys())  # noqa: SIM118
    assert (folder / "samples/step-000004/sheet.png").is_file()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [(each["name"], each["dist"], each["version"]) for each in manifest["plugins"]] == [
        ("mosaic", "tuner-mosaic", "0.3.0"), ("caption-log", "tuner-caption-log", "0.2.0"),
    ]  # fmt: skip
    assert all(each["record"] for each in manifest["plugins"])


def test_the_extension_writes_down_what_was_encoded(site, project):
    env = environment(site, TUNER_CACHE_DIR=str(project / "memory"))
    command = [program(), "train", "config.json", "--model", "mosaic", "--preset", "mosaic/lora"]
    call([*command, "--set", "checkpoint.dir=logged"], env=env, cwd=project)
    lines = [json.loads(line) for line in (project / "logged/captions.jsonl").read_text().splitlines()]
    assert {"", "noise of kind 0", "noise of kind 1"} <= {line["caption"] for line in lines}


def test_broken_plugins_beside_it_change_nothing_but_a_warning(site, broken, project):
    alone = losses(project / "alone") if (project / "alone").exists() else losses(train(project, "alone", site)[0])
    folder, _ = train(project, "beside", site, broken)
    assert losses(folder) == alone
    env = environment(site, broken, TUNER_CACHE_DIR=str(project / "memory-beside"))
    told = call([program(), "--help"], env=env)
    assert "plugin 'tomorrow' (tuner-tomorrow 1.0) is not usable: needs tuner>=99" in told.stderr
    assert "models:" in told.stdout and "mosaic" in told.stdout
    checked = call([program(), "plugins", "check"], env=env, code=1)
    assert "model mosaic (tuner-mosaic 0.3.0): in order" in checked.stdout
    assert "model shattered (tuner-shattered 1.0): not usable" in checked.stdout
    assert "this build is for another machine" in checked.stderr
    # What was found once is told from then on, without importing it again.
    assert "plugin 'shattered' (tuner-shattered 1.0) is not usable" in call([program(), "--help"], env=env).stderr


def test_a_broken_plugin_is_an_error_where_it_is_asked_for(site, broken, project):
    env = environment(site, broken, TUNER_CACHE_DIR=str(project / "memory-asked"))
    result = call([program(), "train", "config.json", "--model", "shattered"], env=env, cwd=project, code=2)
    assert "plugin 'shattered' (tuner-shattered 1.0) is not usable" in result.stderr
    assert "Traceback" not in result.stderr
