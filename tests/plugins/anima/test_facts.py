"""What the plugin declares: read from headers alone, and true of the model that those headers belong to."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures.tiny_anima import ADAPTER, DENOISER
from tests.helpers import golden_path
from tuner.core.config import RunConfig
from tuner.core.errors import UsageError
from tuner.core.files import TensorInfo, safetensors_header
from tuner.plugins.anima.denoiser import Denoiser
from tuner.plugins.anima.facts import LORA, detect, facts
from tuner.plugins.anima.sizes import (
    AdapterSizes,
    DenoiserSizes,
    adapter_sizes,
    denoiser_sizes,
)
from tuner.plugins.anima.text import LLMAdapter

Configure = Callable[..., RunConfig]
PUBLIC_ADAPTER = AdapterSizes(
    vocab=32128, embed_width=1024, width=1024, source_width=1024, out_width=1024, layers=6, heads=16, mlp_width=4096,
    in_proj_bias=False,
)  # fmt: skip


def public(width: int, heads: int, blocks: int) -> DenoiserSizes:
    return DenoiserSizes(
        width=width, heads=heads, head_dim=width // heads, blocks=blocks, mlp_width=4 * width, text_width=1024,
        adaln_rank=256, in_channels=16, out_channels=16, rope_ratio=4.0,
    )  # fmt: skip


def header_of(sizes: DenoiserSizes | AdapterSizes) -> dict[str, TensorInfo]:
    with torch.device("meta"):
        module = Denoiser(sizes) if isinstance(sizes, DenoiserSizes) else LLMAdapter(sizes)
    return {name: TensorInfo(dtype="BF16", shape=tuple(value.shape)) for name, value in module.named_parameters()}


def count(header: dict[str, TensorInfo]) -> int:
    return sum(torch.Size(info.shape).numel() for info in header.values())


@pytest.mark.parametrize(
    ("sizes", "flavour", "parameters"),
    [
        (public(2048, 16, 28), "preview", 1_956_405_248),
        (public(5120, 40, 36), "large", 14_265_265_152),
        (public(1280, 20, 20), "small", 597_536_000),
    ],
    ids=["preview", "large", "small"],
)
def test_public_sizes_are_recognised_and_have_the_published_parameter_count(
    sizes: DenoiserSizes, flavour: str, parameters: int
) -> None:
    header = header_of(sizes)
    assert count(header) == parameters
    assert denoiser_sizes(header) == sizes
    assert detect({f"net.{name}": info for name, info in header.items()}) == flavour


def test_the_public_adapter_has_the_published_parameter_count() -> None:
    header = header_of(PUBLIC_ADAPTER)
    assert count(header) == 134_663_680
    assert adapter_sizes(header) == PUBLIC_ADAPTER


def test_the_public_28_block_file_has_its_685_parameters_under_the_published_names() -> None:
    names = set(header_of(public(2048, 16, 28))) | {f"llm_adapter.{name}" for name in header_of(PUBLIC_ADAPTER)}
    assert len(names) == 685
    assert {
        "x_embedder.proj.1.weight", "t_embedder.1.linear_2.weight", "blocks.27.adaln_modulation_mlp.2.weight",
        "blocks.0.cross_attn.output_proj.weight", "final_layer.adaln_modulation.1.weight", "llm_adapter.norm.weight",
        "llm_adapter.blocks.5.mlp.2.bias", "llm_adapter.blocks.0.self_attn.o_proj.weight",
    } <= names  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"blocks": 5},
        {"width": 128, "heads": 4},
        {"adaln_rank": 0},
        {"text_width": 40},
        {"mlp_width": 200},
        {"in_channels": 17, "rope_ratio": 3.0},
        {"head_dim": 48, "heads": 2},
    ],
    ids=str,
)
def test_any_size_is_read_back_from_the_weights(change: dict[str, Any]) -> None:
    sizes = replace(DENOISER, **change)
    assert denoiser_sizes(header_of(sizes)) == sizes


def test_golden_files_are_detected_by_depth_and_width() -> None:
    assert detect(safetensors_header(golden_path("anima/e2e_weights.safetensors"))) == "2x96"
    assert detect(safetensors_header(golden_path("anima/vae_weights.safetensors"))) is None
    assert detect(safetensors_header(golden_path("anima/qwen3_weights.safetensors"))) is None


def test_a_head_size_that_does_not_divide_the_width_is_an_error() -> None:
    header = header_of(DENOISER)
    header["blocks.0.self_attn.q_norm.weight"] = TensorInfo(dtype="F32", shape=(36,))
    with pytest.raises(UsageError, match="not a multiple"):
        denoiser_sizes(header)


# --- the record -------------------------------------------------------------------------------------------------------


def test_a_frozen_text_side_hands_over_the_context_and_a_training_one_what_the_adapter_reads(
    tiny: dict[str, Any], run_config: Configure
) -> None:
    frozen = facts(run_config(tiny))
    assert list(frozen.text_fields) == ["context", "context_mask"]
    assert frozen.text_fields["context"].shape == ("L", ADAPTER.out_width)
    assert frozen.text_fields["context"].floor == 512
    assert frozen.text_fields["context"].trim == "context_mask"
    assert frozen.step_components == ()
    for training in (["denoiser", "llm_adapter"], ["qwen3"], ["denoiser", "qwen3", "llm_adapter"]):
        live = facts(run_config(tiny, train={"components": training}))
        assert list(live.text_fields) == ["qwen3", "qwen3_mask", "t5_ids", "t5_mask"]
        assert all(field.of == ("qwen3",) for field in live.text_fields.values())
        assert live.step_components == (() if "llm_adapter" in training else ("llm_adapter",))


def test_token_limits_follow_the_configuration(tiny: dict[str, Any], run_config: Configure) -> None:
    assert facts(run_config(tiny)).max_tokens == {"qwen3": 512, "t5": 512}
    limited = run_config(tiny, text_encoder={"max_tokens": {"t5": 200}})
    assert facts(limited).max_tokens == {"qwen3": 512, "t5": 200}
    with pytest.raises(UsageError, match="no tokenizer 'clip'"):
        facts(run_config(tiny, text_encoder={"max_tokens": {"clip": 77}}))


def test_a_component_that_cannot_train_is_refused(tiny: dict[str, Any], run_config: Configure) -> None:
    with pytest.raises(UsageError, match="'vae' cannot train"):
        facts(run_config(tiny, train={"components": ["denoiser", "vae"]}))


def test_a_stated_flavour_must_be_that_of_the_weights(tiny: dict[str, Any], run_config: Configure) -> None:
    assert facts(run_config({**tiny, "flavour": "2x96"})).flavour == "2x96"
    with pytest.raises(UsageError, match="not of flavour 'preview'"):
        facts(run_config({**tiny, "flavour": "preview"}))


def test_every_component_names_files_that_exist(tiny: dict[str, Any], run_config: Configure) -> None:
    record = facts(run_config(tiny))
    assert set(record.files) == set(record.components)
    assert all(Path(file).is_file() for files in record.files.values() for file in files)
    assert any(file.endswith("tokenizer.json") for file in record.files["llm_adapter"])


def default_targets(component: str, paths: list[str]) -> list[str]:
    def matches(patterns: tuple[str, ...], path: str) -> bool:
        return any(re.fullmatch(pattern, path) for pattern in patterns)

    return [path for path in paths if matches(LORA.include[component], path) and not matches(LORA.exclude, path)]


def test_default_lora_targets_are_ten_per_block_in_denoiser_and_adapter() -> None:
    def linears(module: torch.nn.Module) -> list[str]:
        return [path for path, child in module.named_modules() if isinstance(child, torch.nn.Linear)]

    with torch.device("meta"):
        denoiser, adapter = Denoiser(public(2048, 16, 28)), LLMAdapter(PUBLIC_ADAPTER)
    assert len(default_targets("denoiser", linears(denoiser))) == 280
    assert len(default_targets("llm_adapter", linears(adapter))) == 60


# --- the light half ---------------------------------------------------------------------------------------------------


def test_describing_a_model_imports_no_torch(tiny: dict[str, Any], tmp_path: Path) -> None:
    script = f"""
import sys
from tuner.core.config import build_config
from tuner.plugins.anima import facts, names
from tuner.plugins.anima.config import AnimaConfig
from tuner.plugins.anima.plugin import plugin
raw = {{
    "model": {tiny!r},
    "data": {{"sets": [{{"resolution": 64, "sources": [{{"id": "a", "path": "a"}}]}}]}},
    "optimizer": {{"name": "adamw", "lr": 1e-4}}, "train": {{"steps": 1}}, "checkpoint": {{"dir": {str(tmp_path)!r}}},
}}
assert facts.facts(build_config(raw, AnimaConfig)).flavour == "2x96"
assert plugin.name == "anima"
print([name for name in ("torch", "transformers", "diffusers", "numpy", "tokenizers") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_preset_is_a_valid_part_of_a_configuration(tiny: dict[str, Any], run_config: Configure) -> None:
    found = [file for file in resources.files("tuner.plugins.anima.presets").iterdir() if file.name.endswith(".json")]
    assert found
    for file in found:
        facts(run_config(tiny, **json.loads(file.read_text(encoding="utf-8"))))
