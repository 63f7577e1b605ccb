"""diffusers' own Anima components load our exported files and predict what we predict.

diffusers is an outside judge here: nothing of ours takes part in its loading and its forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import golden
from tests.plugins.anima.golden_models import golden_models, golden_weights, predict
from tuner.core.adapters.files import save_adapter
from tuner.core.adapters.formats import format_by_name
from tuner.core.adapters.lora import inject_lora
from tuner.core.adapters.network import adapter_strength, network_tensors
from tuner.core.config import RunConfig
from tuner.core.types import Models, Network
from tuner.plugins.anima.facts import facts
from tuner.plugins.anima.names import MAPS, to_diffusers

AGREEMENT = 1e-4
EFFECT = 1e-2


def nearest(mask: Tensor, size: list[int], interpolation: object) -> Tensor:
    """What torchvision's resize does to the padding mask, which is the only thing diffusers asks it for here."""
    return nn.functional.interpolate(mask, size=size, mode="nearest")


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Any:
    """diffusers' Anima with the golden weights under its own names."""
    from diffusers import AnimaModularPipeline, AnimaTextConditioner, CosmosTransformer3DModel
    from diffusers.models.transformers import transformer_cosmos

    stand_in = SimpleNamespace(
        functional=SimpleNamespace(resize=nearest), InterpolationMode=SimpleNamespace(NEAREST="nearest")
    )
    monkeypatch.setattr(transformer_cosmos, "transforms", stand_in, raising=False)
    transformer = CosmosTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=3, attention_head_dim=32, num_layers=2, text_embed_dim=64,
        adaln_lora_dim=16, max_size=(128, 240, 240), rope_scale=(1.0, 4.0, 4.0), extra_pos_embed_type=None,
    )  # fmt: skip
    conditioner = AnimaTextConditioner(
        source_dim=64, target_dim=64, model_dim=64, num_layers=2, num_attention_heads=4, target_vocab_size=320
    )
    denoiser_weights, adapter_weights = golden_weights()
    transformer.load_state_dict({diffusers_key(key): value for key, value in denoiser_weights.items()}, strict=True)
    conditioner.load_state_dict(adapter_weights, strict=True)
    pipe = AnimaModularPipeline()
    pipe.update_components(transformer=transformer.eval(), text_conditioner=conditioner.eval())
    return pipe


def diffusers_key(key: str) -> str:
    module, _, leaf = key.rpartition(".")
    renamed = to_diffusers(module)
    assert renamed is not None, key
    return f"{renamed}.{leaf}"


def diffusers_predict(pipe: Any) -> Tensor:
    data = golden("anima/e2e_step.safetensors")
    noisy = data["noisy"].reshape(data["noisy"].shape[0], 16, 1, *data["noisy"].shape[-2:])
    with torch.no_grad():
        context = pipe.text_conditioner(data["qwen_hidden"], data["t5_ids"], data["t5_mask"], data["qwen_mask"])
        mask = torch.zeros(1, 1, *noisy.shape[-2:])
        out: Tensor = pipe.transformer(noisy, data["t"], context, padding_mask=mask, return_dict=False)[0]
    return out.squeeze(2)


@pytest.fixture
def trained(tiny: dict[str, Any], run_config: Callable[..., RunConfig]) -> tuple[Models, Network]:
    """Our models with a LoRA on every linear of denoiser and adapter; alpha is not the rank, no factor is zero."""
    network = {
        "rank": 4,
        "alpha": 6.0,
        "include": [r".*_modulation.*", r".*_embedder.*", r"final_layer.*"],
        "rules": [{"match": r".*mlp.*", "rank": 3}],
    }
    config = run_config(tiny, network=network, train={"components": ["denoiser", "llm_adapter"]})
    models = golden_models()
    built = inject_lora(models, config, facts(config))
    generator = torch.Generator().manual_seed(11)
    for parameter in built.module.parameters():
        parameter.data.normal_(std=0.05, generator=generator)
    return models, built


def test_the_base_models_agree(pipeline: Any) -> None:
    with torch.no_grad():
        assert (diffusers_predict(pipeline) - predict(golden_models())).abs().max() <= AGREEMENT


@pytest.mark.parametrize("name", ["comfyui", "diffusers"])
def test_diffusers_loads_our_file_and_predicts_what_we_predict(
    pipeline: Any, trained: tuple[Models, Network], tmp_path: Path, name: str
) -> None:
    models, network = trained
    tensors = network_tensors(network)
    path = save_adapter(tensors, format_by_name(MAPS, name), tmp_path / "style.safetensors", {"ss_tag": "x"})
    with torch.no_grad():
        ours = predict(models)
        with adapter_strength(network, 0.0):
            base = predict(models)
        with adapter_strength(network, 0.5):
            half = predict(models)
    assert (ours - base).abs().max() >= EFFECT
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="style")
    adapted = [
        module
        for part in (pipeline.transformer, pipeline.text_conditioner)
        for module in part.modules()
        if hasattr(module, "lora_A")
    ]
    assert len(adapted) == len(tensors) // 3
    assert (diffusers_predict(pipeline) - ours).abs().max() <= AGREEMENT
    for part in (pipeline.transformer, pipeline.text_conditioner):
        part.set_adapters(["style"], [0.5])
    assert (diffusers_predict(pipeline) - half).abs().max() <= AGREEMENT
