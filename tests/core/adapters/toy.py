"""A small two-component model with its facts and configuration, for adapter tests."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from tuner.core.config import ModelConfigBase, RunConfig
from tuner.core.types import (
    LYCORIS_KINDS,
    Blocks,
    DtypeRules,
    KeyFormat,
    KeyMaps,
    LoraRules,
    ModelFacts,
    Models,
    NoiseDefaults,
    SampleDefaults,
)

WIDTH = 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.mlp(torch.tanh(self.q(x)) * self.k_proj(x)))


class Denoiser(nn.Module):
    """[B, L, width] -> [B, L, width], with a 1x1 convolution in front."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Conv2d(WIDTH, WIDTH, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)
        # In rows of memory, as models have it: of other layouts torch may make another product than a flat one.
        x = x.contiguous()
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def toy_models(seed: int = 1) -> Models:
    torch.manual_seed(seed)
    models = Models(denoiser=Denoiser(), text_encoders={"words": Encoder()})
    for module in (models.denoiser, models.text_encoders["words"]):
        module.requires_grad_(False).eval()
    return models


def toy_x() -> Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(3))


PATHS = {
    "denoiser": (
        "embed",
        *(f"blocks.{index}.{name}" for index in range(3) for name in ("q", "k_proj", "mlp.0", "mlp.2")),
        "head",
    ),
    "words": ("layers.0", "layers.1"),
}

DOTTED = {"prefixes": {"denoiser": "model.", "words": "text.model."}, "down": ".lora_A.weight", "up": ".lora_B.weight"}
MAPS = KeyMaps(
    formats=(
        KeyFormat(name="dotted", **DOTTED, read_prefixes={"denoiser": ("net.",)}),
        KeyFormat(name="dotted-alpha", **DOTTED, alpha=".alpha", kinds=LYCORIS_KINDS),
        KeyFormat(
            name="flat",
            prefixes={"denoiser": "lora_model_", "words": "lora_text_"},
            separator="_",
            down=".lora_down.weight",
            up=".lora_up.weight",
            alpha=".alpha",
            kinds=LYCORIS_KINDS,
        ),
        KeyFormat(
            name="renamed",
            prefixes={"denoiser": "transformer."},
            down=".lora_A.weight",
            up=".lora_B.weight",
            rename={"denoiser": ((r"^blocks\.(\d+)\.q$", r"layers.\1.to_q"), (r"^head$", "proj_out"))},
        ),
    ),
    default="dotted",
    paths=lambda keys: {**PATHS, "denoiser": (*PATHS["denoiser"], *(f"blocks.{index}.norm" for index in range(3)))},
)

FACTS = ModelFacts(
    family="toy",
    flavour="toy",
    components=("denoiser", "words"),
    trainable=("denoiser", "words"),
    text_components=("words",),
    latent_channels=4,
    spatial_factor=8,
    resolution_multiple=16,
    block_lists=(Blocks(path="blocks", count=3),),
    lora=LoraRules(
        include={"denoiser": (r"embed", r"blocks\..*", r"head"), "words": (r"layers\..*",)},
        exclude=(r"embed|head",),
        presets={"mlp": ((r".*\.mlp\..*",), ())},
        groups={"main": "blocks"},
    ),
    key_maps=f"{__name__}:MAPS",
    dtypes=DtypeRules(),
    text_fields=MappingProxyType({}),
    max_tokens=MappingProxyType({}),
    files=MappingProxyType({}),
    noise=NoiseDefaults(timesteps="uniform", shift=1.0),
    sample=SampleDefaults(steps=2, cfg=1.0, shift=1.0, size=(64, 64), multiple=16),
)


def toy_config(
    network: dict[str, Any] | None = None, components: tuple[str, ...] = ("denoiser",), **sections: Any
) -> RunConfig:
    raw = {
        "model": ModelConfigBase(family="toy", path="toy.safetensors"),
        "data": {"sets": [{"resolution": 64, "sources": [{"id": "a", "path": "a"}]}]},
        "network": {"rank": 2, **(network or {})},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 1, "components": components, "seed": 7},
        "checkpoint": {"dir": "out"},
        **sections,
    }
    return RunConfig.model_validate(raw)
