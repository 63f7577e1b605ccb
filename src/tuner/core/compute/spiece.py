"""A unigram tokenizer from a bare ``spiece.model``, as the T5 v1.1 repositories have it. No torch.

The file is a protocol buffer; of its few fields two are needed, so it is read here instead of requiring the protobuf
package. Field numbers: https://github.com/google/sentencepiece, sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tuner.core.errors import UsageError

PIECES, NORMALIZER = 1, 3
PIECE_TEXT, PIECE_SCORE = 1, 2
CHARSMAP = 2
UNKNOWN_ID = 2
SENTINELS = 100
"""T5 appends so many ``<extra_id_N>`` tokens to the pieces, the highest N first."""

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def read_tokenizer(path: Path) -> Any:
    """A ``tokenizers.Tokenizer`` that gives the ids of the sentencepiece model in ``path``."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

    pieces: list[tuple[str, float]] = []
    charsmap = b""
    try:
        for number, value in _fields(path.read_bytes()):
            if number == PIECES:
                pieces.append(_piece(value))
            elif number == NORMALIZER:
                charsmap = next((content for inner, content in _fields(value) if inner == CHARSMAP), b"")
    except (IndexError, struct.error, UnicodeDecodeError, TypeError) as error:
        raise UsageError("this is not a sentencepiece model", where=str(path), why=str(error)) from error
    if len(pieces) <= UNKNOWN_ID:
        raise UsageError("this is not a sentencepiece model", where=str(path), why=f"it has {len(pieces)} pieces")
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=UNKNOWN_ID, byte_fallback=False))
    if charsmap:
        tokenizer.normalizer = normalizers.Precompiled(charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    control = [text for text, _ in pieces[: UNKNOWN_ID + 1]]
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(SENTINELS))]
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (*control, *sentinels)])
    return tokenizer


def _piece(data: bytes) -> tuple[str, float]:
    fields = dict(_fields(data))
    score = struct.unpack("<f", fields[PIECE_SCORE])[0] if PIECE_SCORE in fields else 0.0
    return fields[PIECE_TEXT].decode("utf-8"), score


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(field number, content) of a message; numbers that are not needed come as empty content."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind = key & 7
        if kind == VARINT:
            _, position = _varint(data, position)
            yield key >> 3, b""
            continue
        if kind == BYTES:
            size, position = _varint(data, position)
        elif kind in (FIXED32, FIXED64):
            size = 4 if kind == FIXED32 else 8
        else:
            raise IndexError(f"wire type {kind}")
        if position + size > len(data):
            raise IndexError("it is cut short")
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
