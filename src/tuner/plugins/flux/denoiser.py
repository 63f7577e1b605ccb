"""The transformer: diffusers' modules, with attention, forward pass and time embedding of our own around them.

diffusers' blocks compute the model exactly. What is replaced: the forward of the whole, because it rounds timesteps to
the dtype of the activations before it embeds them (0.7313 becomes 0.7305 in bfloat16, a step of 1/1000 in sigma); and
the attention of a block, so that q, k and v are one product and the configuration's attention settings are honoured.

Shapes: B batch, N image tokens, T text tokens, H width.
"""

from __future__ import annotations

import math
import warnings
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner.core.compute.attention import attention, check_backend
from tuner.core.compute.linear import project, share_storage
from tuner.core.compute.modulation_cache import modulations
from tuner.core.compute.norm_rope import rms_norm_rope

from .sizes import PATCH, DenoiserSizes

TIME_CHANNELS = 256
MAX_PERIOD = 10000.0
ROPE_BASE = 10000.0
KEEP_FLOAT32 = (r"time_text_embed\..*",)
"""Small modules that stay float32 so that neighbouring noise levels stay apart in bfloat16."""


def build(sizes: DenoiserSizes) -> nn.Module:
    """diffusers' module of these sizes on torch's current default device, with our forward passes on the instances."""
    from diffusers import ChromaTransformer2DModel, FluxTransformer2DModel

    common: dict[str, Any] = {
        "patch_size": 1,
        "in_channels": sizes.in_channels,
        "out_channels": sizes.out_channels,
        "num_layers": sizes.blocks,
        "num_single_layers": sizes.singles,
        "attention_head_dim": sizes.head_dim,
        "num_attention_heads": sizes.heads,
        "joint_attention_dim": sizes.text_width,
        "axes_dims_rope": sizes.axes,
    }
    model: nn.Module
    if sizes.approximator is not None:
        parts = sizes.approximator
        with warnings.catch_warnings():
            # diffusers' class still imports its own position module by the old name.
            warnings.simplefilter("ignore", FutureWarning)
            model = ChromaTransformer2DModel(
                **common,
                approximator_num_channels=parts.channels,
                approximator_hidden_dim=parts.width,
                approximator_layers=parts.layers,
            )
        model.forward = MethodType(chroma_forward, model)
    else:
        model = FluxTransformer2DModel(
            **common, pooled_projection_dim=sizes.pooled_width, guidance_embeds=sizes.flavour == "dev"
        )
        model.forward = MethodType(flux_forward, model)
    set_attention(model, "sdpa", split=False)
    return model


def set_attention(model: nn.Module, backend: str, *, split: bool) -> None:
    """Make every block attend as ``attention.backend`` and ``attention.split`` say."""
    processor = JointAttention(check_backend(backend), split)
    for block in blocks_of(model):
        block.attn.set_processor(processor)  # type: ignore[union-attr, operator]


def fuse_projections(model: nn.Module) -> None:
    """Give the q, k and v weights of each side one storage, so that they are one product. Names stay as they are."""
    for block in blocks_of(model):
        attn: Any = block.attn
        share_storage((attn.to_q, attn.to_k, attn.to_v))
        if attn.added_kv_proj_dim is not None:
            share_storage((attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))


def restore_buffers(model: nn.Module, device: str) -> None:
    """Give values to what no file carries: Chroma's table of vector indices, which a meta construction leaves empty."""
    embed: Any = model.time_text_embed
    if hasattr(embed, "mod_proj"):
        count, channels = embed.mod_proj.shape
        index = torch.arange(count, dtype=torch.float32, device=device)
        embed.register_buffer("mod_proj", sinusoid(index, channels), persistent=False)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """All blocks in the order of execution."""
    lists: Any = model
    return [*lists.transformer_blocks, *lists.single_transformer_blocks]


# --- forward passes ---------------------------------------------------------------------------------------------------


def flux_forward(
    self: Any,
    tokens: Tensor,
    text: Tensor,
    times: Tensor,
    *,
    grid: tuple[int, int],
    text_mask: Tensor | None = None,
    pooled: Tensor,
    guidance: Tensor | None = None,
) -> Tensor:
    """Velocity [B, N, C] for tokens [B, N, C] at times [B] float32 in 0..1.

    text [B, T, W]; pooled [B, P]; grid: rows and columns of tokens; text_mask [B, T] bool, False hides a text token
    from every query; guidance [B] in its natural scale, for models that have that input.
    """
    hidden, context, dtype = self.x_embedder(tokens), self.context_embedder(text), tokens.dtype
    embed = self.time_text_embed
    condition = _embedded(embed.timestep_embedder, times) + embed.text_embedder(pooled.to(_dtype(embed)))
    if guidance is not None:
        condition = condition + _embedded(embed.guidance_embedder, guidance)
    condition = condition.to(dtype)
    rope = rope_table(grid, text.shape[1], self.pos_embed.axes_dim, tokens.device)
    extra = {"attention_mask": None if text_mask is None else key_mask(text_mask, tokens.shape[1])}
    with modulations(self, F.silu(condition)):
        for block in blocks_of(self):
            context, hidden = block(hidden, context, condition, rope, extra)
    out: Tensor = self.proj_out(self.norm_out(hidden, condition))
    return out


def chroma_forward(
    self: Any, tokens: Tensor, text: Tensor, times: Tensor, *, grid: tuple[int, int], text_mask: Tensor
) -> Tensor:
    """Velocity [B, N, C]; as `flux_forward`. text_mask [B, T] bool already holds the one padding token that is seen."""
    if text_mask.dtype != torch.bool:
        raise TypeError(f"the text mask must be boolean, not {text_mask.dtype}: numbers would be added to the logits")
    hidden, context = self.x_embedder(tokens), self.context_embedder(text)
    singles, doubles = len(self.single_transformer_blocks), len(self.transformer_blocks)
    vectors = chroma_vectors(self, times, 3 * singles + 12 * doubles + 2).to(tokens.dtype)
    rope = rope_table(grid, text.shape[1], self.pos_embed.axes_dim, tokens.device)
    mask = F.pad(text_mask, (0, tokens.shape[1]), value=True)
    for index, block in enumerate(self.transformer_blocks):
        image, side = 3 * singles + 6 * index, 3 * singles + 6 * (doubles + index)
        own = torch.cat((vectors[:, image : image + 6], vectors[:, side : side + 6]), dim=1)
        context, hidden = block(
            hidden_states=hidden, encoder_hidden_states=context, temb=own, image_rotary_emb=rope, attention_mask=mask
        )
    joint = torch.cat((context, hidden), dim=1)
    for index, block in enumerate(self.single_transformer_blocks):
        own = vectors[:, 3 * index : 3 * index + 3]
        joint = block(hidden_states=joint, temb=own, image_rotary_emb=rope, attention_mask=mask)
    out: Tensor = self.proj_out(self.norm_out(joint[:, text.shape[1] :], vectors[:, -2:]))
    return out


def chroma_vectors(model: Any, times: Tensor, count: int) -> Tensor:
    """All modulation vectors [B, count, H]; guidance is 0, as in the model's own training."""
    approximator = model.distilled_guidance_layer
    quarter = approximator.in_proj.in_features // 4
    time = sinusoid(times, quarter)
    fixed = sinusoid(torch.zeros_like(times), quarter)
    index = sinusoid(torch.arange(count, device=times.device, dtype=torch.float32), 2 * quarter)
    inputs = torch.cat((time, fixed), dim=1)[:, None].expand(-1, count, -1)
    inputs = torch.cat((inputs, index[None].expand(times.shape[0], -1, -1)), dim=2)
    vectors: Tensor = approximator(inputs.to(approximator.in_proj.weight.dtype))
    return vectors


def sinusoid(values: Tensor, channels: int) -> Tensor:
    """Cosines then sines of 1000 * values at falling frequencies, [B, channels] float32 for values [B]."""
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = 1000.0 * values.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * steps)
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def _embedded(module: nn.Module, values: Tensor) -> Tensor:
    result: Tensor = module(sinusoid(values, TIME_CHANNELS).to(_dtype(module)))
    return result


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


# --- positions, masks, packing ----------------------------------------------------------------------------------------


def rope_table(grid: tuple[int, int], text_tokens: int, axes: tuple[int, int, int], device: torch.device) -> Tensor:
    """cos and sin [2, T + N, head width] float32, each angle twice in a row; text tokens stand at position 0.

    Axes: an unused one, row, column. Angles are computed in float64, since float32 ones are off in the fourth digit.
    """
    rows, columns = grid
    high = torch.float32 if device.type == "mps" else torch.float64
    row = torch.arange(rows, device=device, dtype=high)[:, None].expand(rows, columns).reshape(-1)
    column = torch.arange(columns, device=device, dtype=high)[None].expand(rows, columns).reshape(-1)
    angles = []
    for position, width in zip((torch.zeros_like(row), row, column), axes, strict=True):
        exponents = torch.arange(0, width, 2, dtype=high, device=device) / width
        angles.append(position[:, None] / ROPE_BASE**exponents)
    image = torch.cat(angles, dim=1)
    joint = torch.cat((image.new_zeros(text_tokens, image.shape[1]), image)).repeat_interleave(2, dim=1)
    return torch.stack((joint.cos(), joint.sin())).float()


def key_mask(text_mask: Tensor, image_tokens: int) -> Tensor:
    """text_mask [B, T] bool to [B, 1, 1, T + N] for attention: image tokens are always seen."""
    return F.pad(text_mask, (0, image_tokens), value=True)[:, None, None]


def pack(latents: Tensor) -> Tensor:
    """Latents [B,C,h,w] to tokens [B, h/2*w/2, 4C]; inside a token: channel, row, column."""
    batch, channels, height, width = latents.shape
    grid = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH * PATCH)


def unpack(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens [B, N, 4C] to latents [B,C,h,w], the inverse of `pack`; grid: rows and columns of tokens."""
    rows, columns = grid
    patches = tokens.reshape(tokens.shape[0], rows, columns, -1, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(tokens.shape[0], -1, rows * PATCH, columns * PATCH)


# --- attention --------------------------------------------------------------------------------------------------------


class JointAttention:
    """A diffusers attention processor for both kinds of blocks: text first, RMS norm per head, rotary positions."""

    def __init__(self, backend: str, split: bool) -> None:
        self.backend, self.split = backend, split

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens of the image [B,N,H] with those of the text [B,T,H], or all in one [B,T+N,H], to the same shapes.

        image_rotary_emb: cos and sin, each [T + N, head width].
        """
        rope = torch.stack(image_rotary_emb) if isinstance(image_rotary_emb, tuple) else image_rotary_emb
        count = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        own = None if rope is None else rope[:, count:]
        q, k, v = (_heads(x, attn.head_dim) for x in project(hidden_states, (attn.to_q, attn.to_k, attn.to_v)))
        q, k = _turned(q, attn.norm_q, own), _turned(k, attn.norm_k, own)
        if encoder_hidden_states is not None:
            side = None if rope is None else rope[:, :count]
            sides = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text = [_heads(x, attn.head_dim) for x in project(encoder_hidden_states, sides)]
            text[:2] = _turned(text[0], attn.norm_added_q, side), _turned(text[1], attn.norm_added_k, side)
            q, k, v = (torch.cat(pair, dim=1) for pair in zip(text, (q, k, v), strict=True))
        if attention_mask is not None and attention_mask.shape[-2] > 1:
            # All real queries see the same keys, and what a hidden query computes is never read.
            attention_mask = attention_mask[:, :, -1:]
        out = attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
            bias=attention_mask, backend=self.backend, split=self.split,
        ).transpose(1, 2).flatten(2)  # fmt: skip
        if encoder_hidden_states is None:
            return out
        return attn.to_out[0](out[:, count:]), attn.to_add_out(out[:, :count])


def _turned(x: Tensor, norm: Any, rope: Tensor | None) -> Tensor:
    """x [B, L, heads, width], normed and rotated by neighbouring pairs."""
    return rms_norm_rope(x, norm.weight, rope, norm.eps, neighbours=True)


def _heads(x: Tensor, width: int) -> Tensor:
    """[B, L, H] to [B, L, heads, width]."""
    return x.view(*x.shape[:-1], -1, width)
