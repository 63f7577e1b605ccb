"""Opening a run checks configuration, weights and hooks before any weight is read; the facade keeps plugins honest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.core.registry.toys import HOOKS, Site, write_header
from tuner.core.config.document import merged
from tuner.core.errors import UsageError
from tuner.core.registry import Run, open_model, open_run

MISSING_PREDICT = HOOKS.replace("def predict", "def predicted").replace("@hookimpl\ndef predicted", "def predicted")


def document(folder: Path, family: str = "cubist", **sections: Any) -> dict[str, Any]:
    weights = write_header(folder / "weights.safetensors", f"{family}.weight")
    base = {
        "model": {"family": family, "path": str(weights)},
        "data": {"sets": [{"sources": [{"id": "a", "path": "images"}]}]},
        "optimizer": {"lr": 1e-4},
        "train": {"steps": 1},
        "checkpoint": {"dir": str(folder / "out")},
    }
    return merged(base, sections)


def opened(site: Site, folder: Path, hooks: str = HOOKS, **sections: Any) -> Run:
    site.model("cubist", hooks=hooks)
    return open_run(document(folder, **sections))


def refusal(site: Site, folder: Path, hooks: str = HOOKS, **sections: Any) -> str:
    with pytest.raises(UsageError) as caught:
        opened(site, folder, hooks, **sections)
    return str(caught.value)


# --- configuration and weights ----------------------------------------------------------------------------------------


def test_a_run_has_its_model_its_resolved_configuration_and_a_manifest(site: Site, tmp_path: Path) -> None:
    run = opened(site, tmp_path, model={"sharpness": 2})
    assert run.config.model.sharpness == 2.0  # type: ignore[attr-defined]
    assert (run.config.noise.timesteps, run.config.checkpoint.format, run.facts.family) == (
        "sigmoid",
        "plain",
        "cubist",
    )
    plugin = run.manifest["plugins"][0]
    assert (plugin["name"], plugin["dist"], plugin["version"], plugin["api"]) == (
        "cubist",
        "tuner-cubist",
        "0.3",
        [1, 0],
    )
    assert run.manifest["packages"]["torch"]


def test_the_keys_of_a_model_are_checked_like_all_others(site: Site, tmp_path: Path) -> None:
    message = refusal(site, tmp_path, model={"sharpnes": 2})
    assert message == "unknown key 'sharpnes' in model\n  at: model.sharpnes\n  fix: did you mean 'sharpness'?"


def test_a_document_without_a_model_asks_for_one(site: Site, tmp_path: Path) -> None:
    raw = document(tmp_path)
    del raw["model"]["family"]
    with pytest.raises(UsageError, match="which model is this for"):
        open_run(raw)


def test_weights_of_another_model_are_refused_and_that_model_is_named(site: Site, tmp_path: Path) -> None:
    site.model("cubist")
    site.model("fauvist")
    site.model("dadaist", descriptor="raise RuntimeError('boom')")
    raw = document(tmp_path)
    write_header(tmp_path / "weights.safetensors", "fauvist.weight")
    with pytest.raises(UsageError) as caught:
        open_run(raw)
    assert str(caught.value).startswith("these weights are not of the model 'cubist'")
    assert "they are of 'fauvist': use --model fauvist" in str(caught.value)


def test_a_plugin_that_fails_while_reading_facts_is_blamed_by_name(site: Site, tmp_path: Path) -> None:
    site.model("cubist")
    facts = site.folder / "toy_cubist" / "facts.py"
    facts.write_text(facts.read_text(encoding="utf-8").replace("return ModelFacts(", "1 / 0\n    return ModelFacts("))
    with pytest.raises(UsageError) as caught:
        open_run(document(tmp_path))
    assert "plugin 'cubist' (tuner-cubist 0.3) is not usable: ZeroDivisionError: division by zero" in str(caught.value)


def test_a_run_does_not_import_plugins_that_it_does_not_use(site: Site, tmp_path: Path) -> None:
    site.model("dadaist", descriptor="raise RuntimeError('boom')")
    site.extension("bad", "raise RuntimeError('boom')")
    assert opened(site, tmp_path).facts.family == "cubist"


# --- ownership of hooks -----------------------------------------------------------------------------------------------


def test_a_missing_hook_is_named(site: Site, tmp_path: Path) -> None:
    message = refusal(site, tmp_path, MISSING_PREDICT)
    assert message.startswith("plugin 'cubist' 0.3 does not implement the hook predict")


def test_a_misspelt_hook_is_named_with_the_nearest_one(site: Site, tmp_path: Path) -> None:
    message = refusal(site, tmp_path, HOOKS + "\n@hookimpl\ndef noise_targt(latents):\n    return None\n")
    assert message == "plugin 'cubist' 0.3: there is no hook 'noise_targt'\n  fix: did you mean 'noise_target'?"


def test_an_optional_hook_of_another_api_is_passed_over(site: Site, tmp_path: Path) -> None:
    hooks = HOOKS + "\n@hookimpl(optionalhook=True)\ndef later_hook(latents):\n    return None\n"
    assert opened(site, tmp_path, hooks).facts.family == "cubist"


def test_a_hook_with_an_unknown_argument_is_named(site: Site, tmp_path: Path) -> None:
    message = refusal(site, tmp_path, HOOKS.replace("def predict(noisy)", "def predict(noisey)"))
    assert "plugin 'cubist' 0.3: a hook does not fit its specification" in message
    assert "noisey" in message


def test_hooks_that_cannot_be_imported_are_told_with_the_reason(site: Site, tmp_path: Path) -> None:
    message = refusal(site, tmp_path, "import toy_gone")
    assert "is not usable: ModuleNotFoundError: No module named 'toy_gone' (while reading its hooks)" in message


def test_a_model_may_override_a_default_hook(site: Site, tmp_path: Path) -> None:
    own = "\n@hookimpl\ndef noise_target(latents):\n    return 'own'\n"
    run = opened(site, tmp_path, HOOKS + own)
    with pytest.raises(UsageError, match="hook noise_target: expected NoiseTarget, got str"):
        run.model.noise_target(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), torch.zeros(1))


WRAPPER = """
from tuner import hookimpl

@hookimpl(wrapper=True)
def predict(noisy):
    result = yield
    return result + {add}
"""


def test_extensions_wrap_in_the_order_of_the_configuration(site: Site, tmp_path: Path) -> None:
    site.extension("plus", WRAPPER.format(add="1"))
    site.extension("double", WRAPPER.replace("result + {add}", "result * 2"))
    latents = torch.zeros(1, 4, 2, 2)
    values = []
    for names in (["plus", "double"], ["double", "plus"]):
        if not values:
            run = opened(site, tmp_path, HOOKS.replace("noisy * 0", "noisy * 0 + 3"), extensions=names)
        else:
            run = open_run(document(tmp_path, extensions=names))
        models = run.model.load_models(["denoiser"])
        text = run.model.encode_text(models, ["x"])
        values.append(run.model.predict(models, latents, torch.zeros(1), text)[0, 0, 0, 0].item())
    assert values == [3 * 2 + 1, (3 + 1) * 2]


def test_a_model_and_an_extension_may_share_name_and_version(site: Site, tmp_path: Path) -> None:
    site.model("cubist", version="0.1", module="toy_painter", dist="tuner-painter")
    site.extension("cubist", WRAPPER.format(add="1"))
    run = open_run(document(tmp_path, extensions=["cubist"]))
    models, latents = run.model.load_models(["denoiser"]), torch.zeros(1, 4, 2, 2)
    velocity = run.model.predict(models, latents, torch.zeros(1), run.model.encode_text(models, ["x"]))
    assert velocity.unique().tolist() == [1.0]


def test_an_extension_may_not_replace_a_hook_of_the_model(site: Site, tmp_path: Path) -> None:
    site.extension("thief", "from tuner import hookimpl\n@hookimpl\ndef predict(noisy):\n    return noisy\n")
    message = refusal(site, tmp_path, extensions=["thief"])
    assert "extension 'thief' 0.1, hook predict: an extension may only wrap it" in message


def test_old_style_wrappers_are_refused(site: Site, tmp_path: Path) -> None:
    site.extension("old", "from tuner import hookimpl\n@hookimpl(hookwrapper=True)\ndef predict(noisy):\n    yield\n")
    message = refusal(site, tmp_path, extensions=["old"])
    assert "extension 'old' 0.1, hook predict: old-style wrappers are refused" in message


def test_an_extension_that_is_not_installed_is_told_before_anything_else(site: Site, tmp_path: Path) -> None:
    assert "there is no extension plugin 'ghost'" in refusal(site, tmp_path, extensions=["ghost"])


def test_extensions_hear_of_the_run_and_their_metadata_must_not_clash(site: Site, tmp_path: Path) -> None:
    hooks = """
from tuner import hookimpl

heard = []

@hookimpl
def on_step_end(step, metrics):
    heard.append((step, dict(metrics)))

@hookimpl
def extra_metadata():
    return {"note": "x"}
"""
    site.extension("one", hooks)
    site.extension("two", hooks)
    run = opened(site, tmp_path, extensions=["one", "two"])
    run.extensions.on_step_end(step=3, metrics={"loss": 1.0})
    import toy_one.hooks  # type: ignore[import-not-found]

    assert toy_one.hooks.heard == [(3, {"loss": 1.0})]
    with pytest.raises(UsageError, match="two sources give 'note' through extra_metadata"):
        run.extensions.extra_metadata()


# --- the facade -------------------------------------------------------------------------------------------------------


def test_every_hook_is_reached_through_the_facade(site: Site, tmp_path: Path) -> None:
    site.model("cubist")
    weights = write_header(tmp_path / "w.safetensors", "cubist.weight")
    model = open_model("cubist", {"path": str(weights)}, {"precision": {"compute": "fp32"}})
    models = model.load_models(("text", "vae", "denoiser"))
    text = model.encode_text(models, ["a", "b"])
    latents = model.encode_latents(models, torch.zeros(2, 3, 32, 16))
    assert latents.shape == (2, 4, 4, 2)
    target = model.noise_target(latents, torch.ones_like(latents), torch.tensor([0.25, 1.0]))
    assert torch.equal(target.noisy[:, 0, 0, 0], torch.tensor([0.25, 1.0]))
    assert model.predict(models, target.noisy, target.timesteps, text).shape == latents.shape
    assert model.decode_latents(models, latents).shape == (2, 3, 32, 16)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("pixels.shape[3] // 8)", "pixels.shape[3] // 8, dtype=torch.bfloat16)",
         "encode_latents: expected [2,4,4,4] float32, got [2,4,4,4] bfloat16"),
        ("pixels.shape[0], 4", "pixels.shape[0], 16",
         "encode_latents: expected [2,4,4,4] float32, got [2,16,4,4] float32"),
        ("latents.shape[2] * 8", "latents.shape[2]",
         "decode_latents: expected [2,3,32,32] float32, got [2,3,4,32] float32"),
        ("noisy * 0", "noisy[:1]",
         "predict: expected [2,4,4,4] floating, got [1,4,4,4] float32"),
        ('"context": torch.zeros(len(captions), 5, 3)', '"ctx": torch.zeros(1)',
         "encode_text: expected fields among context, got a field 'ctx'"),
        ("5, 3)", "5, 7)",
         "encode_text: expected context [2,L,3] floating, got context [2,5,7] float32"),
        ("return noisy * 0", "return None",
         "predict: expected [2,4,4,4] floating, got None"),
        ("vae=torch.nn.Identity(), ", "",
         "load_models: expected the component 'vae', got nothing under that name"),
    ],
)  # fmt: skip
def test_a_result_that_breaks_the_contract_is_told_at_the_first_call(
    before: str, after: str, expected: str, site: Site, tmp_path: Path
) -> None:
    assert before in HOOKS
    model = opened(site, tmp_path, HOOKS.replace(before, after)).model
    with pytest.raises(UsageError) as caught:
        models = model.load_models(("text", "vae", "denoiser"))
        text = model.encode_text(models, ["a", "b"])
        latents = model.encode_latents(models, torch.zeros(2, 3, 32, 32))
        model.decode_latents(models, latents)
        model.predict(models, latents, torch.zeros(2), text)
    assert str(caught.value).startswith(f"plugin 'cubist' 0.3, hook {expected}")


def test_a_file_that_was_not_written_is_noticed(site: Site, tmp_path: Path) -> None:
    run = opened(site, tmp_path, HOOKS.replace("path.write_bytes", "path.with_suffix('.x').write_bytes"))
    with pytest.raises(UsageError, match="hook save: expected files that exist"):
        run.model.save(None, {}, tmp_path / "a.safetensors", {})  # type: ignore[arg-type]
