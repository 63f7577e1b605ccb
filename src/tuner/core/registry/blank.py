"""Zeroing what single text encoders contribute to the text fields of chosen samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.core.types import Field


def blank_text(
    tensors: Mapping[str, Tensor], fields: Mapping[str, Field], kept: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The fields [B, ...] with zeros (False in masks) where an encoder's output is not kept.

    kept: text component to bool [B]. A field made by several components loses only the columns that ``Field.parts``
    gives to the component. Differentiable in what is left; unchanged fields are returned as they are.
    """
    blanked = dict(tensors)
    for component, rows in kept.items():
        for name, field in fields.items():
            if name in blanked and component in field.of:
                blanked[name] = _blank(blanked[name], rows, field.parts.get(component))
    return blanked


def _blank(value: Tensor, kept: Tensor, columns: tuple[int, int] | None) -> Tensor:
    rows = kept.to(value.device).reshape(-1, *[1] * (value.ndim - 1))
    if columns is not None:
        inside = value.new_zeros(value.shape[-1]).bool()
        inside[columns[0] : columns[1]] = True
        rows = rows | ~inside
    # A fill, not a product: zero times infinity would not be zero.
    return value.masked_fill(~rows, 0)
