"""The tiny models that the golden LoRA and the golden training step belong to."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from tests.helpers import golden, golden_path
from tuner.core.compute.weights import read_tensors
from tuner.core.files import safetensors_header
from tuner.core.types import Models
from tuner.plugins.anima import sizes
from tuner.plugins.anima.denoiser import Denoiser
from tuner.plugins.anima.text import LLMAdapter, build_encoder


def golden_weights() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of the denoiser and of the adapter, without prefixes."""
    tensors = golden("anima/e2e_weights.safetensors")
    parts: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for name, key in sizes.original_names(tensors).items():
        parts[name.startswith(sizes.ADAPTER_PREFIX)][name.removeprefix(sizes.ADAPTER_PREFIX)] = tensors[key]
    return parts


def golden_models() -> Models:
    denoiser_weights, adapter_weights = golden_weights()
    denoiser = Denoiser(sizes.denoiser_sizes(_shapes(denoiser_weights)))
    adapter = LLMAdapter(sizes.adapter_sizes(_shapes(adapter_weights)))
    denoiser.load_state_dict(denoiser_weights)
    adapter.load_state_dict(adapter_weights)
    header = safetensors_header(golden_path("anima/qwen3_weights.safetensors"))
    header = header.renamed(sizes.encoder_names(header))
    encoder = build_encoder(read_tensors(header), sizes.encoder_sizes(header), {}, dtype=torch.float32)
    return Models(denoiser=denoiser, text_encoders={"qwen3": encoder, "llm_adapter": adapter})


def predict(models: Models) -> Tensor:
    """The prediction for the inputs of the golden training step, [B, C, h, w]."""
    data = golden("anima/e2e_step.safetensors")
    adapter = models.text_encoders["llm_adapter"]
    context = adapter(data["qwen_hidden"], data["qwen_mask"], data["t5_ids"], data["t5_mask"])
    assert models.denoiser is not None
    prediction: Tensor = models.denoiser(data["noisy"], data["t"], context)
    return prediction


def _shapes(tensors: dict[str, Tensor]) -> dict[str, SimpleNamespace]:
    return {name: SimpleNamespace(shape=tuple(value.shape)) for name, value in tensors.items()}


def place(module: str) -> tuple[str, str]:
    """(component, path) of a module as the golden list names it: the text encoder's begin with ``layers``."""
    if module.startswith("layers."):
        return "qwen3", module
    if module.startswith("llm_adapter."):
        return "llm_adapter", module.removeprefix("llm_adapter.")
    return "denoiser", module
