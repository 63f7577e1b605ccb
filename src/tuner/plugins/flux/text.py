"""Captions to what the transformer reads: T5's states, the mask of its padding, CLIP's pooled text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tuner.core.compute.dtypes import dtype_by_name
from tuner.core.compute.encoders import (
    PromptTokenizer,
    clip_states,
    load_clip,
    load_clip_tokenizer,
    load_t5,
    load_t5_tokenizer,
    read_settings,
    t5_states,
)

if TYPE_CHECKING:
    from tuner.core.types import Placement

    from .sources import Sources

VISIBLE_PADDING = 1
"""Padding tokens after the caption that Chroma sees; it was trained that way."""


def load_encoder(sources: Sources, name: str, placement: Placement, *, mmap: bool) -> nn.Module:
    """``clip_l`` or ``t5``, frozen, from its own file or from inside an all-in-one one."""
    header, path = sources.header(name), sources.weights[name]
    options: dict[str, Any] = {
        "dtype": dtype_by_name(placement.dtype(name)),
        "device": placement.device,
        "mmap": mmap,
        "where": str(path),
    }
    if name == "t5":
        return load_t5(header, **options)
    return load_clip(header, activation="quick_gelu", settings=read_settings(path), **options)


def load_tokenizers(sources: Sources) -> dict[str, PromptTokenizer]:
    """The tokenizers of the text encoders that the model has."""
    loaders = {"clip_l": load_clip_tokenizer, "t5": load_t5_tokenizer}
    return {name: loaders[name](path) for name, path in sources.tokenizers.items()}


def clip_pooled(encoder: nn.Module, tokenizer: PromptTokenizer, captions: Sequence[str], length: int) -> Tensor:
    """The state at the end of each caption after the final norm, [B, W]; the text projection takes no part."""
    ids, _ = tokenizer(captions, length)
    return clip_states(encoder, ids, tokenizer.end_id).pooled


def encode_t5(
    encoder: nn.Module,
    tokenizer: PromptTokenizer,
    captions: Sequence[str],
    length: int,
    *,
    masked: bool,
    zero_padding: bool,
    chroma: bool,
) -> tuple[Tensor, Tensor]:
    """T5's states [B, L, W] and the mask [B, L] of the rows that count.

    Without ``masked`` padding takes part in the encoder and its rows are ordinary rows, or zeros with ``zero_padding``.
    With it they are hidden and zero, and L is no longer than needed; for Chroma one row of padding counts as well.
    """
    ids, mask = tokenizer(captions, length)
    states = t5_states(encoder, ids, mask if masked else None)
    real = mask.to(states.device)
    seen = real
    if masked and chroma:
        # True up to the place where padding begins, and one more where there is room.
        seen = torch.cat((torch.ones_like(real[:, :VISIBLE_PADDING]), real[:, :-VISIBLE_PADDING]), dim=1)
    if masked:
        longest = int(seen.sum(dim=1).max())
        states, seen, real = states[:, :longest], seen[:, :longest], real[:, :longest]
    if zero_padding:
        states = torch.where(real[..., None], states, 0.0)
    elif masked:
        states = torch.where(seen[..., None], states, 0.0)
    return states, seen
