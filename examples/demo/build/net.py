"""The tiny model: sizes, initial weights, one prediction, and the file it is saved in."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tuner.plugins.anima.denoiser import Denoiser
from tuner.plugins.anima.facts import AdapterSizes, DenoiserSizes
from tuner.plugins.anima.text import LLMAdapter

from .text_files import T5_VOCABULARY, WIDTH

DENOISER = DenoiserSizes(
    width=192,
    heads=6,
    head_dim=32,
    blocks=4,
    mlp_width=768,
    text_width=WIDTH,
    adaln_rank=32,
    in_channels=16,
    out_channels=16,
    rope_ratio=4.0,
)
ADAPTER = AdapterSizes(
    vocab=T5_VOCABULARY,
    embed_width=WIDTH,
    width=WIDTH,
    source_width=WIDTH,
    out_width=WIDTH,
    layers=2,
    heads=4,
    mlp_width=512,
)
CONTEXT = 512
PREFIX = "net."


class TinyNet(nn.Module):
    """Denoiser and LLM adapter as one module, so that both train together."""

    def __init__(self) -> None:
        super().__init__()
        self.denoiser = Denoiser(DENOISER)
        self.denoiser.reset_parameters()
        self.adapter = LLMAdapter(ADAPTER)
        for name, parameter in self.adapter.named_parameters():
            if name == "embed.weight":
                nn.init.normal_(parameter)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, noisy: Tensor, sigmas: Tensor, text: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """Velocity [B, 16, h, w] for text = (states, state_mask, ids, mask), see `CaptionTable`."""
        mask = text[3]
        room = CONTEXT - mask.shape[1]
        context = F.pad(self.adapter(*text), (0, 0, 0, room))
        return self.denoiser(noisy, sigmas, context, context_mask=F.pad(mask, (0, room)))

    def tensors(self) -> dict[str, Tensor]:
        """All weights under the names of the published file."""
        named = {f"{PREFIX}{name}": value for name, value in self.denoiser.state_dict().items()}
        named |= {f"{PREFIX}llm_adapter.{name}": value for name, value in self.adapter.state_dict().items()}
        return named

    def save(self, path: Path) -> None:
        """Write a bf16 safetensors file with prefix `net.` and the adapter inside."""
        tensors = {name: value.detach().bfloat16().contiguous().clone() for name, value in self.tensors().items()}
        save_file(tensors, path, metadata={"format": "pt"})

    @classmethod
    def load(cls, path: Path) -> TinyNet:
        """The inverse of `save`, in float32."""
        net, denoiser, adapter = cls(), {}, {}
        for name, value in load_file(path).items():
            name = name.removeprefix(PREFIX)
            inner = name.removeprefix("llm_adapter.")
            (denoiser if inner == name else adapter)[inner] = value.float()
        net.denoiser.load_state_dict(denoiser)
        net.adapter.load_state_dict(adapter)
        return net.eval()


def predict(net: nn.Module, noisy: Tensor, sigmas: Tensor, text: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """One prediction, in the form that `denoiser.train_denoiser` takes."""
    velocity: Tensor = net(noisy, sigmas, text)
    return velocity


def parameter_count(net: nn.Module) -> int:
    """Number of weights."""
    return sum(torch.numel(parameter) for parameter in net.parameters())
