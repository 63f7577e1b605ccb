"""The tiny VAE: the original Qwen-Image/Wan key layout, trained on single pictures as 2-D convolutions.

Saved as 3-D convolutions whose earlier time slices are zero, which is the same function on one frame.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import pictures
from .muon import Pair

log = logging.getLogger(__name__)

WIDTH = 12
MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508)
MEAN += (0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743)
STD += (3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


class Norm(nn.Module):
    """x / ||x|| over channels * sqrt(channels) * gamma; the channels-last view keeps it fast."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.permute(0, 2, 3, 1), (x.shape[1],), self.gamma, 1e-12).permute(0, 3, 1, 2)


class Residual(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        conv_a, conv_b = nn.Conv2d(width, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.residual = nn.Sequential(Norm(width), nn.SiLU(), conv_a, Norm(out), nn.SiLU(), nn.Identity(), conv_b)
        self.shortcut = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.residual(x)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = Norm(width)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, columns = x.shape
        qkv = self.to_qkv(self.norm(x)).reshape(batch, 3, width, height * columns).transpose(2, 3)
        out = F.scaled_dot_product_attention(qkv[:, 0], qkv[:, 1], qkv[:, 2])
        return x + self.proj(out.transpose(1, 2).reshape(batch, width, height, columns))


class Down(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x)


class Up(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest"), nn.Conv2d(width, width // 2, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x)


def _head(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(Norm(width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1))


def _middle(width: int) -> nn.Sequential:
    return nn.Sequential(Residual(width, width), Attention(width), Residual(width, width))


class Encoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        w, w2, w4 = width, 2 * width, 4 * width
        self.conv1 = nn.Conv2d(3, w, 3, padding=1)
        stages = [Residual(w, w), Residual(w, w), Down(w), Residual(w, w2), Residual(w2, w2), Down(w2)]
        stages += [Residual(w2, w4), Residual(w4, w4), Down(w4), Residual(w4, w4), Residual(w4, w4)]
        self.downsamples = nn.Sequential(*stages)
        self.middle = _middle(w4)
        self.head = _head(w4, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.downsamples(self.conv1(x))))


class Decoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        w, w2, w4 = width, 2 * width, 4 * width
        self.conv1 = nn.Conv2d(16, w4, 3, padding=1)
        self.middle = _middle(w4)
        stages = [Residual(w4, w4), Residual(w4, w4), Residual(w4, w4), Up(w4)]
        stages += [Residual(w2, w4), Residual(w4, w4), Residual(w4, w4), Up(w4)]
        stages += [Residual(w2, w2), Residual(w2, w2), Residual(w2, w2), Up(w2)]
        stages += [Residual(w, w), Residual(w, w), Residual(w, w)]
        self.upsamples = nn.Sequential(*stages)
        self.head = _head(w, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.upsamples(self.middle(self.conv1(x))))


class TinyVae(nn.Module):
    """Autoencoder with running latent statistics in place of a KL term.

    `encode` gives unit latents [B, 16, H/8, W/8] (the first half of the 32 outputs is the mean), `decode` their
    picture [B, 3, H, W] in about -1..1.
    """

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.encoder = Encoder(width)
        self.conv1 = nn.Conv2d(32, 32, 1)
        self.conv2 = nn.Conv2d(16, 16, 1)
        self.decoder = Decoder(width)
        self.unit = nn.BatchNorm2d(16, affine=False, momentum=0.02)

    def encode(self, x: Tensor) -> Tensor:
        return self.unit(self.conv1(self.encoder(x))[:, :16])

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(self.conv2(latents))


def _loss(pred: Tensor, target: Tensor) -> Tensor:
    edges = sum((pred.diff(dim=axis) - target.diff(dim=axis)).abs().mean() for axis in (2, 3))
    return F.l1_loss(pred, target) + F.mse_loss(pred, target) + 0.5 * edges


def random_pixels(count: int, seed: int) -> Tensor:
    """Pictures of known and new things for the VAE, which may know every shape: float [N, 3, 64, 64] in -1..1."""
    rng = random.Random(seed)
    shapes = (*pictures.SHAPES, pictures.NEW_WORD)
    scenes = [pictures.random_scene(rng, shapes) for _ in range(count)]
    return torch.from_numpy(pictures.pixels(scenes)).float().div_(127.5).sub_(1)


def train_vae(*, seconds: float, steps: int, count: int = 4000, batch: int = 16, seed: int = 0) -> TinyVae:
    """Train until `steps` or `seconds` of wall clock, whichever is first; the rate falls to zero by then."""
    torch.manual_seed(seed)
    vae = TinyVae().to(memory_format=torch.channels_last)
    data = random_pixels(count, seed)
    optimizer = Pair(vae, matrix_lr=4e-3, other_lr=4e-3)
    start, step, progress = time.monotonic(), 0, 0.0
    while progress < 1.0:
        x = data[torch.randint(len(data), (batch,))].to(memory_format=torch.channels_last)
        latents = vae.encode(x)
        noise = 0.2 * 2 * torch.rand(batch, 1, 1, 1) * torch.randn_like(latents)
        loss = _loss(vae.decode(latents + noise), x)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step(min(1.0, (step + 1) / 50, (1.0 - progress) / 0.7))
        step += 1
        progress = max(step / steps, (time.monotonic() - start) / seconds)
        if step % 100 == 0:
            log.info("vae step %d loss %.4f %.0f s", step, loss.item(), time.monotonic() - start)
    return vae.eval()


@torch.no_grad()
def psnr(vae: TinyVae, x: Tensor) -> float:
    """Peak signal to noise ratio in dB over pictures in -1..1."""
    error = F.mse_loss(vae.decode(vae.encode(x)).clamp(-1, 1), x).item()
    return 10 * math.log10(4 / error)


@torch.no_grad()
def to_original(vae: TinyVae, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> dict[str, Tensor]:
    """The original 194-tensor layout, fp16; latent statistics folded into `conv1` and `conv2`."""
    tensors: dict[str, Tensor] = {}
    running_std = (vae.unit.running_var + vae.unit.eps).sqrt()
    mu, s = torch.tensor(mean), torch.tensor(std)
    for key, value in vae.state_dict().items():
        if key.startswith("unit."):
            continue
        value = value.float().clone()
        if key == "conv1.weight":
            value[:16] *= (s / running_std)[:, None, None, None]
        elif key == "conv1.bias":
            value[:16] = (value[:16] - vae.unit.running_mean) * s / running_std + mu
        elif key == "conv2.weight":
            value /= s[None, :, None, None]
        elif key == "conv2.bias":
            value -= (vae.conv2.weight[:, :, 0, 0] / s) @ mu
        tensors[key] = _with_time(key, value)
    resamplers = (("encoder.downsamples", 5, 1), ("encoder.downsamples", 8, 1))
    resamplers += (("decoder.upsamples", 3, 2), ("decoder.upsamples", 7, 2))
    for group, index, factor in resamplers:
        width = tensors[f"{group}.{index}.resample.1.weight"].shape[1]
        tensors[f"{group}.{index}.time_conv.weight"] = torch.zeros(factor * width, width, 3, 1, 1)
        tensors[f"{group}.{index}.time_conv.bias"] = torch.zeros(factor * width)
    return {key: value.half().contiguous() for key, value in sorted(tensors.items())}


def _with_time(key: str, value: Tensor) -> Tensor:
    if key.endswith(".gamma"):
        return value[:, None, None] if ".norm." in key else value[:, None, None, None]
    if value.ndim != 4 or ".resample." in key or ".to_qkv." in key or ".proj." in key:
        return value
    if value.shape[-1] == 1:
        return value[:, :, None]
    full = value.new_zeros(*value.shape[:2], 3, *value.shape[2:])
    full[:, :, 2] = value
    return full
