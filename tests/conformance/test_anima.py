"""The flagship under the kit that every plugin passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3Model

from tests.fixtures.tiny_anima import make_tiny_anima
from tuner.core.testing import ModelConformance, write_empty_weights
from tuner.plugins.anima.denoiser import Denoiser
from tuner.plugins.anima.sizes import AdapterSizes, DenoiserSizes
from tuner.plugins.anima.text import LLMAdapter

DENOISER = DenoiserSizes(
    width=2048, heads=16, head_dim=128, blocks=28, mlp_width=8192, text_width=1024, adaln_rank=256, in_channels=16,
    out_channels=16, rope_ratio=4.0,
)  # fmt: skip
ADAPTER = AdapterSizes(
    vocab=32128, embed_width=1024, width=1024, source_width=1024, out_width=1024, layers=6, heads=16, mlp_width=4096,
    in_proj_bias=False,
)  # fmt: skip
QWEN3 = {
    "vocab_size": 151936, "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072,
}  # fmt: skip


class TestAnima(ModelConformance):
    plugin = "anima"
    compiler = "inductor"

    def tiny_config(self, tmp_path: Path) -> dict[str, Any]:
        return {"model": make_tiny_anima(tmp_path / "model")}

    def full_size_config(self, tmp_path: Path) -> dict[str, Any]:
        """Public sizes; tokenizers and the autoencoder, which do not train, are those of the tiny model."""
        model = make_tiny_anima(tmp_path)
        with torch.device("meta"):
            parts = {"net.": Denoiser(DENOISER), "net.llm_adapter.": LLMAdapter(ADAPTER)}
            encoder = Qwen3Model(Qwen3Config(**QWEN3))
        shapes = {
            prefix + name: value.shape for prefix, part in parts.items() for name, value in part.named_parameters()
        }
        write_empty_weights(tmp_path / "anima.safetensors", shapes)
        names = {f"model.{name}": value.shape for name, value in encoder.named_parameters()}
        write_empty_weights(tmp_path / "qwen3" / "model.safetensors", names)
        return {"model": model}
