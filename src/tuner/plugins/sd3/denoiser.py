"""diffusers' ``SD3Transformer2DModel`` at any size, with our forward pass, attention, time embedding and positions.

Shapes: B batch, L image tokens, T text tokens, D width.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner.core.compute.attention import attention
from tuner.core.compute.linear import project, share_storage
from tuner.core.compute.modulation_cache import modulations
from tuner.core.compute.norm_rope import rms_norm_rope

from .positions import PatchEmbed
from .sizes import HEAD_DIM

if TYPE_CHECKING:
    from .sizes import DenoiserSizes

TIME_CHANNELS = 256


def build(sizes: DenoiserSizes) -> nn.Module:
    """The transformer without values, on the meta device; its position table has the size that the weights have."""
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        model: Any = SD3Transformer2DModel(
            sample_size=sizes.side * sizes.patch,
            patch_size=sizes.patch,
            in_channels=sizes.in_channels,
            out_channels=sizes.out_channels,
            num_layers=sizes.blocks,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=sizes.heads,
            joint_attention_dim=sizes.text_width,
            caption_projection_dim=sizes.width,
            pooled_projection_dim=sizes.pooled_width,
            # The table comes from the file; making it here would cost seconds at full size.
            pos_embed_max_size=1,
            dual_attention_layers=sizes.dual,
            qk_norm="rms_norm" if sizes.qk_norm else None,
        )
        model.register_to_config(pos_embed_max_size=sizes.side)
        model.pos_embed = PatchEmbed(model.pos_embed.proj, torch.empty(1, sizes.side**2, sizes.width))
        old = model.time_text_embed
        model.time_text_embed = Conditioning(old.timestep_embedder, old.text_embedder)
    model.forward = MethodType(sd3_forward, model)
    module: nn.Module = model
    return module


def sd3_forward(self: Any, latents: Tensor, context: Tensor, pooled: Tensor, timesteps: Tensor) -> Tensor:
    """Velocity [B,C,h,w] for latents [B,C,h,w] at timesteps [B] float32 in 0..1000.

    context [B, T, W]: rows of all text encoders; pooled [B, P].
    """
    hidden = self.pos_embed(latents).contiguous()
    condition = self.time_text_embed(timesteps, pooled)
    text = self.context_embedder(context)
    with modulations(self, F.silu(condition)):
        for block in self.transformer_blocks:
            text, hidden = block(hidden, text, condition)
    tokens: Tensor = self.proj_out(self.norm_out(hidden, condition))
    patch = self.config.patch_size
    rows, columns = latents.shape[-2] // patch, latents.shape[-1] // patch
    # Inside a token: row, column, channel.
    patches = tokens.reshape(tokens.shape[0], rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return patches.reshape(tokens.shape[0], -1, rows * patch, columns * patch)


def join_projections(model: nn.Module) -> None:
    """Put the matrices of queries, keys and values beside each other, so that one product makes all three."""
    for block in model.transformer_blocks.children():  # type: ignore[union-attr]
        for path, names in (
            ("attn", ("to_q", "to_k", "to_v")),
            ("attn", ("add_q_proj", "add_k_proj", "add_v_proj")),
            ("attn2", ("to_q", "to_k", "to_v")),
        ):
            module = getattr(block, path)
            if module is not None:
                share_storage([getattr(module, name) for name in names])


class Conditioning(nn.Module):
    """Timesteps [B] in 0..1000 and pooled text [B, P] to the vector [B, D] that modulates every block.

    The timestep is embedded in float32 from the sines to the last layer: bfloat16 knows only every fourth timestep
    above 512.
    """

    def __init__(self, timestep_embedder: nn.Module, text_embedder: nn.Module) -> None:
        super().__init__()
        self.timestep_embedder = timestep_embedder
        self.text_embedder = text_embedder

    def forward(self, timesteps: Tensor, pooled: Tensor) -> Tensor:
        time: Tensor = self.timestep_embedder(time_features(timesteps))
        text: Tensor = self.text_embedder(pooled)
        return (time + text.float()).to(pooled.dtype)


def time_features(timesteps: Tensor) -> Tensor:
    """Cosines then sines of timesteps [B], [B, 256] float32; periods up to 10000."""
    half = TIME_CHANNELS // 2
    rates = 10000.0 ** -(torch.arange(half, device=timesteps.device, dtype=torch.float32) / half)
    angles = timesteps.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class JointAttention:
    """Attention processor for diffusers' modules that honours ``attention.backend`` and ``attention.split``."""

    def __init__(self, backend: str = "sdpa", *, split: bool = False) -> None:
        self.backend, self.split = backend, split

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Image tokens [B,L,D] with text tokens [B,T,D], or image tokens alone, to the same shapes."""
        image = hidden_states.shape[1]
        parts = [self._heads(hidden_states, attn, ("to_q", "to_k", "to_v"), (attn.norm_q, attn.norm_k))]
        if encoder_hidden_states is not None:
            names, norms = ("add_q_proj", "add_k_proj", "add_v_proj"), (attn.norm_added_q, attn.norm_added_k)
            parts.append(self._heads(encoder_hidden_states, attn, names, norms))
        q, k, v = (torch.cat(each, dim=1).transpose(1, 2) for each in zip(*parts, strict=True))
        out = attention(q, k, v, backend=self.backend, split=self.split).transpose(1, 2).flatten(2)
        own: Tensor = attn.to_out[0](out[:, :image])
        if encoder_hidden_states is None:
            return own
        text = out[:, image:]
        return own, text if attn.context_pre_only else attn.to_add_out(text)

    def _heads(
        self, x: Tensor, attn: Any, names: tuple[str, ...], norms: tuple[nn.Module | None, ...]
    ) -> tuple[Tensor, ...]:
        """Queries, keys and values [B, tokens, heads, width], the first two normed where the model does so."""
        made = [
            value.reshape(*value.shape[:-1], attn.heads, -1)
            for value in project(x, [getattr(attn, name) for name in names])
        ]
        normed = [
            value if norm is None else rms_norm_rope(value, norm.weight, None, norm.eps)  # type: ignore[arg-type]
            for value, norm in zip(made, norms, strict=False)
        ]
        return (*normed, made[2])
