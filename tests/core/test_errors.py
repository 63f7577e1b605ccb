"""Problems reach the user complete: from worker processes, and all at once."""

from __future__ import annotations

import pickle

import pytest

from tuner.core.errors import Problems, UsageError


def test_an_error_says_what_where_why_and_what_to_do() -> None:
    error = UsageError("it broke", where="here", why="because", fix="mend it")
    assert str(error) == "it broke\n  at: here\n  why: because\n  fix: mend it"
    assert str(UsageError("it broke")) == "it broke"


def test_an_error_survives_the_way_back_from_a_worker() -> None:
    error = UsageError("two", parts=[UsageError("a", where="x"), UsageError("b", fix="y")])
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), str(back), list(map(str, back.parts))) == (UsageError, "two", list(map(str, error.parts)))


def test_one_problem_is_raised_as_it_is_and_several_are_listed() -> None:
    problems = Problems()
    problems.raise_if_any()
    only = UsageError("one")
    problems.add(only)
    with pytest.raises(UsageError) as caught:
        problems.raise_if_any()
    assert caught.value is only
    problems.add(UsageError("two", where="there"))
    with pytest.raises(UsageError) as caught:
        problems.raise_if_any()
    assert str(caught.value) == "2 problems:\n1. one\n2. two\n  at: there"


def test_lists_in_lists_become_one_list() -> None:
    inner, outer = Problems(), Problems()
    inner.extend([UsageError("a"), UsageError("b")])
    outer.add(UsageError("c"))
    with pytest.raises(UsageError) as caught:
        inner.raise_if_any()
    outer.extend([caught.value])
    with pytest.raises(UsageError) as caught:
        outer.raise_if_any()
    assert str(caught.value) == "3 problems:\n1. c\n2. a\n3. b"
