"""All captions the base model is trained on, with their token ids and text states, encoded once."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from . import pictures

MAX_TOKENS = 48


@dataclass(frozen=True)
class CaptionTable:
    """Encoded captions: states [N, Ls, S], state_mask [N, Ls], ids [N, Lt], mask [N, Lt]; row 0 is the empty one."""

    rows: dict[str, int]
    states: Tensor
    state_mask: Tensor
    ids: Tensor
    mask: Tensor

    def pick(self, captions: list[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four adapter inputs of some captions."""
        index = torch.tensor([self.rows[caption] for caption in captions])
        return self.states[index], self.state_mask[index], self.ids[index], self.mask[index]


def every_caption() -> list[str]:
    """Every caption that `pictures.caption` can give for known things, sorted, after the empty one."""
    names = {"shape": pictures.SHAPES, "colour": pictures.COLOURS, "background": pictures.BACKGROUNDS}
    words = {
        key: sorted({word for name in values for word in pictures.WORDS.get(name, (name,))})
        for key, values in names.items()
    }
    captions = {
        template.format(shape=shape, colour=colour, background=background)
        for template in (*pictures.TEMPLATES, *pictures.PARTIAL)
        for shape, colour, background in product(words["shape"], words["colour"], words["background"])
    }
    return ["", *sorted(captions)]


@torch.no_grad()
def encode_captions(captions: list[str], qwen: Path, t5: Path) -> CaptionTable:
    """Token ids of both tokenizers and the text encoder's last hidden states, zero at padding."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    encoder = AutoModel.from_pretrained(qwen, dtype=torch.float32).eval()
    source = AutoTokenizer.from_pretrained(qwen)(captions, padding=True, padding_side="right", return_tensors="pt")
    target = AutoTokenizer.from_pretrained(t5)(captions, padding=True, padding_side="right", return_tensors="pt")
    source_ids, source_mask = source.input_ids.long(), source.attention_mask.bool()
    states = []
    for ids, mask in zip(source_ids.split(256), source_mask.split(256), strict=True):
        # Right padding and causal attention: the mask only matters after the encoder, so none is passed.
        states.append(encoder(input_ids=ids).last_hidden_state * mask[..., None])
    rows = {caption: index for index, caption in enumerate(captions)}
    return CaptionTable(rows, torch.cat(states), source_mask, target.input_ids.long(), target.attention_mask.bool())


def draw_captions(scenes: list[pictures.Scene], rng: random.Random, *, partial: float, dropout: float) -> list[str]:
    """One caption per scene: dropped, partial or whole."""
    return ["" if rng.random() < dropout else pictures.caption(scene, rng, partial=partial) for scene in scenes]
