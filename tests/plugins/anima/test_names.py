"""Adapter names: every linear in every format, and files of other programs read back to the same modules.

Golden data: names and files of kohya-ss/sd-scripts for a tiny model (tests/golden/anima).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.fixtures.tiny_anima import ADAPTER, DENOISER
from tests.helpers import golden, golden_path
from tests.plugins.anima.golden_models import place
from tuner.core.adapters.files import read_adapter
from tuner.core.adapters.formats import module_name
from tuner.core.types import KeyFormat
from tuner.plugins.anima import names
from tuner.plugins.anima.denoiser import Denoiser
from tuner.plugins.anima.names import MAPS
from tuner.plugins.anima.text import LLMAdapter

FORMATS = [each.name for each in MAPS.formats]


def fmt(name: str) -> KeyFormat:
    found = MAPS.format(name)
    assert found is not None
    return found


def golden_names() -> list[dict[str, str]]:
    return golden("anima/lora_names.json")  # type: ignore[no-any-return]


def test_every_linear_has_the_name_that_sd_scripts_and_comfyui_give_it() -> None:
    for entry in golden_names():
        assert module_name(fmt("sd-scripts"), *place(entry["module"])) == entry["sd_scripts"]
        assert module_name(fmt("comfyui"), *place(entry["module"])) == entry["comfyui"]


def test_the_table_of_modules_is_that_of_the_real_modules() -> None:
    with torch.device("meta"):
        modules = {"denoiser": Denoiser(DENOISER), "llm_adapter": LLMAdapter(ADAPTER)}
    tables = {"denoiser": names.denoiser_modules(2), "llm_adapter": names.adapter_modules(2)}
    for component, module in modules.items():
        linears = {path for path, child in module.named_modules() if isinstance(child, torch.nn.Linear)}
        assert linears == set(tables[component]) - {"in_proj"}


@pytest.mark.parametrize("name", FORMATS)
def test_every_name_reads_back_to_its_own_module(tmp_path: Path, name: str) -> None:
    # The converter of sd-scripts turns underscores into dots by text replacement.
    keys: dict[str, Tensor] = {}
    expected = []
    for entry in golden_names():
        component, path = place(entry["module"])
        spelled = module_name(fmt(name), component, path)
        keys[f"{spelled}{fmt(name).down}"] = torch.ones(2, 4)
        keys[f"{spelled}{fmt(name).up}"] = torch.ones(4, 2)
        expected.append(f"{component}:{path}")
    save_file(keys, tmp_path / "lora.safetensors")
    read = read_adapter(tmp_path / "lora.safetensors", MAPS)
    assert {key.rpartition(".")[0] for key in read.tensors} == set(expected)


@pytest.mark.parametrize("prefix", ["net.", "transformer.", "diffusion_model."])
@pytest.mark.parametrize("suffixes", [(".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")])
def test_other_prefixes_and_suffixes_are_accepted(tmp_path: Path, prefix: str, suffixes: tuple[str, str]) -> None:
    keys = {}
    for path in ("blocks.11.adaln_modulation_self_attn.1", "llm_adapter.blocks.3.mlp.2", "t_embedder.1.linear_1"):
        keys[f"{prefix}{path}{suffixes[0]}"], keys[f"{prefix}{path}{suffixes[1]}"] = torch.ones(2, 4), torch.ones(4, 2)
        keys[f"{prefix}{path}.alpha"] = torch.tensor(1.0)
    save_file(keys, tmp_path / "lora.safetensors")
    read = read_adapter(tmp_path / "lora.safetensors", MAPS)
    assert {key.rpartition(".")[0] for key in read.tensors} == {
        "denoiser:blocks.11.adaln_modulation_self_attn.1",
        "llm_adapter:blocks.3.mlp.2",
        "denoiser:t_embedder.1.linear_1",
    }


def test_the_reference_files_are_one_adapter_in_two_spellings() -> None:
    one = read_adapter(golden_path("anima/lora_sdscripts.safetensors"), MAPS)
    other = read_adapter(golden_path("anima/lora_comfyui.safetensors"), MAPS)
    assert set(one.tensors) == set(other.tensors)
    assert all(torch.equal(value, other.tensors[key]) for key, value in one.tensors.items())
    assert sum(key.startswith(("denoiser", "llm_adapter")) for key in one.tensors) == 3 * 40


def test_diffusers_names_are_the_published_table() -> None:
    pairs = {
        "x_embedder.proj.1": "patch_embed.proj",
        "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
        "t_embedding_norm": "time_embed.norm",
        "final_layer.adaln_modulation.1": "norm_out.linear_1",
        "final_layer.linear": "proj_out",
        "blocks.7.adaln_modulation_cross_attn.2": "transformer_blocks.7.norm2.linear_2",
        "blocks.7.cross_attn.output_proj": "transformer_blocks.7.attn2.to_out.0",
        "blocks.7.self_attn.q_norm": "transformer_blocks.7.attn1.norm_q",
        "blocks.7.mlp.layer1": "transformer_blocks.7.ff.net.0.proj",
        "blocks.7.mlp.layer2": "transformer_blocks.7.ff.net.2",
    }
    for original, other in pairs.items():
        assert names.to_diffusers(original) == other
        assert names.from_diffusers(other) == original
    assert names.to_diffusers("blocks.x.mlp.layer1") is None
    assert names.from_diffusers("transformer_blocks.0.attn3.to_q") is None


def test_only_the_default_format_leaves_alpha_out_for_diffusers() -> None:
    assert MAPS.default == "comfyui"
    assert fmt("comfyui").alpha is None
