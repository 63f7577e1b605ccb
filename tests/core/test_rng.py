"""A random value depends on its seed and its name alone, and stays what it is from release to release."""

from __future__ import annotations

import pickle

import torch

from tuner.core.rng import Rng


def test_values_are_those_of_every_release() -> None:
    # A change here would give every resumed run other noise.
    rng = Rng(42, "noise", 7, "item")
    assert rng.key() == 986744680764677085
    assert rng.integers(1000) == 241
    assert rng.permutation(5) == [0, 4, 2, 3, 1]
    torch.testing.assert_close(rng.normal((2,)), torch.tensor([0.402798, -1.801055]), atol=1e-6, rtol=0)


def test_a_value_does_not_depend_on_what_was_drawn_before() -> None:
    rng = Rng(1, "a")
    first = rng.normal((2, 3))
    rng.random()
    torch.randn(1)
    assert torch.equal(rng.normal((2, 3)), first)
    assert torch.equal(pickle.loads(pickle.dumps(rng)).normal((2, 3)), first)


def test_seed_purpose_and_kind_of_a_name_all_count() -> None:
    streams = [Rng(1, "a"), Rng(2, "a"), Rng(1, "b"), Rng(1, "a", "b"), Rng(1, "ab"), Rng(1, 1), Rng(1, "1"), Rng(1)]
    assert len({stream.key() for stream in streams}) == len(streams)
    assert Rng(1, "a").child("b", 2).key() == Rng(1, "a", "b", 2).key()


def test_a_child_is_another_stream_than_its_parent() -> None:
    rng = Rng(3, "x")
    assert rng.child("y").random() != rng.random()
    assert sorted(rng.shuffled("abcdef")) == list("abcdef")
    assert 0 <= min(rng.uniform((100,)).tolist()) <= max(rng.uniform((100,)).tolist()) < 1
