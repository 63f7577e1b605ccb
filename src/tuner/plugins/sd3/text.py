"""Captions to what the denoiser reads: two CLIPs side by side, T5 after them, and a pooled vector.

Shapes: B captions, L tokens, W width of an encoder, S width of the text that the denoiser reads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tuner.core.compute.encoders import (
    CLIP_TOKENS,
    ClipStates,
    PromptTokenizer,
    clip_states,
    load_clip_tokenizer,
    load_t5_tokenizer,
    t5_states,
)

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.types import ModelFacts, Models

MISSING_T5_TOKENS = 77
"""Rows of zeros that stand for a T5 that is not there."""


def load_tokenizers(paths: Mapping[str, Path]) -> dict[str, PromptTokenizer]:
    """One per encoder: both CLIPs read one vocabulary, but pad differently."""
    clip = paths["clip"]
    found = {
        "clip_l": load_clip_tokenizer(clip, name="CLIP"),
        "clip_g": load_clip_tokenizer(clip, name="CLIP-G", pad_id=0),
    }
    if "t5" in paths:
        found["t5"] = load_t5_tokenizer(paths["t5"])
    return found


def encode(
    models: Models, config: RunConfig, facts: ModelFacts, captions: Sequence[str], wanted: Collection[str]
) -> dict[str, Tensor]:
    """The wanted text fields. Only the encoders that they need are run."""
    fields: dict[str, Tensor] = {}
    needed = {name for field in wanted for name in facts.text_fields[field].of}
    states = {name: _clip(models, config, facts, name, captions) for name in ("clip_l", "clip_g") if name in needed}
    if "clip_lg" in wanted:
        fields["clip_lg"] = _beside(facts, states["clip_l"].before_last, states["clip_g"].before_last)
        fields["pooled"] = torch.cat([states["clip_l"].projected, states["clip_g"].projected], dim=-1)
    for name in ("clip_l", "clip_g"):
        if name in wanted:
            fields |= {name: states[name].before_last, f"pooled_{name}": states[name].projected}
    if "t5" in wanted:
        fields |= _t5(models, config, facts, captions)
    return {name: fields[name] for name in facts.text_fields if name in wanted}


def context(fields: Mapping[str, Tensor], width: int) -> tuple[Tensor, Tensor]:
    """Text [B, T, S] and pooled text [B, P] for the denoiser from the fields of a batch."""
    if "clip_lg" in fields:
        clip, pooled = fields["clip_lg"], fields["pooled"]
    else:
        clip = _widened(torch.cat([fields["clip_l"], fields["clip_g"].to(fields["clip_l"])], dim=-1), width)
        pooled = torch.cat([fields["pooled_clip_l"], fields["pooled_clip_g"].to(fields["pooled_clip_l"])], dim=-1)
    t5 = fields.get("t5", clip.new_zeros(clip.shape[0], MISSING_T5_TOKENS, clip.shape[2]))
    return torch.cat([clip, t5.to(clip)], dim=1), pooled


def _clip(models: Models, config: RunConfig, facts: ModelFacts, name: str, captions: Sequence[str]) -> ClipStates:
    tokenizer: PromptTokenizer = models.tokenizers[name]
    ids, mask = tokenizer(captions, facts.max_tokens["clip"])
    # The encoders always see their full length, as the denoiser was trained on it.
    missing = CLIP_TOKENS - ids.shape[1]
    ids = F.pad(ids, (0, missing), value=tokenizer.pad_id)
    mask = F.pad(mask, (0, missing), value=False)
    masked = config.text_encoder.mask_padding.get("clip", False)
    return clip_states(models.text_encoders[name], ids, tokenizer.end_id, mask if masked else None)


def _t5(models: Models, config: RunConfig, facts: ModelFacts, captions: Sequence[str]) -> dict[str, Tensor]:
    tokenizer: PromptTokenizer = models.tokenizers["t5"]
    ids, mask = tokenizer(captions, facts.max_tokens["t5"])
    masked = config.text_encoder.mask_padding.get("t5", False)
    states = t5_states(models.text_encoders["t5"], ids, mask if masked else None)
    if "t5_mask" not in facts.text_fields:
        return {"t5": states}
    mask = mask.to(states.device)
    return {"t5": states.masked_fill(~mask[..., None], 0), "t5_mask": mask}


def _beside(facts: ModelFacts, left: Tensor, right: Tensor) -> Tensor:
    width = facts.text_fields["clip_lg"].shape[-1]
    assert isinstance(width, int)
    return _widened(torch.cat([left, right.to(left)], dim=-1), width)


def _widened(states: Tensor, width: int) -> Tensor:
    return F.pad(states, (0, width - states.shape[-1]))
