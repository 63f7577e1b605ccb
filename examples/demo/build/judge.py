"""Do samples show what their captions say? Sampled with the tiny net, decoded, and read by the independent reader."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..reader import Reader
from . import pictures
from .captions import CaptionTable
from .denoiser import sample
from .net import predict
from .pictures import Scene


@dataclass(frozen=True)
class Score:
    """Shares of samples read as asked for, and of those where all three are right."""

    shape: float
    colour: float
    background: float
    all: float


def score(reader: Reader, pixels: Tensor, scenes: list[Scene]) -> Score:
    """Compare what the reader sees in pixels [N, 3, H, W] with what `scenes` say."""
    names = ("shape", "colour", "background")
    right = [
        [getattr(seen, name) == getattr(scene, name) for name in names]
        for seen, scene in zip(reader.read(pixels), scenes, strict=True)
    ]
    count = len(right)
    shares = [sum(row[axis] for row in right) / count for axis in range(3)]
    return Score(*shares, all=sum(all(row) for row in right) / count)


@torch.no_grad()
def samples_of(
    net: nn.Module, vae: nn.Module, table: CaptionTable, scenes: list[Scene], *, seed: int = 5, steps: int = 20
) -> Tensor:
    """Pictures [N, 3, 64, 64] for the plain captions of `scenes`: Euler, shift 2, CFG 3.5."""
    captions = [pictures.caption(scene) for scene in scenes]
    text, empty = table.pick(captions), table.pick([""] * len(captions))
    latents = sample(net, predict, text, empty, steps=steps, shift=2.0, cfg=3.5, seed=seed)
    pixels: Tensor = vae.decode(latents)
    return pixels


def contact_sheet(pixels: Tensor, columns: int = 12):
    """All pictures in one PIL image."""
    from PIL import Image

    arrays = pixels.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    height, width = arrays.shape[1:3]
    rows = -(-len(arrays) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height))
    for index, array in enumerate(arrays):
        sheet.paste(Image.fromarray(array), (index % columns * width, index // columns * height))
    return sheet
