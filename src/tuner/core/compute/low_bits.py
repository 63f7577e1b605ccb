"""Weights in few bits: how a matrix is stored, and how it is read back.

``encode`` makes codes with scales, plain tensors all of them; ``decode`` gives the matrix in the dtype of the
arithmetic. W is [out, in]; a group is up to 64 neighbours of one row.

`int8`          W = s c, one scale per row, c in -127..127
`fp8`           W = s c, one scale per row, c an e4m3 number up to 448 (Micikevicius et al. 2022)
`fp8_unscaled`  W = c: what falls below the smallest e4m3 number is lost, so only for weights made that way
`int4`          W = s c + m, a step and a smallest value per group of 64, c in 0..15
`nf4`           W = s t[c], the largest value per group of 64, t the quantiles of a normal distribution
                (Dettmers et al. 2023, QLoRA)

Codes of less than a byte are packed in pairs, the even column in the low half; e4m3 codes are held as bytes, so that
no cast of a module changes them. Scales per row are float32, those of groups bfloat16: a weight then takes 8, 8, 8,
4.5 and 4.25 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 64
SMALLEST_GROUP = 8
PIECE = 1 << 22
"""Weights that are encoded or decoded at once: bounds what is needed beside the result."""
E4M3_MAX = 448.0
TINY = 1e-12


class Codes(NamedTuple):
    """A stored matrix: codes [out, ...] int8 or uint8, scale [out, groups], offset [out, groups] or None."""

    codes: Tensor
    scale: Tensor
    offset: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Format:
    """One way to store weights. encode takes float32 rows; decode returns rows in the dtype it is given."""

    encode: Callable[[Tensor, int], Codes]
    decode: Callable[[Codes, torch.dtype], Tensor]
    grouped: bool


def group_size(columns: int) -> int:
    """The largest power of two up to 64 that divides the row."""
    return math.gcd(columns, GROUP)


def can_encode(method: str, columns: int) -> bool:
    """Whether rows of this length fit; grouped formats need groups worth a scale."""
    return not FORMATS[method].grouped or group_size(columns) >= SMALLEST_GROUP


@torch.no_grad()
def encode(method: str, weight: Tensor, device: torch.device | str | None = None) -> Codes:
    """The codes of ``weight`` [out, in] on ``device``, made there, a piece at a time.

    ValueError for rows that do not fit and for weights that are not finite.
    """
    if not can_encode(method, weight.shape[1]):
        raise ValueError(f"rows of {weight.shape[1]} cannot be grouped")
    form, group = FORMATS[method], group_size(weight.shape[1])
    parts = []
    for piece in torch.split(weight, max(PIECE // weight.shape[1], 1)):
        rows = piece.to(device=device or weight.device, dtype=torch.float32)
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("the weights are not finite")
        parts.append(form.encode(rows, group))
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    offset = None if first.offset is None else torch.cat([part.offset for part in parts if part.offset is not None])
    return Codes(torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts]), offset)


def decode(method: str, stored: Codes, dtype: torch.dtype) -> Tensor:
    """The matrix [out, in] in ``dtype``."""
    form = FORMATS[method]
    count = stored.codes.shape[0]
    step = max(PIECE // stored.codes.shape[1], 1)
    if step >= count:
        return form.decode(stored, dtype)
    first = form.decode(_rows(stored, 0, step), dtype)
    weight = first.new_empty(count, first.shape[1])
    weight[:step] = first
    for start in range(step, count, step):
        weight[start : start + step] = form.decode(_rows(stored, start, step), dtype)
    return weight


def stored_bytes(stored: Codes) -> int:
    """Bytes of the codes with their scales and offsets."""
    return sum(tensor.numel() * tensor.element_size() for tensor in stored if tensor is not None)


def _rows(stored: Codes, start: int, step: int) -> Codes:
    stop = min(start + step, stored.codes.shape[0])
    scale = stored.scale[start:stop] if stored.scale.shape[0] > 1 else stored.scale
    offset = None if stored.offset is None else stored.offset[start:stop]
    return Codes(stored.codes[start:stop], scale, offset)


# --- one byte per weight ----------------------------------------------------------------------------------------------


def row_scale(rows: Tensor, largest: float) -> Tensor:
    """[rows, 1]: what maps the largest value of each row to ``largest``. Not a number where the row is not."""
    return rows.abs().amax(dim=1, keepdim=True).clamp_min(TINY) / largest


def to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [n, k] float -> codes int8 in -127..127, scale [n, 1]."""
    scale = row_scale(rows, 127.0)
    return (rows / scale).round_().clamp_(-127, 127).to(torch.int8), scale


def to_e4m3(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [n, k] float -> codes float8_e4m3fn, scale [n, 1]."""
    scale = row_scale(rows, E4M3_MAX)
    return (rows / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def _encode_int8(rows: Tensor, _group: int) -> Codes:
    return Codes(*to_int8(rows))


def _encode_fp8(rows: Tensor, _group: int) -> Codes:
    codes, scale = to_e4m3(rows)
    return Codes(codes.view(torch.uint8), scale)


def _encode_unscaled(rows: Tensor, _group: int) -> Codes:
    codes = rows.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return Codes(codes.view(torch.uint8), rows.new_ones(rows.shape[0], 1))


def _decode_int8(stored: Codes, dtype: torch.dtype) -> Tensor:
    # The product is rounded once: codes times a scale that was rounded first would be off in the same way everywhere.
    return (stored.codes.float() * stored.scale).to(dtype)


def _decode_fp8(stored: Codes, dtype: torch.dtype) -> Tensor:
    return (stored.codes.view(torch.float8_e4m3fn).float() * stored.scale).to(dtype)


# --- half a byte per weight -------------------------------------------------------------------------------------------


def normal_levels() -> tuple[float, ...]:
    """The 16 levels of NF4: quantiles of a standard normal distribution scaled to -1..1, with an exact zero."""
    tail = 0.5 * (1 / 32 + 1 / 30)
    upper = [NormalDist().inv_cdf(0.5 + (0.5 - tail) * step / 8) for step in range(1, 9)]
    lower = [NormalDist().inv_cdf(0.5 - (0.5 - tail) * step / 7) for step in range(7, 0, -1)]
    return tuple(level / upper[-1] for level in (*lower, 0.0, *upper))


NF4_LEVELS = normal_levels()
INT4_LEVELS = tuple(float(level) for level in range(16))


def _pairs(levels: tuple[float, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """[256, 2]: the two levels of every packed byte."""
    values = torch.tensor(levels, dtype=dtype, device=like.device)
    return torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=1)


def _pack(codes: Tensor) -> Tensor:
    """codes [out, groups, group] in 0..15 -> [out, in / 2] uint8."""
    flat = codes.flatten(1).to(torch.uint8)
    return flat[:, 0::2] | flat[:, 1::2] << 4


def _unpack(stored: Codes, levels: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """The levels of the codes, [out, groups, group]."""
    values = F.embedding(stored.codes.int(), _pairs(levels, stored.codes, dtype))
    return values.view(stored.codes.shape[0], stored.scale.shape[1], -1)


def _encode_int4(rows: Tensor, group: int) -> Codes:
    grouped = rows.view(rows.shape[0], -1, group)
    low, high = grouped.aminmax(dim=2, keepdim=True)
    # Codes are chosen for the rounded step and start, so that their rounding costs next to nothing.
    scale = ((high - low) / 15).clamp_min(TINY).bfloat16()
    offset = low.bfloat16()
    codes = ((grouped - offset.float()) / scale.float()).round_().clamp_(0, 15)
    return Codes(_pack(codes), scale.squeeze(2), offset.squeeze(2))


def _decode_int4(stored: Codes, dtype: torch.dtype) -> Tensor:
    assert stored.offset is not None
    values = _unpack(stored, INT4_LEVELS, dtype)
    scaled = torch.addcmul(stored.offset.to(dtype).unsqueeze(2), values, stored.scale.to(dtype).unsqueeze(2))
    return scaled.flatten(1)


def _encode_nf4(rows: Tensor, group: int) -> Codes:
    grouped = rows.view(rows.shape[0], -1, group)
    scale = grouped.abs().amax(dim=2, keepdim=True).clamp_min(TINY).bfloat16()
    levels = torch.tensor(NF4_LEVELS, device=rows.device)
    codes = torch.bucketize(grouped / scale.float(), (levels[1:] + levels[:-1]) / 2)
    return Codes(_pack(codes), scale.squeeze(2))


def _decode_nf4(stored: Codes, dtype: torch.dtype) -> Tensor:
    return (_unpack(stored, NF4_LEVELS, dtype) * stored.scale.to(dtype).unsqueeze(2)).flatten(1)


FORMATS: dict[str, Format] = {
    "int8": Format(_encode_int8, _decode_int8, grouped=False),
    "fp8": Format(_encode_fp8, _decode_fp8, grouped=False),
    "fp8_unscaled": Format(_encode_unscaled, _decode_fp8, grouped=False),
    "int4": Format(_encode_int4, _decode_int4, grouped=True),
    "nf4": Format(_encode_nf4, _decode_nf4, grouped=True),
}
