"""Zeroing one encoder's share of the text fields."""

from __future__ import annotations

import torch

from tuner.core.registry.blank import blank_text
from tuner.core.types import Field

FIELDS = {
    "joint": Field(shape=(2, 5), of=("left", "right"), parts={"left": (0, 2), "right": (2, 5)}),
    "own": Field(shape=("L", 3), of=("right",)),
    "mask": Field(shape=("L",), dtype="bool", of=("right",)),
    "other": Field(shape=(3,), of=("third",)),
}


def tensors() -> dict[str, torch.Tensor]:
    return {
        "joint": torch.ones(2, 2, 5, requires_grad=True),
        "own": torch.full((2, 4, 3), torch.inf),
        "mask": torch.ones(2, 4, dtype=torch.bool),
        "other": torch.ones(2, 3),
    }


def test_only_the_encoders_columns_and_rows_become_zeros() -> None:
    given = tensors()
    blanked = blank_text(given, FIELDS, {"right": torch.tensor([True, False])})
    assert blanked["joint"].tolist() == [[[1.0] * 5] * 2, [[1.0, 1.0, 0.0, 0.0, 0.0]] * 2]
    assert not blanked["own"][1].any() and torch.equal(blanked["own"][0], given["own"][0])
    assert blanked["mask"].tolist() == [[True] * 4, [False] * 4]
    assert blanked["other"] is given["other"]
    assert given["joint"].eq(1).all()


def test_gradients_reach_what_is_left_and_nothing_else() -> None:
    given = tensors()
    blank_text(given, FIELDS, {"left": torch.tensor([False, True])})["joint"].sum().backward()
    assert given["joint"].grad.tolist() == [[[0.0, 0.0, 1.0, 1.0, 1.0]] * 2, [[1.0] * 5] * 2]


def test_a_field_that_is_not_there_is_passed_over() -> None:
    given = {"other": torch.ones(1, 3)}
    assert blank_text(given, FIELDS, {"left": torch.tensor([False])}) == given
