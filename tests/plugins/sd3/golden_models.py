"""The recorded models and adapters of each flavour: their files, and the transformer loaded from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.helpers import golden, golden_path
from tuner.plugins.sd3.sources import Part, Sources

FILES = {
    "sd3m": (
        "sd3m_weights_f16", "sd3m_forward_0", "sd3m_forward_1", "sd3m_lora_sdscripts", "sd3m_lora_diffusers",
        "sd3m_lora_forward_0", "sd3m_lora_merged_some",
    ),
    "sd35m": (
        "sd35m_weights_f16", "sd35m_forward_0", "sd35m_forward_1", "sd35m_lora_sdscripts", "sd35m_lora_diffusers",
        "sd35m_lora_forward_0", "sd35m_lora_merged_some",
    ),
}  # fmt: skip


def golden_file(flavour: str, part: str) -> Path:
    """Path of a recorded file, such as the ``forward_0`` of ``sd3m``."""
    [name] = [name for name in FILES[flavour] if name == f"{flavour}_{part}"]
    return golden_path(f"sd3/{name}.safetensors")


def golden_case(flavour: str, part: str) -> Any:
    """Tensors of a recorded file."""
    return golden(f"sd3/{golden_file(flavour, part).name}")


def golden_sources(flavour: str) -> Sources:
    """The golden transformer alone."""
    part = Part(path=golden_file(flavour, "weights_f16"))
    return Sources(denoiser=part, encoders={}, vae=part, tokenizers={})
