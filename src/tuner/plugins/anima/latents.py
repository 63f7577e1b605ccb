"""The VAE on single images, as 2-D convolutions.

The weights are those of a causal video VAE. For one frame its 3x3x3 kernels see the image through their last time
slice only (the other two multiply the zero frames in front), so each is folded to that slice: same result, a third of
the work.
Shapes: B images, H x W pixels, h x w = H/8 x W/8 latents, C channels of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner.core.compute.weights import assign
from tuner.core.errors import UsageError

from .vae_names import UNUSED
from .vae_names import names as names

LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
LOGVAR_RANGE = (-30.0, 20.0)


class Conv(nn.Conv2d):
    """A convolution that can work in bands of rows; each band reads the rows that its kernel overlaps."""

    band_rows: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        stride, pad, kernel = self.stride[0], int(self.padding[0]), self.kernel_size[0]
        rows = (x.shape[2] + 2 * pad - kernel) // stride + 1
        band = self.band_rows
        if band is None or kernel == 1 or rows <= band:
            return super().forward(x)
        parts = []
        for first in range(0, rows, band):
            last = min(first + band, rows)
            top, bottom = first * stride - pad, (last - 1) * stride - pad + kernel
            piece = x[:, :, max(top, 0) : min(bottom, x.shape[2])]
            piece = F.pad(piece, (pad, pad, max(-top, 0), max(bottom - x.shape[2], 0)))
            parts.append(F.conv2d(piece, self.weight, self.bias, self.stride))
        return torch.cat(parts, dim=2)


class ChannelNorm(nn.Module):
    """x / ||x|| over channels * sqrt(C) * gamma, in float32; gamma keeps the file's trailing axes of size 1."""

    def __init__(self, channels: int, axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))

    def forward(self, x: Tensor) -> Tensor:
        # rms_norm over the last axis of a channels-last tensor is the fast form of the same formula.
        rows = F.rms_norm(x.permute(0, 2, 3, 1).float(), (x.shape[1],), self.gamma.flatten().float(), eps=1e-24)
        return rows.to(x.dtype).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv, plus a 1x1 shortcut when the width changes."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            ChannelNorm(channels, 3), nn.SiLU(), Conv(channels, out_channels, 3, padding=1),
            ChannelNorm(out_channels, 3), nn.SiLU(), nn.Identity(), Conv(out_channels, out_channels, 3, padding=1),
        )  # fmt: skip
        self.shortcut = Conv(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.shortcut(x) + self.residual(x)
        return result


class AttentionBlock(nn.Module):
    """One-head attention over the h*w positions of an image, as a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, 2)
        self.to_qkv = Conv(channels, 3 * channels, 1)
        self.proj = Conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2).contiguous()
        q, k, v = qkv[:, None].chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        result: Tensor = x + self.proj(out)
        return result


class Resample(nn.Module):
    """Half or double the size of an image; between frames the original also has ``time_conv``, unused here."""

    def __init__(self, channels: int, out_channels: int, *, up: bool) -> None:
        super().__init__()
        self.up = up
        conv = Conv(channels, out_channels, 3, padding=1) if up else Conv(channels, out_channels, 3, stride=2)
        self.resample = nn.Sequential(nn.Identity(), conv)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest-exact") if self.up else F.pad(x, (0, 1, 0, 1))
        result: Tensor = self.resample(x)
        return result


def _middle(channels: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels))


def _head(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(ChannelNorm(channels, 3), nn.SiLU(), Conv(channels, out_channels, 3, padding=1))


class Encoder(nn.Module):
    """Pixels [B,3,H,W] to moments [B,2z,h,w]. ``stages``: (kind, channels in, channels out) of each layer."""

    def __init__(self, stages: list[tuple[str, int, int]], base: int, moments: int) -> None:
        super().__init__()
        self.conv1 = Conv(3, base, 3, padding=1)
        self.downsamples = nn.Sequential(*(_stage(*stage) for stage in stages))
        top = stages[-1][2]
        self.middle = _middle(top)
        self.head = _head(top, moments)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.middle(self.downsamples(self.conv1(x))))
        return result


class Decoder(nn.Module):
    """Latents [B,z,h,w] to pixels [B,3,H,W]."""

    def __init__(self, stages: list[tuple[str, int, int]], latent_channels: int) -> None:
        super().__init__()
        top = stages[0][1]
        self.conv1 = Conv(latent_channels, top, 3, padding=1)
        self.middle = _middle(top)
        self.upsamples = nn.Sequential(*(_stage(*stage) for stage in stages))
        self.head = _head(stages[-1][2], 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.upsamples(self.middle(self.conv1(x))))
        return result


def _stage(kind: str, channels: int, out_channels: int) -> nn.Module:
    if kind == "residual":
        return ResidualBlock(channels, out_channels)
    return Resample(channels, out_channels, up=kind == "up")


class VAE(nn.Module):
    """Image VAE with 16 normalised latent channels and a factor of 8.

    band_rows: rows per band of every convolution (None: whole images); the result is the same, the peak memory is not.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, encoder: list[tuple[str, int, int]], decoder: list[tuple[str, int, int]], base: int) -> None:
        super().__init__()
        channels = len(LATENT_MEAN)
        self.encoder = Encoder(encoder, base, 2 * channels)
        self.conv1 = Conv(2 * channels, 2 * channels, 1)
        self.conv2 = Conv(channels, channels, 1)
        self.decoder = Decoder(decoder, channels)
        self.set_tables("cpu")

    def set_tables(self, device: str | torch.device) -> None:
        """The normalisation tables, float32 whatever the dtype of the weights."""
        for name, values in (("latent_mean", LATENT_MEAN), ("latent_std", LATENT_STD)):
            table = torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)
            self.register_buffer(name, table, persistent=False)

    def set_band_rows(self, rows: int | None) -> None:
        """Compute convolutions in bands of ``rows`` output rows (odd numbers are rounded up)."""
        for layer in self.modules():
            if isinstance(layer, Conv):
                layer.band_rows = None if rows is None else rows + rows % 2

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [B,3,H,W] in -1..1 to (mean, log variance) [B,16,h,w] float32, before normalisation."""
        x = pixels.to(self.conv1.weight.dtype).contiguous(memory_format=torch.channels_last)
        mean, logvar = self.conv1(self.encoder(x)).float().chunk(2, dim=1)
        return mean.contiguous(), logvar.clamp(*LOGVAR_RANGE).contiguous()

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Normalised latents [B,16,h,w] float32: the posterior mean, or a sample when ``noise`` [B,16,h,w] is given."""
        mean, logvar = self.posterior(pixels)
        if noise is not None:
            mean = mean + torch.exp(0.5 * logvar) * noise.to(mean)
        return (mean - self.latent_mean) / self.latent_std

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B,3,H,W] float32 in -1..1 from normalised latents [B,16,h,w]."""
        x = latents.float() * self.latent_std + self.latent_mean
        x = x.to(self.conv2.weight.dtype).contiguous(memory_format=torch.channels_last)
        pixels: Tensor = self.decoder(self.conv2(x)).float()
        return pixels.clamp(-1.0, 1.0).contiguous()


# --- weights ----------------------------------------------------------------------------------------------------------


def build(tensors: Iterable[tuple[str, Tensor]], shapes: dict[str, tuple[int, ...]], *, dtype: torch.dtype,
          device: str = "cpu", where: str | None = None) -> VAE:  # fmt: skip
    """A VAE from weights under original names; ``shapes`` are those in the file, the widths are read from them."""
    if "encoder.conv1.weight" not in shapes or "decoder.conv1.weight" not in shapes or "conv1.bias" not in shapes:
        raise UsageError(
            "this is not a Qwen-Image VAE",
            where=where,
            why="encoder.conv1, decoder.conv1 or conv1 is absent",
            fix="set model.vae.path to the qwen_image_vae file",
        )
    with torch.device("meta"):
        vae = VAE(
            _stages(shapes, "encoder.downsamples"),
            _stages(shapes, "decoder.upsamples"),
            shapes["encoder.conv1.weight"][0],
        )
    assign(vae, _folded(tensors), dtype=dtype, device=device, where=where, unused=lambda name: bool(UNUSED.match(name)))
    vae.set_tables(device)
    # Module.to takes a memory format, though its type stubs do not know.
    return cast(VAE, cast(Any, vae).to(memory_format=torch.channels_last).eval().requires_grad_(False))


def _folded(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        yield name, tensor[:, :, -1] if tensor.ndim == 5 else tensor


def _stages(shapes: dict[str, tuple[int, ...]], root: str) -> list[tuple[str, int, int]]:
    """(kind, channels in, channels out) of each layer under ``root``."""
    stages: list[tuple[str, int, int]] = []
    resample = "up" if root.startswith("decoder") else "down"
    while True:
        prefix = f"{root}.{len(stages)}"
        if f"{prefix}.residual.2.weight" in shapes:
            out_channels, channels = shapes[f"{prefix}.residual.2.weight"][:2]
            stages.append(("residual", channels, out_channels))
        elif f"{prefix}.resample.1.weight" in shapes:
            out_channels, channels = shapes[f"{prefix}.resample.1.weight"][:2]
            stages.append((resample, channels, out_channels))
        else:
            break
    if not stages:
        raise UsageError(f"the VAE file has no {root}", fix="use a complete VAE file")
    return stages
