"""Whole trainings: several parts train at their own rates, encoders are dropped, pictures are made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.fixtures.drawing import drawn, recorded
from tests.fixtures.runs import make_pictures, run_document
from tuner.core.config import load_config
from tuner.core.track.events import read_events
from tuner.core.train.run import train


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def document(tiny, pictures, tmp_path):
    """(flavour, folder of the run, sections) -> a configuration that trains in seconds."""

    def make(flavour: str, name: str = "out", **sections: Any) -> dict[str, Any]:
        cache, out = tmp_path / "cache", tmp_path / name
        return run_document(tiny(flavour), pictures, cache=cache, out=out, steps=3, **sections)

    return make


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(folder / "events.jsonl") if event["kind"] == kind]


def test_denoiser_and_encoders_train_at_their_own_rates_with_pictures(document, tmp_path):
    rates = {"clip_l": 1e-4, "t5": 5e-5}
    config = document(
        "sd35m",
        train={"steps": 2, "components": ["denoiser", "clip_l", "t5"]},
        optimizer={"lr": 1e-3, "lr_by_component": rates},
        sample={"prompts": ["a red dog --w 64 --h 48 --s 2 --l 3 --n cat"], "every": 2},
        memory={"checkpointing": "block"},
    )
    with recorded() as before:
        train(config)
    out = tmp_path / "out"
    # The same pictures again without the training: of the base, and with all three adapters.
    again = drawn(out, "--adapter-strengths", "0,1", "--out", tmp_path / "again")
    assert all(torch.equal(one, other) for one, other in zip(again, before, strict=True))
    assert events(out, "step")[0]["lr"] == {"denoiser": 1e-3, **rates}
    assert (out / "samples/step-000002/000.png").is_file()
    tensors = load_file(out / "out.safetensors")
    assert {name.split("_")[1] for name in tensors} == {"unet", "te1", "te3"}
    trained = {name.split("_")[1] for name, value in tensors.items() if "lora_up" in name and value.any()}
    assert trained == {"unet", "te1", "te3"}
    cached = json.loads((out / "config.resolved.json").read_text())["cache"]["text"]
    assert cached == "disk" and events(out, "stage")[0]["items"] > 0


def test_dropped_encoders_and_random_windows_change_a_run_and_repeat_with_it(document, tmp_path):
    def losses(name: str, model: dict[str, Any], **sections: Any) -> list[float]:
        config = document("sd35m", name, **sections)
        config["model"] |= model
        train(config)
        return [event["loss"] for event in events(tmp_path / name, "step")]

    plain = losses("plain", {})
    dropout = {"text_encoder": {"dropout": {"clip_g": 0.6, "t5": 0.6}}}
    dropped = losses("dropped", {}, **dropout)
    assert dropped != plain and losses("again", {}, **dropout) == dropped
    moved = losses("moved", {"pos_embed_random_crop": 1.0})
    assert moved != plain and losses("moved-again", {"pos_embed_random_crop": 1.0}) == moved
    assert losses("scaled", {"scaled_pos_embed": True}) != plain


def test_the_header_says_what_other_programs_ask_for(document, tmp_path):
    train(document("sd35l", train={"steps": 1}, text_encoder={"mask_padding": {"t5": True}}, noise={"shift": 3.0}))
    with safe_open(tmp_path / "out/out.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "stable-diffusion-3-5-large/lora"
    assert metadata["ss_network_module"] == "networks.lora_sd3"
    assert (metadata["ss_training_shift"], metadata["ss_apply_t5_attn_mask"]) == ("3.0", "True")


def test_the_example_trains_on_a_tiny_model_in_its_layout(tiny, pictures, tmp_path):
    """examples/sd3/lora.json beside files of the same names, made shorter and smaller; then continued to its end."""
    home, model = tmp_path / "examples/sd3", tiny("sd35m")
    for name in ("clip", "t5"):
        shutil.copytree(model["tokenizers"][name]["path"], home / f"models/{name}_tokenizer")
    shutil.copy(model["path"], home / "models/sd3.5_medium_incl_clips_t5xxl.safetensors")
    shutil.copytree(pictures, home / "images")
    shutil.copy(Path(__file__).parents[3] / "examples/sd3/lora.json", home / "lora.json")
    smaller = [
        "data.sets.0.resolution=64", 'data.sets.0.buckets={"min": 32, "step": 16}', "precision.compute=fp32",
        'sample.prompts=["a portrait --w 64 --h 48 --s 2"]',
    ]  # fmt: skip
    for steps in (1, 3):
        raw = load_config(home / "lora.json", model="sd3", sets=[*smaller, f"train.steps={steps}"])
        assert train(raw, resume="auto").steps == steps
    assert [event["step"] for event in events(tmp_path / "out/sd3", "step")] == [1, 2, 3]
    names = set(load_file(tmp_path / "out/sd3/sd3.safetensors"))
    assert names and not any("adaLN" in name for name in names)
    assert (tmp_path / "out/sd3/samples/step-000003/sheet.png").is_file()
