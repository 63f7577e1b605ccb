"""The modules of Mosaic. B batch, h/w latent size, L bytes, N = h*w tiles, W width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .facts import CHANNELS, FACTOR


class Tiles(nn.Module):
    """Pixels [B,3,H,W] to tiles [B,192,H/8,W/8] and back, without loss."""

    def encode(self, pixels: Tensor) -> Tensor:
        return F.pixel_unshuffle(pixels, FACTOR)

    def decode(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(latents, FACTOR).clamp(-1, 1)


class Bytes(nn.Module):
    """Byte ids [B,L] to features [B,L,W]; each byte sees itself and the three before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(257, width)
        self.layers = nn.Sequential(nn.Linear(4 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, ids: Tensor) -> Tensor:
        padded = F.pad(self.embed(ids), (0, 0, 3, 0))
        near = torch.cat([padded[:, shift : shift + ids.shape[1]] for shift in range(4)], dim=-1)
        return self.layers(near)


class Block(nn.Module):
    """Self-attention with rotary places, cross-attention to the text, MLP; the first and last follow the noise."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.query, self.keys_values = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.cross_out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, tiles: Tensor, time: Tensor, text: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        """tiles [B,N,W], time [B,1,W], text [B,L,W], mask [B,1,1,L] bool, places [2,N,D]."""
        shift, scale, gate, late_shift, late_scale, late_gate = self.modulation(F.silu(time)).chunk(6, dim=-1)
        query, key, value = map(self._split, self.qkv(_norm(tiles) * (1 + scale) + shift).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(_turn(query, places), _turn(key, places), value)
        tiles = tiles + gate * self.out(mixed.transpose(1, 2).flatten(2))
        key, value = map(self._split, self.keys_values(text).chunk(2, dim=-1))
        mixed = F.scaled_dot_product_attention(self._split(self.query(_norm(tiles))), key, value, attn_mask=mask)
        tiles = tiles + self.cross_out(mixed.transpose(1, 2).flatten(2))
        return tiles + late_gate * self.down(F.gelu(self.up(_norm(tiles) * (1 + late_scale) + late_shift)))

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Denoiser(nn.Module):
    """Noisy tiles to clean tiles."""

    def __init__(self, width: int, blocks: int, heads: int = 4) -> None:
        super().__init__()
        self.head_width = width // heads
        self.tiles, self.time = nn.Linear(CHANNELS, width), nn.Linear(width, width)
        self.nothing = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.clean = nn.Linear(width, CHANNELS)

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """latents [B,192,h,w], timesteps [B] in 0..1000, text [B,L,W], mask [B,L] -> clean tiles, float32."""
        height, width = latents.shape[-2:]
        dtype = self.tiles.weight.dtype
        tiles = self.tiles(latents.to(dtype).flatten(2).transpose(1, 2))
        time = self.time(_waves(timesteps, tiles.shape[-1]).to(dtype))[:, None]
        # One learned vector stands in front of the bytes, so that an empty caption has something to look at.
        text = torch.cat([self.nothing.expand(len(text), 1, -1), text.to(dtype)], dim=1)
        seen = F.pad(mask, (1, 0), value=True)[:, None, None]
        places = _places(height, width, self.head_width, latents.device)
        for block in self.blocks:
            tiles = block(tiles, time, text, seen, places)
        return self.clean(_norm(tiles)).transpose(1, 2).unflatten(2, (height, width)).float()


def _norm(tokens: Tensor) -> Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:])


def _waves(numbers: Tensor, width: int) -> Tensor:
    """[B] to sines and cosines [B,width], float32."""
    angles = numbers.float()[:, None] * 10000 ** (-torch.arange(width // 2, device=numbers.device) / (width // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _places(height: int, width: int, size: int, device: torch.device) -> Tensor:
    """Cosines and sines [2,N,size/2] of rotary places: half of the angles count rows, half columns."""
    frequencies = 100 ** (-torch.arange(size // 4, device=device) / (size // 4))
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    angles = torch.cat([axis.flatten()[:, None] * frequencies for axis in (rows, columns)], dim=-1)
    return torch.stack([angles.cos(), angles.sin()])


def _turn(heads: Tensor, places: Tensor) -> Tensor:
    """Rotate pairs of channels of [B,heads,N,D] by the places."""
    first, second = heads.float().chunk(2, dim=-1)
    cos, sin = places
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(heads.dtype)
