"""``tuner cache info|verify|prune``: what a cache holds, whether it is sound, and that only its own files ever go."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.core.train.conftest import make_config, model_files, pictures  # noqa: F401  # a tiny real model
from tests.fixtures.terminal import Terminal
from tuner.cli.main import main
from tuner.core.data.inuse import IN_USE, cache_alone, cache_in_use
from tuner.core.data.keys import HASHES
from tuner.core.errors import UsageError

Write = Callable[..., str]


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    """A cache of its own: these tests break entries."""
    return tmp_path / "cache"


@pytest.fixture
def write(make_config: Callable[..., dict[str, Any]], tmp_path: Path) -> Write:  # noqa: F811
    """A function from a name and changes by dotted path to the path of a configuration file."""

    def to_file(name: str = "config", **changes: Any) -> str:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(make_config(**changes), indent=2), encoding="utf-8")
        return str(path)

    return to_file


def told(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    capsys.readouterr()
    assert main(["cache", *words, "--json"]) == code
    (found,) = json.loads(capsys.readouterr().out)
    return found


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("??/??/*.safetensors"))


def test_a_cache_is_counted_by_kind_and_use(write: Write, cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write()
    assert main(["cache", config]) == 0
    (cache_dir / "notes.txt").write_text("mine", encoding="utf-8")
    found = told(capsys, "info", config)
    assert {row["kind"] for row in found["rows"]} == {"latents", "text"}
    assert all(row["used"] == row["entries"] for row in found["rows"])
    assert (found["entries"], found["others"], found["leftovers"]) == (len(entries(cache_dir)), 1, 0)
    other = write("other", data__sets__0__resolution=32)
    used = {row["kind"]: row["used"] for row in told(capsys, "info", other)["rows"]}
    assert used == {"latents": 0, "text": 7}
    assert main(["cache", "info", "--dir", str(cache_dir)]) == 0
    assert "1 files are not of the cache and stay as they are" in capsys.readouterr().out


def test_verify_finds_flipped_bits_and_weights_that_changed_unseen(
    write: Write, cache_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = write()
    assert main(["cache", config]) == 0
    assert told(capsys, "verify", config)["ok"]
    victim = entries(cache_dir)[0]
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    weights = tmp_path / "weights.bin"
    weights.write_bytes(b"new")
    stat = weights.stat()
    known = {str(weights.resolve()): {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "digest": "old"}}
    (cache_dir / HASHES).write_text(json.dumps(known), encoding="utf-8")
    found = told(capsys, "verify", "--dir", str(cache_dir), code=1)
    assert (found["broken"], found["changed"]) == ([str(victim)], [str(weights)])
    assert json.loads((cache_dir / HASHES).read_text(encoding="utf-8")) == {}
    assert main(["cache", "verify", config]) == 1
    assert str(victim) in capsys.readouterr().err


def test_prune_lists_first_and_removes_only_what_is_ours_and_unused(
    write: Write, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write()
    assert main(["cache", config]) == 0
    kept = set(entries(cache_dir))
    other = write("other", data__sets__0__resolution=32)
    assert main(["cache", other]) == 0
    unused = set(entries(cache_dir)) - kept
    assert unused
    other_tool = cache_dir / "ab" / "cd" / f"abcd{'0' * 28}.safetensors"
    foreign = [cache_dir / "notes.txt", cache_dir / "ab" / "cd" / "mine.safetensors", cache_dir / "ab/cd/.x.tmp"]
    killed = cache_dir / "ab" / "cd" / f".{other_tool.name}.k1_x.tmp"
    for path in (*foreign, killed):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"data")
    save_file({"x": torch.zeros(1)}, other_tool)
    (cache_dir / "cd").mkdir(exist_ok=True)
    for path in (killed, foreign[2]):
        os.utime(path, (time.time() - 1e6,) * 2)
    assert main(["cache", "prune", config]) == 0
    streams = capsys.readouterr()
    assert f"{len(unused) + 1} files would go: add --yes" in streams.out
    assert "may be used by configurations that are not named" in streams.err
    assert unused < set(entries(cache_dir))
    both = told(capsys, "prune", config, other)
    assert (both["unused"], both["leftovers"], both["removed"]) == ([], [str(killed)], False)
    assert main(["cache", "prune", config, "--yes"]) == 0
    assert set(entries(cache_dir)) == {*kept, foreign[1], other_tool}
    assert (cache_dir / "cd").is_dir()
    assert all(path.read_bytes() == b"data" for path in foreign)
    assert not killed.exists()
    assert main(["cache", "prune", config, "--yes"]) == 0
    assert "there is nothing to remove" in capsys.readouterr().out


def test_prune_follows_no_links(write: Write, cache_dir: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["cache", write()]) == 0
    elsewhere = tmp_path / "elsewhere"
    first = entries(cache_dir)[0]
    first.parent.parent.rename(elsewhere)
    first.parent.parent.symlink_to(elsewhere, target_is_directory=True)
    second = next(path for path in entries(cache_dir) if path.parent.parent != first.parent.parent)
    second.rename(tmp_path / "kept.safetensors")
    second.symlink_to(tmp_path / "kept.safetensors")
    before = sorted(elsewhere.rglob("*"))
    other = write("other", data__sets__0__resolution=32)
    assert main(["cache", "prune", other, "--yes"]) == 0
    assert sorted(elsewhere.rglob("*")) == before
    assert (tmp_path / "kept.safetensors").is_file()
    assert second.is_symlink()


def test_nothing_is_removed_while_a_run_uses_the_cache(write: Write, cache_dir: Path, capsys: Any) -> None:
    assert main(["cache", write()]) == 0
    before = entries(cache_dir)
    other = write("other", data__sets__0__resolution=32)
    with cache_in_use(cache_dir), cache_in_use(cache_dir):
        assert main(["cache", "prune", other, "--yes"]) == 2
    assert "a run is using this cache" in capsys.readouterr().err
    assert entries(cache_dir) == before
    assert main(["cache", "prune", other, "--yes"]) == 0
    assert len(entries(cache_dir)) < len(before)


def test_a_cache_that_somebody_else_began_is_held_as_well(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_dir.mkdir(exist_ok=True)
    (cache_dir / IN_USE).touch()
    plain = Path.open

    def read_only(path: Path, mode: str = "r", **options: Any) -> Any:
        if path.name == IN_USE and mode != "rb":
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, mode, **options)

    monkeypatch.setattr(Path, "open", read_only)
    with cache_in_use(cache_dir), pytest.raises(UsageError, match="a run is using this cache"), cache_alone(cache_dir):
        pass
    with cache_alone(cache_dir):
        pass


def test_a_training_holds_its_cache(write: Write, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tuner.core.train import run

    def prune(self: Any) -> None:
        with pytest.raises(UsageError, match="a run is using this cache"), cache_alone(cache_dir):
            pass
        raise UsageError("seen")

    monkeypatch.setattr(run.Caches, "fill", prune)
    assert main(["train", write()]) == 2
    assert main(["cache", write()]) == 2
    with cache_alone(cache_dir):
        pass


def test_options_without_effect_are_refused(write: Write, cache_dir: Path, capsys: Any) -> None:
    config = write()
    assert main(["cache", "info", config, "--dir", str(cache_dir)]) == 2
    assert "a folder and configurations at once" in capsys.readouterr().err
    assert main(["cache", "verify", config, "--yes"]) == 2
    assert "--yes is for prune" in capsys.readouterr().err


def test_encoding_ahead_is_told_as_json_and_nothing_else(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", write(), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"images": 6, "validation_images": 0}


def test_what_the_run_itself_needs_is_never_pruned(
    write: Write, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(sample__prompts=["a red cat"])
    assert main(["cache", config]) == 0
    assert told(capsys, "prune", config)["unused"] == []
    assert any(row["kind"] == "text" for row in told(capsys, "info", config)["rows"])


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["prune", "--dir", "x"], "prune needs configurations"),
        (["info", "--dir", "nowhere"], "there is no cache here"),
        (["config.json", "--yes"], "--yes is for info, verify and prune"),
        (["a.json", "b.json"], "one configuration at a time"),
        ([], "which configuration?"),
        (["info"], "which configuration?"),
    ],
)
def test_wrong_use_is_told(words: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", *words]) == 2
    assert what in capsys.readouterr().err


@pytest.mark.parametrize("words", [("info",), ("verify",), ("prune",)])
def test_the_next_command_is_the_one_that_was_meant(words: tuple[str, ...], capsys: Any) -> None:
    assert main(["cache", *words]) == 2
    assert f"fix: tuner cache {words[0]} config.json" in capsys.readouterr().err


def test_prune_asks_nobody_where_the_input_is_closed(
    write: Write, cache_dir: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["cache", write()]) == 0
    before = entries(cache_dir)
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["cache", "prune", write("other", data__sets__0__resolution=32)]) == 0
    assert entries(cache_dir) == before
    assert "--yes" in capsys.readouterr().out


@pytest.mark.parametrize(("answer", "removed"), [("y\n", True), ("\x04", False)])
def test_on_a_terminal_prune_asks(answer: str, removed: bool, write: Write, cache_dir: Path, tmp_path: Path) -> None:
    assert main(["cache", write()]) == 0
    other = write("other", data__sets__0__resolution=32)
    before = len(entries(cache_dir))
    with Terminal("cache", "prune", other, folder=tmp_path) as terminal:
        terminal.expect("files? [y/N]")
        terminal.type(answer)
        assert terminal.end() == 0
    assert (len(entries(cache_dir)) < before) is removed
