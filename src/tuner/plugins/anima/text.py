"""The text side: tokens, the Qwen3 encoder and the LLM adapter.

Shapes: B captions, Ls Qwen3 tokens, Lt T5 tokens, S width of the Qwen3 states, W width of the adapter.
All masks are boolean, True where a token is real; all padding is on the right.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner.core.compute.attention import attention
from tuner.core.compute.norm_rope import rms_norm_rope
from tuner.core.compute.spiece import read_tokenizer
from tuner.core.compute.weights import assign

if TYPE_CHECKING:
    from .sizes import AdapterSizes, EncoderSizes

logger = logging.getLogger(__name__)

EPS = 1e-6
ROPE_THETA = 10000.0
T5_END_ID = 1
T5_PAD_ID = 0
QWEN3_PAD = "<|endoftext|>"
QWEN3_ROPE_THETA = 1e6


class RMSNorm(nn.Module):
    """Root-mean-square norm: statistics in float32, result in the dtype of the input, then times the weight."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
        return normed.to(x.dtype) * self.weight


def rope_table(length: int, head_dim: int, device: torch.device) -> Tensor:
    """cos and sin of the rotary angles, [2, length, head_dim] float32, the half vector written twice."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), ROPE_THETA**-exponents)
    angles = torch.cat([angles, angles], dim=-1)
    return torch.stack((angles.cos(), angles.sin()))


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
        q_table: Tensor,
        k_table: Tensor,
    ) -> Tensor:
        """x [B, L, W] asks, source [B, Lk, S] answers; key_mask [B, Lk]. Rows without a valid key give zero."""
        heads = (-1, self.head_dim)
        q = rms_norm_rope(self.q_proj(x).unflatten(-1, heads), self.q_norm.weight, q_table, EPS)
        k = rms_norm_rope(self.k_proj(source).unflatten(-1, heads), self.k_norm.weight, k_table, EPS)
        v = self.v_proj(source).unflatten(-1, heads)
        # A softmax over no key at all is NaN in some kernels; `attention` gives zero there.
        out = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias=key_mask[:, None, None])
        result: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return result


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
        table: Tensor,
        source_table: Tensor,
    ) -> Tensor:
        normed = self.norm_self_attn(x)
        x = x + self.self_attn(normed, normed, mask, table, table)
        x = x + self.cross_attn(self.norm_cross_attn(x), source, source_mask, table, source_table)
        result: Tensor = x + self.mlp(self.norm_mlp(x))
        return result


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
        # One position stays, masked, where no caption has any: attention needs a key to ignore.
        length, source_length = max(valid_length(mask), 1), max(valid_length(source_mask), 1)
        weight = self.out_proj.weight
        source, source_mask = source[:, :source_length].to(weight.dtype), source_mask[:, :source_length]
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


# --- Qwen3 ------------------------------------------------------------------------------------------------------------


def build_encoder(
    tensors: Iterable[tuple[str, Tensor]],
    sizes: EncoderSizes,
    settings: dict[str, Any],
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    where: str | None = None,
) -> nn.Module:
    """The frozen Qwen3 encoder in eval mode: transformers' ``Qwen3Model`` with sizes from the weights.

    tensors: names relative to the inner model. settings: the content of a ``config.json``, which may be empty: only the
    rotary base and the norm's epsilon cannot be read from the weights.
    """
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=sizes.vocab,
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp_width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_heads,
        head_dim=sizes.head_dim,
        rms_norm_eps=settings.get("rms_norm_eps", EPS),
        rope_parameters={"rope_type": "default", "rope_theta": _rope_theta(settings)},
        attention_bias=False,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        use_cache=False,
    )
    with torch.device("meta"):
        model: nn.Module = Qwen3Model(config)
    assign(model, tensors, dtype=dtype, device=device, where=where)
    # Its frequencies are a buffer that no file carries; they stay float32 whatever the weights are.
    model.rotary_emb = type(model.rotary_emb)(config).to(device)
    return model.eval().requires_grad_(False)


def _rope_theta(settings: dict[str, Any]) -> float:
    """The rotary base of a ``config.json``: a key of its own in old files, inside ``rope_parameters`` in new ones."""
    nested = settings.get("rope_parameters") or {}
    return float(settings.get("rope_theta", nested.get("rope_theta", QWEN3_ROPE_THETA)))


def encode_states(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Last hidden states after the final norm, [B, L, S], zero where mask [B, L] is False.

    ids [B, L], right-padded. The model is causal, so real tokens never see the padding behind them and no mask is
    needed, which lets attention use its fastest kernel.
    """
    device = next(encoder.parameters()).device
    states = encoder(input_ids=ids.to(device), attention_mask=None, use_cache=False).last_hidden_state
    return torch.where(mask.to(device)[..., None], states, 0.0)


# --- tokens -----------------------------------------------------------------------------------------------------------


class CaptionTokenizer:
    """Captions to ids: no special tokens, except one ``end_id`` that also survives cutting; right padding.

    backend: a transformers tokenizer. ``cut`` counts captions that were longer than the limit; each tenfold of it is
    logged, so that cutting never goes unnoticed and never floods the log.
    """

    def __init__(self, backend: Any, *, name: str, pad_id: int, end_id: int | None = None) -> None:
        self.backend, self.name, self.pad_id, self.end_id = backend, name, pad_id, end_id
        self.cut = 0

    def ids(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids of each caption in full length, the end id included."""
        if not captions:
            return []
        rows = self.backend(list(captions), add_special_tokens=False, padding=False, truncation=False)["input_ids"]
        return [row if self.end_id is None else [*row, self.end_id] for row in rows]

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """Number of tokens of each caption before any cutting."""
        return [len(row) for row in self.ids(captions)]

    def __call__(self, captions: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
        """(ids [B, L] int64, mask [B, L] bool), L the longest row of the batch but at least 1."""
        rows = self.ids(captions)
        self._report(sum(len(row) > max_tokens for row in rows), max_tokens)
        rows = [row if len(row) <= max_tokens else self._shorten(row, max_tokens) for row in rows]
        length = max([1, *map(len, rows)])
        ids = torch.full((len(rows), length), self.pad_id, dtype=torch.int64)
        for row, values in zip(ids, rows, strict=True):
            row[: len(values)] = torch.tensor(values, dtype=torch.int64)
        lengths = torch.tensor([len(row) for row in rows])
        return ids, torch.arange(length) < lengths[:, None]

    def _shorten(self, row: list[int], max_tokens: int) -> list[int]:
        return row[:max_tokens] if self.end_id is None else [*row[: max_tokens - 1], self.end_id]

    def _report(self, count: int, max_tokens: int) -> None:
        before, self.cut = self.cut, self.cut + count
        if len(str(self.cut)) > len(str(before)) or (self.cut and not before):
            logger.warning("%d caption(s) so far exceed %d %s tokens and were cut", self.cut, max_tokens, self.name)


def load_tokenizer(name: str, path: Path) -> CaptionTokenizer:
    """The tokenizer ``qwen3`` or ``t5`` from a folder, or from a ``tokenizer.json`` or ``spiece.model`` itself."""
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    file = path if path.is_file() else path / "tokenizer.json"
    pieces = path if path.suffix == ".model" else path / "spiece.model"
    if file.suffix == ".json" and file.is_file():
        backend: Any = PreTrainedTokenizerFast(tokenizer_file=str(file))
    elif name == "t5" and pieces.is_file():
        backend = PreTrainedTokenizerFast(tokenizer_object=read_tokenizer(pieces))
    else:
        backend = Qwen2Tokenizer(vocab=str(path / "vocab.json"), merges=str(path / "merges.txt"))
    # Captions longer than any limit are counted and cut here, so the backend's own warning would only repeat that.
    backend.model_max_length = 10**9
    if name == "t5":
        return CaptionTokenizer(backend, name="T5", pad_id=T5_PAD_ID, end_id=T5_END_ID)
    pad_id = backend.convert_tokens_to_ids(QWEN3_PAD)
    return CaptionTokenizer(backend, name="Qwen3", pad_id=0 if pad_id is None else pad_id)
