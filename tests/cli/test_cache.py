"""``tuner cache info|verify|prune``: what a cache holds, whether it is sound, and that only its own files ever go."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.core.train.conftest import make_config, model_files, pictures  # noqa: F401  # a tiny real model
from tuner.cli.main import main
from tuner.core.data.keys import HASHES

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
    foreign = [cache_dir / "notes.txt", cache_dir / "ab" / "cd" / "mine.safetensors"]
    killed = cache_dir / "ab" / "cd" / ".x.tmp"
    for path in (*foreign, killed):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"data")
    os.utime(killed, (time.time() - 1e6,) * 2)
    assert main(["cache", "prune", config]) == 0
    streams = capsys.readouterr()
    assert f"{len(unused) + 1} files would go: add --yes" in streams.out
    assert "may be used by configurations that are not named" in streams.err
    assert unused < set(entries(cache_dir))
    both = told(capsys, "prune", config, other)
    assert (both["unused"], both["leftovers"], both["removed"]) == ([], [str(killed)], False)
    assert main(["cache", "prune", config, "--yes"]) == 0
    assert set(entries(cache_dir)) == {*kept, foreign[1]}
    assert all(path.read_bytes() == b"data" for path in foreign)
    assert not killed.exists()
    assert main(["cache", "prune", config, "--yes"]) == 0
    assert "there is nothing to remove" in capsys.readouterr().out


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
