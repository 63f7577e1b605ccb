"""Every problem of a configuration is told at once, with file, line, JSON path and the nearest name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.core.config.samples import build, refusal
from tuner.core.errors import UsageError


def one(**sections: Any) -> str:
    with pytest.raises(UsageError) as caught:
        build(**sections)
    return str(caught.value)


def test_all_problems_of_a_file_are_listed_with_their_lines(tmp_path: Path) -> None:
    text = """{
  "model": {"family": "toy", "pth": "toy.safetensors"},
  "data": {
    "defaults": {"captions": {"shufle": true, "dropout": 2}},
    "sets": [{"sources": [{"id": "a", "path": "x"}, {"id": "b", "path": "y", "mask": "alfa"}]}]
  },
  "optimizer": {"name": "adamw"},
  "train": {"steps": 10, "epochs": 2},
  "checkpoint": {"dir": "out", "every": "often"},
  "publish": {"repo": "x"},
  "validat": {"split": 0.1}
}"""
    assert (
        refusal(text, tmp_path)
        == """10 problems:
1. publish is planned and not built yet
  at: DIR/c.json:10, publish
  why: it is for: uploading
  fix: take it out
2. data.defaults.captions.dropout: expected a number at most 1, got 2
  at: DIR/c.json:4, data.defaults.captions.dropout
3. unknown key 'shufle' in data.defaults.captions
  at: DIR/c.json:4, data.defaults.captions.shufle
  fix: did you mean 'shuffle'?
4. the key 'model.path' is required
  at: DIR/c.json:2, model
5. unknown key 'pth' in model
  at: DIR/c.json:2, model.pth
  fix: did you mean 'path'?
6. data.sets[0].sources[1].mask: expected "alpha" or an object, got 'alfa'
  at: DIR/c.json:5, data.sets[0].sources[1].mask
7. the key 'optimizer.lr' is required
  at: DIR/c.json:7, optimizer
8. train: give exactly one of steps and epochs
  at: DIR/c.json:8, train
9. checkpoint.every: expected a whole number or a share such as "5%", got 'often'
  at: DIR/c.json:9, checkpoint.every
10. unknown key 'validat'
  at: DIR/c.json:11, validat
  fix: did you mean 'validate'?"""
    )


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            {"memory": {"checkpointing": True}},
            'memory.checkpointing: expected "off", "block", "keep_attention" or "selective", got true',
        ),
        ({"network": {"rank": 1.5}}, 'network.rank: expected a whole number or "from_file", got 1.5'),
        (
            {"network": {"blocks": {"main": [0, "4-x"]}}},
            "expected a whole number or a range such as \"4-7\", got '4-x'",
        ),
        ({"noise": {"shift": "atuo"}}, "noise.shift: expected a number or \"auto\", got 'atuo'"),
        ({"optimizer": {"lr": 0}}, "optimizer.lr: expected a number above 0, got 0"),
        ({"optimizer": {"lr": "1e-4"}}, "optimizer.lr: expected a number, got '1e-4'"),
        ({"network": {"include": "attn"}}, "network.include: expected a list, got 'attn'"),
        ({"sample": {"every": {"step": 3}}}, "unknown key 'step' in sample.every"),
        ({"loss": []}, "loss: expected an object, got a list of 0"),
        ({"train": {"clip_grad": {"norm": 1, "value": 1}}}, "train.clip_grad: give norm or value"),
        ({"checkpoint": {"name": "a/b"}}, "checkpoint.name: expected a name without slashes, got 'a/b'"),
        ({"schedule": {"name": "constant", "warmup": 5}}, "schedule: warmup is not used by the schedule 'constant'"),
        (
            {"data": {"sets": [{"resolution": 8, "sources": [{"id": "a", "path": "b"}]}]}},
            "expected a number at least 16",
        ),
    ],
)
def test_a_wrong_value_is_told_with_what_was_expected(sections: dict[str, Any], expected: str) -> None:
    assert expected in one(**sections)


def test_booleans_are_booleans_and_numbers_are_not_text() -> None:
    for value in ("true", 1, 0):
        assert "expected true or false" in one(model={"mmap": value})
    assert "expected text" in one(checkpoint={"dir": 3})


def test_an_unknown_key_without_a_near_name_lists_the_known_ones() -> None:
    assert "fix: known keys: checkpointing" in one(memory={"quux": 1})


def test_the_section_validate_is_not_called_validation() -> None:
    assert "the section is called 'validate'" in one(validation={"split": 0.1})
