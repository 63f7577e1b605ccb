"""An independent reader of demo pictures: shape, colour and background from pixels alone.

A convolutional network of about 40,000 weights, trained by `build/train_reader.py` on drawn pictures (never on
samples of the model). Its seventh shape, `other`, stands for everything that is no clean object, so that a half-formed
blob is never counted as right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

SHAPES = ("circle", "square", "triangle", "cross", "star", "wug", "other")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
BACKGROUNDS = ("white", "black", "gray", "pink")
WEIGHTS = Path(__file__).with_name("reader.safetensors")


@dataclass(frozen=True)
class Reading:
    """What the reader sees in one picture."""

    shape: str
    colour: str
    background: str


class Reader(nn.Module):
    """float [B, 3, 64, 64] in -1..1 to logits of shape [B, 7], colour [B, 6] and background [B, 4]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 24, 32, 48)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.mix = nn.Conv2d(48, 48, 3, padding=1)
        self.shape = nn.Linear(48 * 2, len(SHAPES))
        self.colour = nn.Linear(48 * 2, len(COLOURS))
        self.background = nn.Linear(48 * 2, len(BACKGROUNDS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for conv in self.convs:
            x = F.relu(conv(x))
        x = F.relu(x + self.mix(x))
        x = torch.cat((x.mean((2, 3)), x.amax((2, 3))), 1)
        return self.shape(x), self.colour(x), self.background(x)

    @torch.no_grad()
    def read(self, x: Tensor) -> list[Reading]:
        """The most likely shape, colour and background of each picture, any size, float in -1..1."""
        if x.shape[-2:] != (64, 64):
            x = F.interpolate(x, (64, 64), mode="area")
        shape, colour, background = (logits.argmax(1).tolist() for logits in self(x.clamp(-1, 1)))
        return [
            Reading(SHAPES[a], COLOURS[b], BACKGROUNDS[c]) for a, b, c in zip(shape, colour, background, strict=True)
        ]


def load_reader(path: Path = WEIGHTS) -> Reader:
    """The committed reader, in evaluation mode."""
    reader = Reader()
    reader.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return reader.eval()


def load_pictures(paths: Sequence[Path]) -> Tensor:
    """Picture files as float [N, 3, H, W] in -1..1."""
    import numpy as np
    from PIL import Image

    arrays = []
    for path in paths:
        with Image.open(path) as image:
            arrays.append(np.asarray(image.convert("RGB")))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
