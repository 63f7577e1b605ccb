"""CLIP and T5 text encoders from weight files of any size, without the network, and their tokenizers.

The configuration comes from the weights, so no download and no default size can slip in, and loading is strict. What
goes in: ids [B, L] int64 and masks [B, L] bool, True where a token is real.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tuner.core.compute.encoder_sizes import (
    CLIP_PROJECTION,
    Activation,
    clip_names,
    clip_settings,
    clip_sizes,
    t5_names,
    t5_sizes,
)
from tuner.core.compute.spiece import read_tokenizer
from tuner.core.compute.weights import assign, read_tensors
from tuner.core.errors import UsageError
from tuner.core.files import WeightHeader

logger = logging.getLogger(__name__)

CLIP_TOKENS = 77
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
T5_PAD_ID, T5_END_ID = 0, 1
T5_MAX_DISTANCE = 128
T5_EPS = 1e-6


# --- modules ----------------------------------------------------------------------------------------------------------


def load_clip(
    header: WeightHeader,
    *,
    activation: Activation,
    dtype: torch.dtype,
    device: str = "cpu",
    settings: Mapping[str, Any] | None = None,
    mmap: bool = True,
    where: str = "",
) -> nn.Module:
    """A frozen CLIP text encoder with projection; linears are called ``text_model.encoder.layers.N...``.

    header: of a text encoder alone, in any spelling that `clip_names` reads. activation: ``quick_gelu`` for CLIP-L,
    ``gelu`` for CLIP-G; ``hidden_act`` of ``settings`` (a ``config.json``) wins where that is of a model this wide, not
    of a neighbour in the same folder. A file without projection gets the identity. Raises UsageError for missing,
    unknown or misshapen tensors.
    """
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    header = header.renamed(clip_names(header))
    given = clip_settings(settings, header)
    sizes = clip_sizes(header, where, given)
    config = CLIPTextConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp_width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=sizes.positions,
        projection_dim=sizes.projection or sizes.width,
        hidden_act=given.get("hidden_act", activation),
        layer_norm_eps=given.get("layer_norm_eps", 1e-5),
        # `clip_states` pools by itself; these only have to lie inside any vocabulary.
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model: nn.Module = CLIPTextModelWithProjection(config)
    tensors = list(read_tensors(header, mmap=mmap))
    if sizes.projection is None:
        tensors.append((CLIP_PROJECTION, torch.eye(sizes.width)))
    assign(model, tensors, dtype=dtype, device=device, where=where or None)
    embeddings: Any = model.text_model.embeddings  # type: ignore[union-attr]
    # A plain count that no file needs to carry; meta construction left it without values.
    embeddings.position_ids = torch.arange(sizes.positions, device=device).expand(1, -1)
    return model.eval().requires_grad_(False)


def load_t5(
    header: WeightHeader, *, dtype: torch.dtype, device: str = "cpu", mmap: bool = True, where: str = ""
) -> nn.Module:
    """A frozen T5 v1.1 encoder; linears are called ``encoder.block.N.layer...``. Strict like `load_clip`."""
    from transformers import T5Config, T5EncoderModel

    header = header.renamed(t5_names(header))
    sizes = t5_sizes(header, where)
    config = T5Config(
        vocab_size=sizes.vocab,
        d_model=sizes.width,
        d_kv=sizes.head_dim,
        d_ff=sizes.mlp_width,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        relative_attention_num_buckets=sizes.buckets,
        relative_attention_max_distance=T5_MAX_DISTANCE,
        layer_norm_epsilon=T5_EPS,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
    )
    with torch.device("meta"):
        model: nn.Module = T5EncoderModel(config)
    assign(model, read_tensors(header, mmap=mmap), dtype=dtype, device=device, where=where or None)
    # The stack holds the embedding under a second name, which must be the one that has values now.
    model.encoder.embed_tokens = model.shared  # type: ignore[union-attr]
    return model.eval().requires_grad_(False)


# --- encodings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipStates:
    """last: after the final norm; before_last: output of the last layer but one, no final norm, both [B, L, W].

    pooled [B, W]: ``last`` at the first end-of-text token. projected [B, P]: that through the text projection.
    """

    last: Tensor
    before_last: Tensor
    pooled: Tensor
    projected: Tensor


def clip_states(encoder: nn.Module, ids: Tensor, end_id: int, mask: Tensor | None = None) -> ClipStates:
    """States of a CLIP encoder of `load_clip`; grad mode is the caller's.

    end_id: the end-of-text token, whose first place in each row is pooled. mask None: padding is attended to, which is
    how these encoders were used in the training of the models that read them.
    """
    device = next(encoder.parameters()).device
    ids = ids.to(device)
    inner: Any = encoder.text_model
    out = inner(
        input_ids=ids,
        attention_mask=None if mask is None else mask.to(device).long(),
        output_hidden_states=True,
    )
    last: Tensor = out.last_hidden_state
    place = (ids == end_id).int().argmax(dim=-1)
    pooled = last[torch.arange(ids.shape[0], device=device), place]
    projection: Any = encoder.text_projection
    return ClipStates(last=last, before_last=out.hidden_states[-2], pooled=pooled, projected=projection(pooled))


def t5_states(encoder: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Last hidden states after the final norm, [B, L, W]; mask None: padding is attended to."""
    device = next(encoder.parameters()).device
    attention = torch.ones_like(ids) if mask is None else mask.long()
    states: Tensor = encoder(input_ids=ids.to(device), attention_mask=attention.to(device)).last_hidden_state
    return states


# --- tokens -----------------------------------------------------------------------------------------------------------


class PromptTokenizer:
    """Captions to ids of one fixed length: optional start id, end id that survives cutting, right padding.

    backend: a transformers tokenizer without special tokens of its own. ``cut`` counts captions that were too long;
    each tenfold of it is logged, so that cutting never goes unnoticed and never floods the log.
    """

    def __init__(self, backend: Any, *, name: str, pad_id: int, end_id: int, start_id: int | None = None) -> None:
        self.backend, self.name = backend, name
        self.pad_id, self.end_id, self.start_id = pad_id, end_id, start_id
        self.cut = 0

    def ids(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids of each caption in full length, start and end included."""
        if not captions:
            return []
        rows = self.backend(list(captions), add_special_tokens=False, padding=False, truncation=False)["input_ids"]
        start = [] if self.start_id is None else [self.start_id]
        return [[*start, *row, self.end_id] for row in rows]

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """Number of tokens of each caption before any cutting."""
        return [len(row) for row in self.ids(captions)]

    def __call__(self, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """(ids [B, length] int64, mask [B, length] bool). The mask holds for the first end token, not for padding."""
        rows = self.ids(captions)
        self._report(sum(len(row) > length for row in rows), length)
        ids = torch.full((len(rows), length), self.pad_id, dtype=torch.int64)
        mask = torch.zeros((len(rows), length), dtype=torch.bool)
        for index, row in enumerate(rows):
            kept = row if len(row) <= length else [*row[: length - 1], self.end_id]
            ids[index, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
            mask[index, : len(kept)] = True
        return ids, mask

    def _report(self, count: int, length: int) -> None:
        before, self.cut = self.cut, self.cut + count
        if len(str(self.cut)) > len(str(before)) or (self.cut and not before):
            logger.warning("%d caption(s) so far exceed %d %s tokens and were cut", self.cut, length, self.name)


def load_clip_tokenizer(path: Path, *, name: str = "CLIP", pad_id: int | None = None) -> PromptTokenizer:
    """From a folder with ``tokenizer.json`` or ``vocab.json`` and ``merges.txt``, or from that JSON file itself.

    pad_id None: the end-of-text token (CLIP-L); CLIP-G pads with 0.
    """
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast

    file = path if path.is_file() else path / "tokenizer.json"
    if file.is_file():
        backend: Any = PreTrainedTokenizerFast(tokenizer_file=str(file))
    else:
        backend = CLIPTokenizer(vocab=str(path / "vocab.json"), merges=str(path / "merges.txt"))
    backend.model_max_length = 10**9
    start, end = (_token_id(backend, token, path) for token in (CLIP_START, CLIP_END))
    return PromptTokenizer(backend, name=name, pad_id=end if pad_id is None else pad_id, end_id=end, start_id=start)


def load_t5_tokenizer(path: Path, *, name: str = "T5") -> PromptTokenizer:
    """From a folder with ``tokenizer.json`` or ``spiece.model``, or from either file itself."""
    from transformers import PreTrainedTokenizerFast

    file = path if path.is_file() else path / "tokenizer.json"
    pieces = path if path.suffix == ".model" else path / "spiece.model"
    if file.suffix == ".json" and file.is_file():
        backend: Any = PreTrainedTokenizerFast(tokenizer_file=str(file))
    else:
        backend = PreTrainedTokenizerFast(tokenizer_object=read_tokenizer(pieces))
    backend.model_max_length = 10**9
    return PromptTokenizer(backend, name=name, pad_id=T5_PAD_ID, end_id=T5_END_ID)


def read_settings(weights: Path) -> dict[str, Any]:
    """The ``config.json`` beside a weight file, {} when there is none. UsageError when it is no JSON object."""
    path = weights.parent / "config.json"
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError("this is not JSON", where=str(path), why=str(error)) from error
    return settings if isinstance(settings, dict) else {}


def _token_id(backend: Any, token: str, path: Path) -> int:
    found = backend.get_vocab().get(token)
    if found is None:
        raise UsageError(f"the tokenizer has no {token}", where=str(path), fix="use the tokenizer files of CLIP")
    return int(found)
