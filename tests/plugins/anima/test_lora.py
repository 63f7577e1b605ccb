"""LoRA on this family: which modules, which key names, and what files of other trainers do to the prediction.

Golden data: executions of kohya-ss/sd-scripts on tiny random models, float32, CPU (tests/golden/anima).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers import golden, golden_path
from tests.plugins.anima.golden_models import golden_models, place, predict
from tuner.core.adapters.convert import convert_adapter
from tuner.core.adapters.export import verify_export
from tuner.core.adapters.files import read_adapter, save_adapter
from tuner.core.adapters.formats import format_by_name
from tuner.core.adapters.lora import detach, inject_lora
from tuner.core.adapters.merging import merge_into, read_addition
from tuner.core.adapters.network import adapter_strength, network_tensors
from tuner.core.config import RunConfig
from tuner.core.files import safetensors_header
from tuner.core.types import ModelFacts, Models
from tuner.plugins.anima.facts import facts
from tuner.plugins.anima.names import MAPS
from tuner.plugins.anima.text import encode_states

PARITY = 3e-5
SD_SCRIPTS, COMFYUI = golden_path("anima/lora_sdscripts.safetensors"), golden_path("anima/lora_comfyui.safetensors")
HASHES = {"sshs_model_hash", "sshs_legacy_hash"}
EVERYTHING = ["denoiser", "llm_adapter", "qwen3"]
ConfigOf = Callable[..., RunConfig]


@pytest.fixture
def models() -> Models:
    return golden_models()


@pytest.fixture
def facts_of(tiny: dict[str, Any], run_config: ConfigOf) -> Callable[..., tuple[RunConfig, ModelFacts]]:
    def build(components: list[str], **network: Any) -> tuple[RunConfig, ModelFacts]:
        config = run_config(tiny, network=network, train={"components": components})
        return config, facts(config)

    return build


# --- choice -----------------------------------------------------------------------------------------------------------


def test_the_default_choice_is_the_published_one(
    models: Models, facts_of: Callable[..., tuple[RunConfig, ModelFacts]]
) -> None:
    config, found = facts_of(EVERYTHING)
    network = inject_lora(models, config, found)
    chosen = {name.rpartition(".")[0] for name in network_tensors(network)}
    assert chosen == {
        ":".join(place(entry["module"])) for entry in golden("anima/lora_names.json") if entry["default_target"]
    }


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "twin"),
    [(SD_SCRIPTS, "comfyui-alpha", COMFYUI), (COMFYUI, "sd-scripts", SD_SCRIPTS)],
    ids=["to comfyui", "to sd-scripts"],
)
def test_conversion_gives_the_other_golden_file_exactly(tmp_path: Path, source: Path, target: str, twin: Path) -> None:
    path = tmp_path / "converted.safetensors"
    convert_adapter(source, path, target, MAPS)
    got, want = load_file(path), load_file(twin)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) and got[key].dtype == want[key].dtype for key in want)
    metadata, expected = safetensors_header(path).metadata, safetensors_header(twin).metadata
    assert metadata == expected
    assert metadata.keys() >= HASHES


@pytest.mark.parametrize("fmt", [fmt.name for fmt in MAPS.formats])
def test_every_format_carries_the_same_effect(tmp_path: Path, fmt: str) -> None:
    tensors = read_adapter(SD_SCRIPTS, MAPS).tensors
    held = format_by_name(MAPS, fmt).prefixes
    tensors = {name: value for name, value in tensors.items() if name.partition(":")[0] in held}
    path = save_adapter(tensors, format_by_name(MAPS, fmt), tmp_path / "a.safetensors", {})
    assert verify_export(path, tensors, MAPS).modules == len(tensors) // 3


# --- effect -----------------------------------------------------------------------------------------------------------


def close(got: Tensor, want: Tensor, tolerance: float = PARITY) -> None:
    assert (got.reshape(want.shape) - want).abs().max() <= tolerance


@pytest.mark.parametrize("source", [SD_SCRIPTS, COMFYUI], ids=["sd-scripts", "comfyui"])
def test_a_loaded_file_changes_the_prediction_as_in_the_reference(
    models: Models, facts_of: Callable[..., tuple[RunConfig, ModelFacts]], source: Path
) -> None:
    config, found = facts_of(EVERYTHING, rank="from_file", init_from=str(source))
    network = inject_lora(models, config, found)
    effect, text = golden("anima/lora_effect.safetensors"), golden("anima/text_encode.safetensors")
    with torch.no_grad():
        for strength in (0, 0.6, 1.0):
            with adapter_strength(network, float(strength)):
                close(predict(models), effect[f"dit_pred.mult{strength}"])
                states = encode_states(models.text_encoders["qwen3"], text["input_ids"], text["attention_mask"].bool())
                want = effect[f"qwen_hidden.mult{strength}"] if strength else text["prompt_embeds"]
                close(states, want, 2e-5)


def test_merged_weights_equal_the_reference(models: Models) -> None:
    merged = {key: value for key, value in golden("anima/lora_effect.safetensors").items() if key.startswith("merged.")}
    assert len(merged) == 10
    for key, want in merged.items():
        match = re.fullmatch(r"merged\.mult([\d.]+?)\.((?:llm_adapter|blocks)\..*)\.weight", key)
        assert match is not None
        component, path = place(match[2])
        module = copy.deepcopy(models.component(component))
        merge_into(module, component, [read_addition(SD_SCRIPTS, float(match[1]), MAPS, where="model.merge")])
        close(module.get_submodule(path).weight, want, 1e-6)


def test_the_default_format_folds_alpha_and_starts_another_run_with_the_same_prediction(
    models: Models, facts_of: Callable[..., tuple[RunConfig, ModelFacts]], tmp_path: Path
) -> None:
    config, found = facts_of(EVERYTHING, rank="from_file", init_from=str(SD_SCRIPTS))
    network = inject_lora(models, config, found)
    path = save_adapter(network_tensors(network), format_by_name(MAPS, None), tmp_path / "a.safetensors", {})
    assert not any(key.endswith(".alpha") for key in load_file(path))
    assert read_adapter(path, MAPS).format == "comfyui"
    assert verify_export(path, network_tensors(network), MAPS).keys == 2 * 54
    with torch.no_grad():
        want = predict(models)
        detach(network)
        config, found = facts_of(EVERYTHING, rank="from_file", init_from=str(path))
        inject_lora(models, config, found)
        close(predict(models), want, 1e-5)
