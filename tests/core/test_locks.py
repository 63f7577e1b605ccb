"""Locks on files: shared by many, held by one, and no obstacle where a file system has none."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from tuner.core.locks import share, take


def test_a_lock_is_shared_by_many_or_held_by_one(tmp_path: Path) -> None:
    with (tmp_path / "x").open("a+b") as one, (tmp_path / "x").open("a+b") as other:
        assert share(one) and share(other)
        assert not take(one)
        fcntl.flock(other, fcntl.LOCK_UN)
        assert take(one) and not take(other)


@pytest.mark.parametrize(("code", "free"), [(errno.ENOLCK, True), (errno.EAGAIN, False)])
def test_a_folder_without_locks_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, free: bool
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, "no")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (tmp_path / "x").open("a+b") as file:
        assert take(file) is free
        assert share(file) is free
