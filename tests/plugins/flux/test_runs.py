"""Whole trainings: parts that train at their own rates, guidance, previews, prediction types, restarts from a file."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.fixtures.drawing import drawn, recorded
from tests.fixtures.runs import counted, make_pictures, run_document
from tests.helpers import delta_weight
from tests.plugins.flux.test_modulation import MODULATIONS
from tuner.core.adapters.convert import convert_adapter
from tuner.core.adapters.files import read_adapter
from tuner.core.adapters.formats import modules_of
from tuner.core.config import load_config
from tuner.core.registry import open_run
from tuner.core.track.events import read_events
from tuner.core.train.run import train
from tuner.plugins.flux import hooks
from tuner.plugins.flux.names import MAPS


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


EXAMPLE = Path(__file__).parents[3] / "examples/flux/lora.json"
Document = Callable[..., dict[str, Any]]
Calls = list[dict[str, Any]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def documents(tiny, pictures, cache) -> Callable[[Path], Document]:
    """(folder for runs) -> (flavour, name of the run, sections) -> a configuration that trains in seconds."""

    def inside(folder: Path) -> Document:
        def make(flavour: str = "dev", name: str = "out", **sections: Any) -> dict[str, Any]:
            return run_document(tiny(flavour), pictures, cache=cache, out=folder / name, steps=2, **sections)

        return make

    return inside


@pytest.fixture
def document(documents, tmp_path) -> Document:
    return documents(tmp_path)


@contextmanager
def recorded_calls() -> Iterator[Calls]:
    """What the denoiser of a run is called with."""
    calls: Calls = []
    original = hooks.load_denoiser

    def load(*args: Any, **kwargs: Any):
        denoiser = original(*args, **kwargs)
        inner = denoiser.forward

        def forward(tokens: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
            calls.append({"training": torch.is_grad_enabled(), **named})
            return inner(tokens, *rest, **named)

        denoiser.forward = forward
        return denoiser

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks, "load_denoiser", load)
        yield calls


@pytest.fixture
def given() -> Iterator[Calls]:
    with recorded_calls() as calls:
        yield calls


@pytest.fixture(scope="module")
def plain(documents, tmp_path_factory) -> tuple[Path, Calls]:
    """The folder of a run with nothing but defaults, and what its denoiser was called with."""
    folder = tmp_path_factory.mktemp("plain")
    with recorded_calls() as calls:
        train(documents(folder)())
    return folder / "out", calls


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(folder / "events.jsonl") if event["kind"] == kind]


def trained_parts(path: Path) -> set[str]:
    """Second words of the names of adapters whose up matrix is not zero."""
    return {name.split("_")[1] for name, value in load_file(path).items() if "lora_up" in name and value.any()}


@pytest.mark.parametrize("encoders", [["clip_l"], ["t5"], ["clip_l", "t5"]], ids="+".join)
def test_encoders_train_at_their_own_rates_while_the_others_are_cached(document, tmp_path, encoders):
    rates = {"clip_l": 1e-4, "t5": 5e-5}
    rates = {name: rates[name] for name in encoders}
    config = document(
        train={"steps": 2, "components": ["denoiser", *encoders]},
        optimizer={"lr": 1e-3, "lr_by_component": rates},
        memory={"checkpointing": "block"},
    )
    train(config)
    out = tmp_path / "out"
    assert events(out, "step")[0]["lr"] == {"denoiser": 1e-3, **rates}
    names = {"clip_l": "te1", "t5": "te3"}
    assert trained_parts(out / "out.safetensors") == {"unet", *(names[name] for name in encoders)}


def test_encoders_can_train_without_the_denoiser(document, tmp_path):
    train(document(train={"steps": 2, "components": ["clip_l"]}))
    assert trained_parts(tmp_path / "out" / "out.safetensors") == {"te1"}


def test_frozen_modulations_run_once_per_step_of_a_training_that_recomputes(document, monkeypatch):
    runs: list[Counter[str]] = []
    original = hooks.load_denoiser

    def load(*args: Any, **kwargs: Any):
        denoiser = original(*args, **kwargs)
        runs.append(counted(denoiser, MODULATIONS))
        return denoiser

    monkeypatch.setattr(hooks, "load_denoiser", load)
    train(document(network={"rank": 2, "preset": "all+ffs"}, memory={"checkpointing": "block"}, train={"steps": 3}))
    assert len(runs[0]) == 6 and set(runs[0].values()) == {3}


def test_training_guidance_is_drawn_per_sample_and_the_file_says_what_it_is(document, given, tmp_path):
    train(document(guidance={"embedded": [1, 4]}, text_encoder={"mask_padding": {"t5": True}}))
    values = torch.cat([call["guidance"] for call in given if call["training"]])
    assert len(set(values.tolist())) == 4 and float(values.min()) >= 1 and float(values.max()) <= 4
    with safe_open(tmp_path / "out" / "out.safetensors", "pt") as file:
        metadata = file.metadata()
    wanted = {
        "modelspec.architecture": "flux-1-dev/lora", "ss_base_model_version": "flux1",
        "ss_guidance_scale": "(1.0, 4.0)", "ss_apply_t5_attn_mask": "True", "ss_model_prediction_type": "raw",
        "ss_timestep_sampling": "flux_shift", "ss_network_dim": "2",
    }  # fmt: skip
    assert {name: metadata[name] for name in wanted} == wanted


def test_training_guidance_is_one_unless_something_else_is_asked_for(plain):
    assert {value for call in plain[1] for value in call["guidance"].tolist()} == {1.0}


def test_previews_use_embedded_guidance_and_guidance_by_a_negative_prompt(document, given, tmp_path):
    prompts = ["a dog --w 64 --h 48 --s 2", "a dog --w 64 --h 48 --s 2 --g 5 --l 3 --n cat"]
    train(document(sample={"prompts": prompts, "embedded_guidance": 2.0}))
    sampled = [float(call["guidance"]) for call in given if not call["training"]]
    # Base and adapted pictures: two steps without, two steps with a second pass for the negative.
    assert sorted(sampled) == [2.0] * 4 + [5.0] * 8
    assert (tmp_path / "out/samples/step-000002/001.png").is_file()


@pytest.mark.parametrize("split", [False, True], ids=["joint projections", "separate projections"])
def test_a_run_draws_the_picture_of_its_training_again_bit_by_bit(document, tmp_path, monkeypatch, split):
    monkeypatch.chdir(tmp_path)
    config = document(
        train={"steps": 2, "components": ["denoiser", "clip_l", "t5"]},
        network={"rank": 2, "split_fused": split},
        optimizer={"lr": 1e-2},
        sample={"prompts": ["a dog --w 64 --h 48 --s 2 --g 5 --l 3 --n cat"]},
    )
    with recorded() as before:
        train(config)
    base, trained = before
    zero, one = drawn(tmp_path / "out", "--adapter-strengths", "0,1")
    assert torch.equal(zero, base) and torch.equal(one, trained)
    assert not torch.equal(zero, one)
    given = ["--prompt", "a dog --w 64 --h 48 --l 3 --n cat", "--steps", "2", "--set"]
    [same], [other] = (drawn(tmp_path / "out", *given, f"sample.embedded_guidance={scale}") for scale in (5, 2))
    assert torch.equal(same, one)
    assert not torch.equal(other, one)


def test_schnell_ignores_guidance_in_prompts_and_is_told_none(document, given, tmp_path, caplog):
    train(document("schnell", sample={"prompts": ["a dog --w 64 --h 48 --g 5"]}))
    assert all("guidance" not in call for call in given)
    assert "no embedded guidance" in caplog.text
    # Base and adapted, four steps each.
    assert sum(not call["training"] for call in given) == 8


def test_chroma_trains_with_its_mask(document, given, tmp_path):
    train(document("chroma"))
    assert all(call["text_mask"].dtype == torch.bool for call in given)
    assert trained_parts(tmp_path / "out" / "out.safetensors") == {"unet"}


@pytest.mark.parametrize("prediction", ["additive", "sigma_scaled"])
def test_other_readings_of_the_output_change_the_loss(document, plain, tmp_path, prediction):
    train(document(loss={"prediction": prediction}, train={"steps": 1, "seed": 3}))
    raw, other = (events(folder, "step")[0]["loss"] for folder in (plain[0], tmp_path / "out"))
    assert raw != pytest.approx(other)


def test_the_additive_reading_adds_the_noisy_input_to_the_output(document, opened):
    from tuner.core.types import TextEmbeds

    results = {}
    for prediction in ("raw", "additive"):
        run = open_run(document(loss={"prediction": prediction}))
        models = run.model.load_models(["denoiser"])
        noisy = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
        text = TextEmbeds(tensors={"t5": torch.zeros(1, 3, 28), "clip_pooled": torch.zeros(1, 20)})
        results[prediction] = run.model.predict(models, noisy, torch.tensor([0.5]), text), noisy
    torch.testing.assert_close(results["additive"][0], results["raw"][0] + results["raw"][1])


@pytest.mark.parametrize("fmt", ["diffusers", "comfyui"])
def test_a_run_goes_on_from_a_file_in_any_format(document, plain, tmp_path, fmt):
    path = tmp_path / "first.safetensors"
    convert_adapter(plain[0] / "out.safetensors", path, fmt, MAPS)
    config = document(network={"rank": 2, "init_from": str(path)}, train={"steps": 1, "seed": 3})
    config["optimizer"]["lr"] = 1e-12
    train(config)
    first, second = open_tensors(path), open_tensors(tmp_path / "out/out.safetensors")
    assert set(first) == set(second)
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-4, atol=1e-6)


def open_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Products of an adapter file in any format."""
    tensors = read_adapter(path, MAPS).tensors
    return {f"{part}:{name}": delta_weight(tensors, f"{part}:{name}") for part, name in modules_of(tensors)}


def test_the_example_trains_on_a_tiny_model_in_its_layout(tiny, pictures, tmp_path):
    """examples/flux/lora.json beside files of the same names, made shorter and smaller."""
    for folder, source in (("models/clip_tokenizer", "clip_l"), ("models/t5_tokenizer", "t5")):
        shutil.copytree(tiny()["tokenizers"][source]["path"], tmp_path / "examples/flux" / folder)
    models = tmp_path / "examples/flux/models"
    for name, path in (
        ("flux1-dev", tiny()["path"]),
        ("clip_l", tiny()["text_encoders"]["clip_l"]["path"]),
        ("t5xxl_fp16", tiny()["text_encoders"]["t5"]["path"]),
        ("ae", tiny()["vae"]["path"]),
    ):
        shutil.copy(path, models / f"{name}.safetensors")
    shutil.copytree(pictures, tmp_path / "examples/flux/images")
    shutil.copy(EXAMPLE, tmp_path / "examples/flux/lora.json")
    raw = load_config(
        tmp_path / "examples/flux/lora.json",
        model="flux",
        sets=["train.steps=2", "data.sets.0.resolution=64", "data.sets.0.buckets={\"min\": 32, \"step\": 16}",
              "sample.prompts=[\"a portrait --w 64 --h 48 --s 2\"]", "precision.compute=fp32"],
    )  # fmt: skip
    train(raw)
    assert trained_parts(tmp_path / "out/flux/flux.safetensors") == {"unet"}
    assert (tmp_path / "out/flux/samples/step-000002/sheet.png").is_file()


@pytest.mark.parametrize("flavour", ["dev", "schnell", "chroma"])
def test_the_example_fits_every_flavour_as_its_comments_say(tiny, flavour):
    raw = load_config(EXAMPLE, model="flux")
    raw = {**raw, "model": tiny(flavour)}
    if flavour == "chroma":
        raw["network"] = {**raw["network"], "rules": []}
    run = open_run(raw)
    assert run.facts.flavour == flavour
    run.model.build_network(run.model.load_models(["denoiser"]))
