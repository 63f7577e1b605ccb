"""The store: what is put is got, nothing broken is ever returned, and keys name everything that matters."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tuner.core.data.cache import CacheKey, CacheStore, MemoryStore, open_store
from tuner.core.data.keys import FileHashes, component_identity, latent_key, mask_key, text_key
from tuner.core.errors import UsageError

KEY = CacheKey.of("latents", {"image": "abc", "size": [8, 8]})


def tensors() -> dict[str, torch.Tensor]:
    return {"latents": torch.arange(12.0).reshape(3, 4).to(torch.bfloat16), "mask": torch.ones(4, dtype=torch.bool)}


def equal(left: dict[str, torch.Tensor] | None, right: dict[str, torch.Tensor]) -> bool:
    assert left is not None
    return set(left) == set(right) and all(
        torch.equal(left[n], right[n]) and left[n].dtype == right[n].dtype for n in right
    )


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_what_is_put_is_got(tmp_path: Path, mode):
    store = open_store(mode, tmp_path)
    assert store is not None
    assert not store.has(KEY)
    assert store.get(KEY) is None
    store.put(KEY, tensors())
    assert store.has(KEY)
    assert equal(store.get(KEY), tensors())


def test_off_means_no_store(tmp_path: Path):
    assert open_store("off", tmp_path) is None


def test_a_caller_that_swaps_a_tensor_does_not_change_the_entry():
    store = MemoryStore()
    store.put(KEY, tensors())
    entry = store.get(KEY)
    assert entry is not None
    entry["latents"] = torch.zeros(1)
    assert equal(store.get(KEY), tensors())


def test_an_entry_lies_in_two_levels_of_folders_and_tells_its_ingredients(tmp_path: Path):
    store = CacheStore(tmp_path)
    store.put(KEY, tensors())
    assert store.path(KEY) == tmp_path / KEY.name[:2] / KEY.name[2:4] / f"{KEY.name}.safetensors"
    assert store.ingredients(KEY.name) == {"kind": "latents", "format": 1, "image": "abc", "size": [8, 8]}


def test_every_flipped_bit_is_noticed(tmp_path: Path, caplog):
    store = CacheStore(tmp_path)
    store.put(KEY, {"latents": torch.arange(6.0)})
    good = store.path(KEY).read_bytes()
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        store.path(KEY).write_bytes(bad)
        assert store.get(KEY) is None, f"byte {place}"
    assert "is broken" in caplog.text


def test_every_truncation_is_noticed(tmp_path: Path):
    store = CacheStore(tmp_path)
    store.put(KEY, {"latents": torch.arange(6.0)})
    good = store.path(KEY).read_bytes()
    for length in range(len(good)):
        store.path(KEY).write_bytes(good[:length])
        assert store.get(KEY) is None, f"{length} bytes"


def test_an_entry_under_another_name_is_not_used(tmp_path: Path):
    store, other = CacheStore(tmp_path), CacheKey.of("latents", {"image": "xyz"})
    store.put(KEY, tensors())
    store.path(other).parent.mkdir(parents=True)
    store.path(other).write_bytes(store.path(KEY).read_bytes())
    assert store.get(other) is None


def test_broken_entries_are_listed_and_can_be_written_again(tmp_path: Path):
    store = CacheStore(tmp_path)
    store.put(KEY, tensors())
    store.path(KEY).write_bytes(b"torn")
    assert list(store.broken()) == [store.path(KEY)]
    store.put(KEY, tensors())
    assert list(store.broken()) == []


def test_a_failed_write_leaves_the_old_entry_and_no_rubbish(tmp_path: Path, monkeypatch):
    store = CacheStore(tmp_path)
    store.put(KEY, tensors())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="cannot be written"):
        store.put(KEY, {"latents": torch.zeros(1)})
    monkeypatch.undo()
    assert equal(store.get(KEY), tensors())
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [store.path(KEY).name]


def test_pruning_removes_what_nobody_wants_and_says_what(tmp_path: Path):
    store, other = CacheStore(tmp_path), CacheKey.of("text", {"text": "b"})
    store.put(KEY, tensors())
    store.put(other, tensors())
    leftover = store.path(KEY).with_name(f".{store.path(KEY).name}.killed.tmp")
    leftover.write_bytes(b"half")
    os.utime(leftover, (0, 0))
    doomed = {store.path(other), leftover}
    assert set(store.prune({KEY.name}, dry_run=True)) == doomed
    assert store.has(other)
    assert set(store.prune({KEY.name})) == doomed
    assert (store.has(KEY), store.has(other), leftover.exists()) == (True, False, False)


# --- keys -------------------------------------------------------------------------------------------------------------

LATENT = {
    "image": "d1", "resize": "auto", "resized": (70, 64), "crop": (3, 0), "size": (64, 64), "flip": False,
    "background": "white", "vae": {"identity": "v", "dtype": "float32", "posterior": "mode"}, "dtype": "bf16",
}  # fmt: skip
MASK = {
    "mask": "alpha:d1", "resize": "auto", "resized": (70, 64), "crop": (3, 0), "size": (64, 64), "flip": False,
    "factor": 8,
}  # fmt: skip
TEXT = {"text": "a cat", "encoders": {"components": {"e": ["id", "bf16"]}, "max_tokens": {"e": 77}}, "dtype": "bf16"}


@pytest.mark.parametrize(
    ("make", "base", "change"),
    [
        *((latent_key, LATENT, {name: value}) for name, value in {
            "image": "d2", "resize": "lanczos", "resized": (71, 64), "crop": (2, 0), "size": (64, 48), "flip": True,
            "background": "black", "dtype": "fp32", "vae": {"identity": "w", "dtype": "float32", "posterior": "mode"},
        }.items()),
        (latent_key, LATENT, {"vae": {"identity": "v", "dtype": "bfloat16", "posterior": "mode"}}),
        (latent_key, LATENT, {"vae": {"identity": "v", "dtype": "float32", "posterior": "sample"}}),
        *((mask_key, MASK, {name: value}) for name, value in {
            "mask": "file:d1", "resize": "area", "resized": (70, 65), "crop": (0, 0), "size": (48, 64), "flip": True,
            "factor": 16,
        }.items()),
        (text_key, TEXT, {"text": "a dog"}),
        (text_key, TEXT, {"dtype": "fp32"}),
        (text_key, TEXT, {"encoders": {"components": {"e": ["id2", "bf16"]}, "max_tokens": {"e": 77}}}),
        (text_key, TEXT, {"encoders": {"components": {"e": ["id", "bf16"]}, "max_tokens": {"e": 78}}}),
    ],
)  # fmt: skip
def test_each_ingredient_changes_the_key(make, base, change):
    assert make(**base).name == make(**base).name
    assert make(**{**base, **change}).name != make(**base).name


def test_a_component_is_known_by_the_bytes_of_its_files(tmp_path: Path):
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_bytes(b"{}")
    hashes = FileHashes(tmp_path / "cache" / "identities.json")
    base = component_identity([folder], hashes)
    assert component_identity([folder / "config.json", folder / "model.safetensors"], hashes) == base
    (folder / "model.safetensors").write_bytes(b"others!")
    changed = component_identity([folder], hashes)
    assert changed != base
    (folder / "config.json").write_bytes(b"{1}")
    assert component_identity([folder], hashes) not in (base, changed)


def test_an_unchanged_file_is_hashed_once(tmp_path: Path, monkeypatch):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    os.utime(file, (1, 1))
    digest = FileHashes(tmp_path / "identities.json").digest(file)

    def unreadable(*_: object, **__: object) -> None:
        raise AssertionError("the file was read again")

    again = FileHashes(tmp_path / "identities.json")
    monkeypatch.setattr("tuner.core.data.keys._hash_file", unreadable)
    assert again.digest(file) == digest


def test_a_file_that_was_just_written_is_hashed_again(tmp_path: Path):
    file, memory = tmp_path / "model.safetensors", tmp_path / "identities.json"
    file.write_bytes(b"weights")
    stamp = file.stat().st_mtime_ns
    first = FileHashes(memory).digest(file)
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(stamp, stamp))
    assert FileHashes(memory).digest(file) != first


def test_a_torn_memory_of_hashes_only_costs_hashing_again(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    (tmp_path / "identities.json").write_text('{"half')
    assert FileHashes(tmp_path / "identities.json").digest(file)


def test_a_missing_model_file_is_named(tmp_path: Path):
    with pytest.raises(UsageError, match="cannot read a model file") as caught:
        FileHashes(tmp_path / "identities.json").digest(tmp_path / "absent.safetensors")
    assert "absent" in str(caught.value)
