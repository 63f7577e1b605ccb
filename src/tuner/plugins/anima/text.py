"""The text side: tokens, the Qwen3 encoder and the LLM adapter.

Shapes: B captions, Ls Qwen3 tokens, Lt T5 tokens, S width of the Qwen3 states, W width of the adapter.
All masks are boolean, True where a token is real; all padding is on the right.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from .facts import AdapterSizes

logger = logging.getLogger(__name__)

EPS = 1e-6
ROPE_THETA = 10000.0
T5_END_ID = 1
T5_PAD_ID = 0
QWEN3_PAD_ID = 151643


class RMSNorm(nn.Module):
    """Root-mean-square norm: statistics in float32, result in the dtype of the input, then times the weight."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
        return normed.to(x.dtype) * self.weight


def rope_table(length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, each [length, 1, head_dim] float32, the half vector written twice."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), ROPE_THETA**-exponents)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding in the halves form on x [B, L, H, d]; computed in float32, returned in the dtype of x."""
    cos, sin = table
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class AdapterAttention(nn.Module):
    """Multi-head attention with per-head RMS norm and rotary positions on queries and keys."""

    def __init__(self, dim: int, source_dim: int, heads: int) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(source_dim, dim, bias=False)
        self.v_proj = nn.Linear(source_dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim)
        self.k_norm = RMSNorm(self.head_dim)

    def forward(
        self,
        x: Tensor,
        source: Tensor,
        key_mask: Tensor,
        q_table: tuple[Tensor, Tensor],
        k_table: tuple[Tensor, Tensor],
    ) -> Tensor:
        """x [B, L, W] asks, source [B, Lk, S] answers; key_mask [B, Lk]. Rows without a valid key give zero."""
        heads = (-1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).unflatten(-1, heads)), q_table)
        k = rotate(self.k_norm(self.k_proj(source).unflatten(-1, heads)), k_table)
        v = self.v_proj(source).unflatten(-1, heads)
        # A softmax over nothing is NaN in some kernels: such rows look at everything and are then set to zero.
        has_key = key_mask.any(dim=-1)
        mask = (key_mask | ~has_key[:, None])[:, None, None]
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
        )
        out = torch.where(has_key[:, None, None], out.transpose(1, 2).flatten(2), 0.0)
        return self.o_proj(out)


class AdapterBlock(nn.Module):
    """Pre-norm block: self-attention over the T5 tokens, cross-attention to the raw Qwen3 states, MLP."""

    def __init__(self, sizes: AdapterSizes) -> None:
        super().__init__()
        self.norm_self_attn = RMSNorm(sizes.width)
        self.self_attn = AdapterAttention(sizes.width, sizes.width, sizes.heads)
        self.norm_cross_attn = RMSNorm(sizes.width)
        self.cross_attn = AdapterAttention(sizes.width, sizes.source_width, sizes.heads)
        self.norm_mlp = RMSNorm(sizes.width)
        self.mlp = nn.Sequential(
            nn.Linear(sizes.width, sizes.mlp_width), nn.GELU(), nn.Linear(sizes.mlp_width, sizes.width)
        )

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        source: Tensor,
        source_mask: Tensor,
        table: tuple[Tensor, Tensor],
        source_table: tuple[Tensor, Tensor],
    ) -> Tensor:
        normed = self.norm_self_attn(x)
        x = x + self.self_attn(normed, normed, mask, table, table)
        x = x + self.cross_attn(self.norm_cross_attn(x), source, source_mask, table, source_table)
        return x + self.mlp(self.norm_mlp(x))


class LLMAdapter(nn.Module):
    """Turns T5 token ids into the denoiser's context, reading the meaning from the Qwen3 states."""

    def __init__(self, sizes: AdapterSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embed = nn.Embedding(sizes.vocab, sizes.embed_width)
        if sizes.embed_width != sizes.width:
            self.in_proj = nn.Linear(sizes.embed_width, sizes.width, bias=sizes.in_proj_bias)
        self.blocks = nn.ModuleList(AdapterBlock(sizes) for _ in range(sizes.layers))
        self.out_proj = nn.Linear(sizes.width, sizes.out_width)
        self.norm = RMSNorm(sizes.out_width)

    def forward(self, source: Tensor, source_mask: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Context rows for the denoiser, zero where the token is padding.

        source [B, Ls, S] Qwen3 states, source_mask [B, Ls], ids [B, Lt] T5 ids, mask [B, Lt] -> [B, Lt, W] in the
        dtype of the weights. Only the longest valid lengths are computed; the padding would not change them.
        """
        source_mask, mask = source_mask.bool(), mask.bool()
        length, source_length = valid_length(mask), valid_length(source_mask)
        weight = self.out_proj.weight
        # One source position stays, masked, when no caption has any: attention needs a key to ignore.
        source = source[:, : max(source_length, 1)].to(weight.dtype)
        source_mask = source_mask[:, : max(source_length, 1)]
        target_mask = mask[:, :length]
        x = self.embed(ids[:, :length]).to(weight.dtype)
        if self.sizes.embed_width != self.sizes.width:
            x = self.in_proj(x)
        head_dim = self.sizes.width // self.sizes.heads
        table = rope_table(length, head_dim, x.device)
        source_table = rope_table(source.shape[1], head_dim, x.device)
        for block in self.blocks:
            x = block(x, target_mask, source, source_mask, table, source_table)
        x = torch.where(target_mask[..., None], self.norm(self.out_proj(x)), 0.0)
        return F.pad(x, (0, 0, 0, mask.shape[1] - length))


def valid_length(mask: Tensor) -> int:
    """1 + the last position that is valid in any row of mask [B, L]; 0 when there is none."""
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return int((mask * positions).max().item()) if mask.numel() else 0
