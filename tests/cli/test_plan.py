"""``tuner plan``: what a run will need, before anything is loaded or downloaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.conftest import Project
from tests.core.plan.plans import document
from tuner.cli.main import main


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(document("flux", sample={"prompts": ["a red dog"]})), encoding="utf-8")
    return str(path)


def test_every_phase_is_shown_with_its_memory(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "--device", "h200"]) == 0
    streams = capsys.readouterr()
    for expected in (
        "on NVIDIA H200",
        "captions",
        "latents",
        "step",
        "preview",
        "save",
        "a step holds weights 23.80 GB",
        "give way when memory is short: 11.02 GB have to be there",
    ):
        assert expected in streams.out
    assert "1000 steps in" in streams.out and "estimated" in streams.out
    assert "model.path: " in streams.err and "is not here: sizes are those of the published model" in streams.err


def test_what_does_not_fit_is_said_and_fails(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "--device", "4090"]) == 1
    assert "does not fit:" in capsys.readouterr().out
    assert main(["plan", config, "--device", "4090", "--set", "memory.checkpointing=block", "--set",
                 "quantize.denoiser=int8"]) == 0  # fmt: skip


def test_the_keys_for_a_given_memory_are_named_and_work(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "--device", "4090", "--vram", "12GB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["needed"] <= 12e9 < found["needed_unchanged"]
    settings = [f"--set={key}={json.dumps(value)}" for key, value in found["set"].items()]
    assert main(["plan", config, "--device", "4090", "--json", *settings]) == 0
    assert json.loads(capsys.readouterr().out)["needed"] == found["needed"]
    assert main(["plan", config, "--vram", "12GB"]) == 0
    out = capsys.readouterr().out
    assert "fits into 12.00 GB" in out
    assert all(f"  --set {key}={value}" in out for key, value in found["set"].items())
    assert "time: not known for this device" in out or "s per step" in out


def test_too_little_memory_gets_a_plain_no(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "--vram", "3GB"]) == 1
    assert "does not fit into 3.00 GB: the least that is needed is" in capsys.readouterr().out


def test_memory_of_a_device_that_has_none_is_refused(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "--device", "cpu", "--vram", "8GB"]) == 2
    assert "a CPU has no memory of its own" in capsys.readouterr().err


def test_a_model_that_declares_no_costs_has_no_plan(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", project.config()]) == 2
    message = capsys.readouterr().err
    assert "no plan for the model 'cubist'" in message and "does not declare what the model costs" in message


def test_absent_weights_of_a_model_without_published_sizes_are_asked_for(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", project.config(model={"path": "absent/weights.safetensors"})]) == 2
    message = capsys.readouterr().err
    assert "no plan without weights" in message and "absent/weights.safetensors" in message


def test_a_plan_with_pictures_never_imports_torch(tmp_path: Path) -> None:
    for number in range(2):
        Image.new("RGB", (256, 256), (90 * number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a square", encoding="utf-8")
    raw = document("sd35-medium", cache={"dir": str(tmp_path / "cache")})
    source = {"id": "a", "path": str(tmp_path)}
    raw["data"] = {"sets": [{"resolution": 256, "sources": [source]}], "workers": {"scan": 0}}
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    script = (
        "import sys; from tuner.cli.main import main; code = main(sys.argv[1:])\n"
        "sys.exit(','.join({'torch', 'numpy', 'transformers', 'diffusers'} & set(sys.modules)) or code)"
    )
    arguments = ["plan", str(tmp_path / "config.json"), "--device", "4090", "--vram", "12GB"]
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "disk: encoded captions" in result.stdout
