"""The diffusion transformer of Anima (Cosmos-Predict2's MiniTrainDIT on single images).

Letters in shapes: B samples, C latent channels, h and w latent size, N = (h/2)(w/2) image tokens, L text tokens,
D width, H heads, d = D / H, S width of the text states.

Parameter names are those of the published weight files, so that loading and adapter export need no translation.
Everything that depends on the noise level alone (sinusoid, AdaLN vectors of all blocks) is computed once, before the
blocks and outside of anything that recomputes them; a block takes tensors only, so that checkpointing, compilation or
streaming can replace ``block.forward``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner.core.compute.attention import attention, check_backend
from tuner.core.compute.dtypes import weight_dtype
from tuner.core.compute.linear import project, share_storage
from tuner.core.compute.modulation import gated_residual, modulated_norm
from tuner.core.compute.norm_rope import rms_norm_rope

from .sizes import DenoiserSizes

EPS = 1e-6
PATCH = 2
SUB_LAYERS = ("self_attn", "cross_attn", "mlp")


class Patchify(nn.Module):
    """[B, C, h, w] -> [B, N, C*4], channel slowest inside a patch, then row and column."""

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x = x.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH * PATCH)


def unpatchify(x: Tensor, height: int, width: int) -> Tensor:
    """[B, N, 4*C] -> [B, C, height, width]; here the channel is fastest, behind row and column."""
    batch, _, features = x.shape
    x = x.view(batch, height // PATCH, width // PATCH, PATCH, PATCH, features // (PATCH * PATCH))
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height, width)


class PatchEmbed(nn.Module):
    """Patches to tokens: [B, C+1, h, w] -> [B, N, D]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(Patchify(), nn.Linear(channels * PATCH * PATCH, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        patchify, linear = self.proj
        return _in_own_dtype(linear, patchify(x))


class Sinusoid(nn.Module):
    """sigma [B] -> [B, width] float32: cosines, then sines, of sigma at geometrically spaced frequencies."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.count = width // 2

    def forward(self, sigmas: Tensor) -> Tensor:
        steps = torch.arange(self.count, dtype=torch.float32, device=sigmas.device)
        angles = sigmas.float()[:, None] * torch.exp(steps * (-math.log(10000.0) / self.count))
        return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimestepMlp(nn.Module):
    """Two linears around SiLU. With AdaLN-LoRA they make the modulation that all blocks share, [B, D] -> [B, 3D]."""

    def __init__(self, width: int, *, low_rank: bool) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, width, bias=not low_rank)
        self.linear_2 = nn.Linear(width, 3 * width if low_rank else width, bias=False)

    def forward(self, sinusoid: Tensor) -> Tensor:
        return _in_own_dtype(self.linear_2, F.silu(_in_own_dtype(self.linear_1, sinusoid).float())).float()


def _adaln(width: int, outputs: int, rank: int) -> nn.Sequential:
    """SiLU, then one matrix, or two around a rank without a non-linearity between them."""
    if rank == 0:
        return nn.Sequential(nn.SiLU(), nn.Linear(width, outputs, bias=False))
    return nn.Sequential(nn.SiLU(), nn.Linear(width, rank, bias=False), nn.Linear(rank, outputs, bias=False))


def _in_own_dtype(linear: nn.Module, x: Tensor) -> Tensor:
    """``linear(x)`` in the dtype of its own weight: embedders and AdaLN may be kept in float32."""
    weight = getattr(linear, "weight", None)
    result: Tensor = linear(x if weight is None else x.to(weight.dtype))
    return result


class Attention(nn.Module):
    """Multi-head attention with per-head RMS norm on queries and keys; rotary positions when tables are given."""

    def __init__(self, width: int, source_width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.backend, self.split = "sdpa", False
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(source_width, width, bias=False)
        self.v_proj = nn.Linear(source_width, width, bias=False)
        self.output_proj = nn.Linear(width, width, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, eps=EPS)
        self.k_norm = nn.RMSNorm(head_dim, eps=EPS)
        self.fuse()

    def joint(self) -> tuple[nn.Linear, ...]:
        """The projections of one input, computed together."""
        raise AssertionError("self-attention and cross-attention differ in what they project together")

    def fuse(self) -> None:
        """Make the weights of ``joint`` adjacent, so that one GEMM computes them all."""
        share_storage(self.joint())

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """q, k, v [B, tokens, H, d] -> [B, N, D]."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = attention(q, k, v, bias=bias, backend=self.backend, split=self.split)
        return project(out.transpose(1, 2).flatten(2), (self.output_proj,))[0]


class SelfAttention(Attention):
    """Attention among the image tokens, with rotary positions."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__(width, width, heads, head_dim)

    def joint(self) -> tuple[nn.Linear, ...]:
        return self.q_proj, self.k_proj, self.v_proj

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """x [B, N, D]; rope [2, N, d] float32 -> [B, N, D]."""
        q, k, v = map(self._heads, project(x, self.joint()))
        q = rms_norm_rope(q, self.q_norm.weight, rope, EPS)
        k = rms_norm_rope(k, self.k_norm.weight, rope, EPS)
        return self._attend(q, k, v, None)


class CrossAttention(Attention):
    """Attention of the image tokens to the text, without positions."""

    def joint(self) -> tuple[nn.Linear, ...]:
        return self.k_proj, self.v_proj

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None) -> Tensor:
        """x [B, N, D]; context [B, L, S]; bias: float, added to the logits of each context token -> [B, N, D]."""
        q = self._heads(project(x, (self.q_proj,))[0])
        k, v = map(self._heads, project(context, self.joint()))
        q = rms_norm_rope(q, self.q_norm.weight, None, EPS)
        k = rms_norm_rope(k, self.k_norm.weight, None, EPS)
        return self._attend(q, k, v, bias)


class Mlp(nn.Module):
    """Two linears with GELU between them; x [B, N, D] -> [B, N, D]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(width, hidden, bias=False)
        self.layer2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return project(F.gelu(project(x, (self.layer1,))[0]), (self.layer2,))[0]


class Block(nn.Module):
    """Self-attention, cross-attention and MLP, each between an adaptive norm and a gated residual.

    The three ``adaln_modulation_*`` live here because the files name them so; the denoiser evaluates them for all
    blocks at once and hands over the result.
    """

    def __init__(self, sizes: DenoiserSizes) -> None:
        super().__init__()
        width = sizes.width
        self.self_attn = SelfAttention(width, sizes.heads, sizes.head_dim)
        self.cross_attn = CrossAttention(width, sizes.text_width, sizes.heads, sizes.head_dim)
        self.mlp = Mlp(width, sizes.mlp_width)
        self.adaln_modulation_self_attn = _adaln(width, 3 * width, sizes.adaln_rank)
        self.adaln_modulation_cross_attn = _adaln(width, 3 * width, sizes.adaln_rank)
        self.adaln_modulation_mlp = _adaln(width, 3 * width, sizes.adaln_rank)

    def forward(
        self, x: Tensor, context: Tensor, modulation: Tensor, rope: Tensor, context_bias: Tensor | None
    ) -> Tensor:
        """x [B, N, D], context [B, L, S], modulation [9, B, D] in the compute dtype -> [B, N, D].

        modulation: (shift, 1 + scale, gate) of the three sub-layers in turn; rope [2, N, d] float32: cos and sin;
        context_bias [L] float32 or None.
        """
        shift1, scale1, gate1, shift2, scale2, gate2, shift3, scale3, gate3 = modulation.unbind(0)
        x = gated_residual(x, gate1, self.self_attn(modulated_norm(x, shift1, scale1, EPS), rope))
        x = gated_residual(x, gate2, self.cross_attn(modulated_norm(x, shift2, scale2, EPS), context, context_bias))
        return gated_residual(x, gate3, self.mlp(modulated_norm(x, shift3, scale3, EPS)))


class FinalLayer(nn.Module):
    """Adaptive norm and the linear from tokens to the values of their patches."""

    def __init__(self, sizes: DenoiserSizes) -> None:
        super().__init__()
        self.linear = nn.Linear(sizes.width, sizes.out_channels * PATCH * PATCH, bias=False)
        self.adaln_modulation = _adaln(sizes.width, 2 * sizes.width, sizes.adaln_rank)

    def forward(self, x: Tensor, embedding: Tensor, shared: Tensor | None) -> Tensor:
        """x [B, N, D], embedding [B, D] (SiLU applied), shared [B, 3D] or None -> [B, N, 4*C]."""
        modulation = _run_adaln(self.adaln_modulation, embedding)
        if shared is not None:
            modulation = modulation + shared[:, : modulation.shape[-1]]
        shift, scale = modulation.chunk(2, dim=-1)
        x = modulated_norm(x, shift.to(x.dtype), (1.0 + scale).to(x.dtype), EPS)
        return _in_own_dtype(self.linear, x)


def _run_adaln(adaln: nn.Sequential, embedding: Tensor) -> Tensor:
    """The linears of one AdaLN stack on an embedding that has gone through SiLU already; float32 result."""
    return _run_chain(list(adaln)[1:], embedding)


class Denoiser(nn.Module):
    """Predicts the velocity ``noise - latents`` of noisy latents.

    sizes: read from the weights by ``sizes.denoiser_sizes``. Building allocates parameters and nothing else; under
    ``torch.device("meta")`` not even those. Weights of the blocks fix the compute dtype; one-dimensional weights,
    embedders, AdaLN and the final layer may be float32 while the blocks are bfloat16.
    """

    def __init__(self, sizes: DenoiserSizes) -> None:
        super().__init__()
        self.sizes = sizes
        width = sizes.width
        self.x_embedder = PatchEmbed(sizes.in_channels + 1, width)
        self.t_embedder = nn.Sequential(Sinusoid(width), TimestepMlp(width, low_rank=sizes.adaln_rank > 0))
        self.t_embedding_norm = nn.RMSNorm(width, eps=EPS)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.blocks))
        self.final_layer = FinalLayer(sizes)
        self._rope: dict[tuple[int, int, torch.device], Tensor] = {}
        self.register_load_state_dict_post_hook(_fuse_again)  # type: ignore[no-untyped-call]
        self.fuse()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the blocks' matrices, and so of the activations."""
        return weight_dtype(self.blocks[0].get_submodule("mlp.layer1"))

    def set_attention(self, backend: str, split: bool) -> None:
        """Choose how attention is computed; UsageError for a backend that does not exist."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend, module.split = check_backend(backend), split

    def forward(
        self,
        latents: Tensor,
        sigmas: Tensor,
        context: Tensor,
        *,
        context_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """One prediction.

        latents: [B, C, h, w], h and w even. sigmas: [B] noise level in 0..1, float32. context: [B, L, S]; every row
        takes part, zero rows too. context_mask: [B, L] bool; a False row promises to be exactly zero. padding_mask:
        [B, 1, H, W], 0 where there is picture, any size; None for all zero. Returns [B, C, h, w] float32.
        """
        height, width = latents.shape[-2:]
        dtype = self.dtype
        x = self.x_embedder(self._with_padding(latents, padding_mask)).to(dtype)
        embedding, shared = self.embed_sigmas(sigmas)
        modulations = self._modulations(embedding, shared).to(dtype)
        rope = self.rope(height // PATCH, width // PATCH, latents.device)
        context = context.to(dtype)
        bias = None
        if context_mask is not None and context.device.type == "cpu":
            # Fewer keys pay off on a CPU. On CUDA the added bias would forfeit the flash kernel, which costs more than
            # the zero rows do, and the trim needs the length on the host.
            context, bias = fold_context(context, context_mask)
        for block, modulation in zip(self.blocks, modulations, strict=True):
            x = block(x, context, modulation, rope, bias)
        return unpatchify(self.final_layer(x, embedding, shared), height, width).float()

    def embed_sigmas(self, sigmas: Tensor) -> tuple[Tensor, Tensor | None]:
        """sigmas [B] -> (SiLU of the time embedding [B, D], modulation shared by all blocks [B, 3D] or None), float32.

        With AdaLN-LoRA the embedding is the normalised sinusoid itself: the linears only make the shared modulation.
        """
        sinusoid = self.t_embedder[0](sigmas)
        hidden = self.t_embedder[1](sinusoid)
        shared = hidden if self.sizes.adaln_rank else None
        embedding = sinusoid if self.sizes.adaln_rank else hidden
        normed = F.rms_norm(embedding, (self.sizes.width,), self.t_embedding_norm.weight.float(), EPS)
        return F.silu(normed), shared

    def rope(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """cos and sin of the rotary angles, [2, rows * columns, d] float32, kept per grid size and device."""
        key = (rows, columns, device)
        if key not in self._rope:
            # Plain tensors even under inference mode: a later training step saves them for its backward.
            with torch.inference_mode(False), torch.no_grad():
                angles = rope_angles(rows, columns, self.sizes.head_dim, self.sizes.rope_ratio, device)
                self._rope[key] = torch.stack((angles.cos(), angles.sin()))
        return self._rope[key]

    def _with_padding(self, latents: Tensor, padding_mask: Tensor | None) -> Tensor:
        batch, _, height, width = latents.shape
        if padding_mask is None:
            padding = latents.new_zeros(batch, 1, height, width)
        else:
            padding = F.interpolate(padding_mask.to(latents.dtype), size=(height, width), mode="nearest")
        return torch.cat((latents, padding), dim=1)

    def _modulations(self, embedding: Tensor, shared: Tensor | None) -> Tensor:
        """[blocks, 9, B, D] float32: (shift, 1 + scale, gate) of each sub-layer of each block."""
        stacks = self._adaln_stacks()
        if all(_is_frozen(linear) for stack in stacks for linear in stack):
            # Its norm and, without AdaLN-LoRA, the time embedder may train while these are frozen.
            with torch.set_grad_enabled(torch.is_grad_enabled() and embedding.requires_grad):
                flat = self._batched_adaln(embedding, stacks)
        else:
            flat = torch.stack([_run_chain(stack, embedding) for stack in stacks])
        if shared is not None:
            flat = flat + shared
        batch, width = embedding.shape
        parts = flat.view(self.sizes.blocks, len(SUB_LAYERS), batch, 3, width).transpose(2, 3)
        shift, scale, gate = parts.unbind(2)
        return torch.stack((shift, scale + 1.0, gate), dim=2).flatten(1, 2)

    def _batched_adaln(self, embedding: Tensor, stacks: Sequence[Sequence[nn.Linear]]) -> Tensor:
        """[stacks, B, 3D] float32: every stack's product in one (two with AdaLN-LoRA) batched GEMM."""
        count = len(stacks)
        dtype = stacks[0][0].weight.dtype
        out = torch.cat(project(embedding.to(dtype), [stack[0] for stack in stacks]), dim=-1)
        out = out.view(embedding.shape[0], count, -1).transpose(0, 1)
        if self.sizes.adaln_rank:
            out = torch.bmm(out, _stacked_weights([stack[1] for stack in stacks]).transpose(1, 2))
        return out.float()

    def _adaln_stacks(self) -> list[list[nn.Linear]]:
        names = [f"adaln_modulation_{name}" for name in SUB_LAYERS]
        return [list(getattr(block, name))[1:] for block in self.blocks for name in names]

    def fuse(self) -> None:
        """Make weights that are used together adjacent in memory: q, k, v, and the AdaLN matrices of all blocks.

        Follows moves and casts of the whole model by itself, and is renewed after every ``load_state_dict``.
        """
        for module in self.modules():
            if isinstance(module, Attention):
                module.fuse()
        stacks = self._adaln_stacks()
        for level in range(len(stacks[0])):
            share_storage([stack[level] for stack in stacks])

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise for training from scratch: truncated normal linears, zero modulation outputs, unit norms."""
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                if parameter.dim() == 1:
                    parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
                elif name.endswith(".2.weight") or (not self.sizes.adaln_rank and "adaln_modulation" in name):
                    parameter.zero_()
                else:
                    std = 1.0 / math.sqrt(parameter.shape[1])
                    nn.init.trunc_normal_(parameter, std=std, a=-3 * std, b=3 * std, generator=generator)


def _fuse_again(module: nn.Module, _keys: Any) -> None:
    # load_state_dict(assign=True) puts foreign tensors in place of the adjacent ones.
    assert isinstance(module, Denoiser)
    module.fuse()


def _run_chain(stack: Sequence[nn.Module], embedding: Tensor) -> Tensor:
    for linear in stack:
        embedding = _in_own_dtype(linear, embedding)
    return embedding.float()


def _is_frozen(linear: nn.Linear) -> bool:
    replaced = any(getattr(linear, name, None) is not None for name in ("adapter", "base_forward"))
    return not replaced and not linear.weight.requires_grad


def _stacked_weights(linears: Sequence[nn.Linear]) -> Tensor:
    """[count, out, in] of equally sized linears: a view when their storage is shared, else a copy."""
    weights = [linear.weight for linear in linears]
    first = weights[0]
    if all(
        weight.untyped_storage()._cdata == first.untyped_storage()._cdata
        and weight.storage_offset() == first.storage_offset() + index * first.numel()
        for index, weight in enumerate(weights)
    ):
        return first.as_strided((len(weights), *first.shape), (first.numel(), *first.stride()))
    return torch.stack(weights)


def rope_angles(rows: int, columns: int, head_dim: int, ratio: float, device: torch.device | str = "cpu") -> Tensor:
    """Rotary angles [rows * columns, head_dim] in radians, float32; tokens row by row.

    The head is split between time, row and column (2*floor(d/6) for each space axis, the rest for time, whose position
    is 0 in an image); an axis of n features has base 10000 * ratio^(n/(n-2)). The half vector is written twice.
    """
    space = 2 * (head_dim // 6)
    time = head_dim - 2 * space
    base = 10000.0 * ratio ** (space / (space - 2))
    exponents = torch.arange(0, space, 2, dtype=torch.float32, device=device) / space
    frequencies = torch.pow(base, -exponents)
    row_angles = torch.arange(rows, dtype=torch.float32, device=device)[:, None] * frequencies
    column_angles = torch.arange(columns, dtype=torch.float32, device=device)[:, None] * frequencies
    half = torch.cat(
        (
            torch.zeros(rows, columns, time // 2, device=device),
            row_angles[:, None].expand(rows, columns, -1),
            column_angles[None].expand(rows, columns, -1),
        ),
        dim=-1,
    )
    return torch.cat((half, half), dim=-1).flatten(0, 1)


def fold_context(context: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Replace the zero rows behind the longest valid length by one that counts for all of them.

    context: [B, L, S]; mask: [B, L] bool, False rows are zero. Returns ([B, M, S], float32 bias [M] for the logits), or
    the context itself and None when nothing can be saved. Exact: in a bias-free cross-attention a zero row has logit 0
    and value 0, so n of them equal one with logit ln(n), and a low-rank adapter on the keys and values keeps that.
    Reads the length on the host.
    """
    length = context.shape[1]
    positions = torch.arange(1, length + 1, device=mask.device)
    longest = int((positions * mask).max()) if mask.numel() else 0
    folded = length - longest
    if folded < 2:
        return context, None
    bias = torch.zeros(longest + 1, dtype=torch.float32, device=context.device)
    bias[-1] = math.log(folded)
    return context[:, : longest + 1], bias
