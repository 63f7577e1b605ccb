"""Trains the independent reader on drawn pictures with blur, noise, tints and broken counter-examples."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from safetensors.torch import save_file
from torch import Tensor

from ..reader import BACKGROUNDS, COLOURS, SHAPES, Reader
from . import pictures
from .pictures import Scene

log = logging.getLogger(__name__)

OTHER = SHAPES.index("other")


def _blob(rng: random.Random, scene: Scene) -> Image.Image:
    """An irregular closed outline that is none of the shapes."""
    image = Image.new("RGB", (256, 256), pictures.BACKGROUNDS[scene.background])
    corners = rng.randint(5, 9)
    turn = rng.uniform(0, 6.3)
    points = []
    for index in range(corners):
        angle = turn + 6.2832 * (index + rng.uniform(-0.35, 0.35)) / corners
        distance = 4 * scene.radius * rng.uniform(0.35, 1.25)
        points.append((4 * scene.x + distance * np.cos(angle), 4 * scene.y + distance * np.sin(angle)))
    ImageDraw.Draw(image).polygon(points, fill=pictures.COLOURS[scene.colour])
    blurred = image.filter(ImageFilter.GaussianBlur(rng.uniform(2, 10)))
    # A threshold after the blur rounds the corners as half-formed samples have them.
    return blurred.resize((64, 64), Image.Resampling.BOX)


def _mixture(rng: random.Random, scene: Scene, shapes: tuple[str, ...]) -> Image.Image:
    """Two different shapes drawn over each other, as in a sample that did not decide."""
    first, second = rng.sample([shape for shape in shapes if shape != pictures.NEW_WORD], 2)
    one = pictures.draw(replace(scene, shape=first))
    two = pictures.draw(replace(scene, shape=second))
    return Image.blend(one, two, rng.uniform(0.4, 0.6))


def _pierced(rng: random.Random, scene: Scene) -> Image.Image:
    """A known shape with a hole that does not belong there: too small, or far from the middle."""
    image = pictures.draw(scene, 256)
    size, turn = rng.uniform(0.16, 0.3) * 4 * scene.radius, rng.uniform(0, 6.3)
    away = rng.uniform(0.0, 0.35) * 4 * scene.radius
    x, y = 4 * scene.x + away * np.cos(turn), 4 * scene.y + away * np.sin(turn)
    hole = (x - size, y - size * rng.uniform(0.6, 1.2), x + size, y + size)
    ImageDraw.Draw(image).ellipse(hole, fill=pictures.BACKGROUNDS[scene.background])
    return image.resize((64, 64), Image.Resampling.BOX)


def _broken_ring(rng: random.Random, scene: Scene) -> Image.Image:
    """A ring with a gap, or with its hole half filled."""
    image = pictures.draw(replace(scene, shape=pictures.NEW_WORD, tint=(0, 0, 0), ground_tint=(0, 0, 0)), 256)
    pencil = ImageDraw.Draw(image)
    x, y, start, edge = 4 * scene.x, 4 * scene.y, rng.uniform(0, 360), 4 * scene.radius
    if rng.random() < 0.5:
        reach = edge + 4
        gap = pictures.BACKGROUNDS[scene.background]
        pencil.pieslice((x - reach, y - reach, x + reach, y + reach), start, start + rng.uniform(35, 120), fill=gap)
    else:
        reach = 0.6 * edge
        bar = pictures.COLOURS[scene.colour]
        pencil.pieslice((x - reach, y - reach, x + reach, y + reach), start, start + rng.uniform(100, 240), fill=bar)
    return image.resize((64, 64), Image.Resampling.BOX)


def examples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """uint8 pictures [N, 3, 64, 64] and labels [N, 3]; about one in four is a counter-example."""
    rng = random.Random(seed)
    shapes = (*pictures.SHAPES, pictures.NEW_WORD)
    images, labels = [], []
    for _ in range(count):
        scene = pictures.random_scene(rng, shapes)
        label = SHAPES.index(scene.shape)
        draw = rng.random()
        if draw < 0.1:
            image, label = _blob(rng, scene), OTHER
        elif draw < 0.15:
            image, label = _mixture(rng, scene, shapes), OTHER
        elif draw < 0.2 and scene.shape != pictures.NEW_WORD:
            image, label = _pierced(rng, scene), OTHER
        elif draw < 0.25:
            image, label = _broken_ring(rng, scene), OTHER
        else:
            image = pictures.draw(scene)
        images.append(np.asarray(image))
        labels.append((label, COLOURS.index(scene.colour), BACKGROUNDS.index(scene.background)))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.tensor(labels)


def _disturbed(x: Tensor) -> Tensor:
    x = x.float().div(127.5).sub(1)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    x = torch.lerp(x, soft, torch.rand(len(x), 1, 1, 1))
    rough = F.interpolate(torch.randn(len(x), 3, 16, 16), scale_factor=4.0, mode="bilinear")
    x = x + 0.12 * torch.rand(len(x), 1, 1, 1) * rough + 0.08 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)
    x = x + 0.06 * torch.randn(len(x), 3, 1, 1)
    return F.grid_sample(x, _warp(len(x)), padding_mode="border", align_corners=False).clamp(-1, 1)


def _warp(count: int) -> Tensor:
    """Sampling grids [B, 64, 64, 2]: a small shift, stretch and shear, and a soft wobble of about a pixel."""
    matrix = torch.eye(2, 3) + torch.randn(count, 2, 3) * torch.tensor([0.06, 0.06, 0.08])
    wobble = F.interpolate(torch.randn(count, 2, 6, 6), (64, 64), mode="bicubic") * 0.03 * torch.rand(count, 1, 1, 1)
    return F.affine_grid(matrix, [count, 3, 64, 64], align_corners=False) + wobble.permute(0, 2, 3, 1)


def train_reader(*, steps: int = 2000, count: int = 12000, seed: int = 3) -> Reader:
    """A reader trained with AdamW 2e-3 falling to zero."""
    torch.manual_seed(seed)
    pixels, labels = examples(count, seed)
    reader = Reader()
    optimizer = torch.optim.AdamW(reader.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        index = torch.randint(len(pixels), (64,))
        logits = reader(_disturbed(pixels[index]))
        loss = sum(F.cross_entropy(part, labels[index, axis]) for axis, part in enumerate(logits))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 200 == 0:
            log.info("reader step %d loss %.4f", step + 1, loss.item())
    return reader.eval()


@torch.no_grad()
def accuracy(reader: Reader, *, count: int = 1000, seed: int = 1234) -> list[float]:
    """Shares of right shapes, colours and backgrounds over fresh undisturbed pictures."""
    pixels, labels = examples(count, seed)
    logits = reader(pixels.float().div(127.5).sub(1))
    return [(part.argmax(1) == labels[:, axis]).float().mean().item() for axis, part in enumerate(logits)]


def save_reader(reader: Reader, path: Path) -> None:
    """Write the weights as fp16."""
    save_file({name: value.half().contiguous() for name, value in reader.state_dict().items()}, path)
