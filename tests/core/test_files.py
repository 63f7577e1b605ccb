"""Weight headers are read without the weights, and every broken file is named for what it is."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tuner.core.errors import UsageError
from tuner.core.files import safetensors_header, weight_header


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    tensors = {"a.weight": torch.zeros(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}
    save_file(tensors, path, {"format": "pt"})
    return path


def test_names_shapes_dtypes_and_metadata_are_read(file: Path) -> None:
    header = safetensors_header(file)
    assert {name: (info.dtype, info.shape) for name, info in header.items()} == {
        "a.weight": ("F32", (3, 4)),
        "b": ("BF16", (5,)),
    }
    assert header.metadata == {"format": "pt"}
    assert header.files == (file,)


def test_renaming_keeps_the_place_and_drops_the_rest(file: Path) -> None:
    renamed = safetensors_header(file).renamed({"new": "b"})
    assert list(renamed) == ["new"]
    assert renamed["new"].name == "b"


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        safetensors_header(tmp_path / "absent.safetensors")


def test_a_folder_in_place_of_a_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="folder"):
        safetensors_header(tmp_path)


@pytest.mark.parametrize("share", [0.3, 0.9], ids=["in the header", "in the data"])
def test_a_file_that_is_cut_short_says_so(file: Path, share: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UsageError, match="cut short"):
        safetensors_header(file)


@pytest.mark.parametrize(
    ("content", "guess"),
    [
        (b"", "empty"),
        (b"PK\x03\x04" + b"\0" * 100, r"\.pth archive"),
        (b"GGUF" + b"\0" * 100, "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
        (b"<!DOCTYPE html><html></html>", "error page"),
        (b"\x80\x04\x95" + b"\xff" * 100, "pickle"),
        (b"\x01" * 100, "does not start with"),
    ],
    ids=["empty", "zip", "gguf", "lfs", "html", "pickle", "noise"],
)
def test_another_file_under_a_safetensors_name_is_told_apart(tmp_path: Path, content: bytes, guess: str) -> None:
    path = tmp_path / "renamed.safetensors"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="not a safetensors file") as caught:
        safetensors_header(path)
    assert re.search(guess, caught.value.why or "")


@pytest.mark.parametrize(
    "header",
    [
        "[1, 2]",
        "{not json",
        '{"a": {"dtype": "F32", "shape": [2]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        '{"__metadata__": 3}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
        "[" * 100_000,
    ],
    ids=["list", "broken", "no offsets", "wrong length", "metadata", "in front of the data", "nested too deep"],
)
def test_a_malformed_header_is_refused(tmp_path: Path, header: str) -> None:
    path = tmp_path / "bad.safetensors"
    text = header.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    with pytest.raises(UsageError, match="not a safetensors file"):
        safetensors_header(path)


def test_shards_are_joined_by_their_index(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "m-1.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "m-2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}))
    header = weight_header(tmp_path)
    assert {name: info.shape for name, info in header.items()} == {"a": (2,), "b": (3,)}
    assert {file.name for file in header.files} == {"m-1.safetensors", "m-2.safetensors"}


def test_an_index_with_a_missing_tensor_or_a_foreign_path_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "m-1.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-1.safetensors"}}))
    with pytest.raises(UsageError, match="lack tensors") as caught:
        weight_header(index)
    assert "missing: b" in str(caught.value)
    index.write_text(json.dumps({"weight_map": {"a": "../m-1.safetensors"}}))
    with pytest.raises(UsageError, match="outside"):
        weight_header(index)


@pytest.mark.parametrize(
    "names", ['{"weight_map": ["a"]}', '{"weight_map": {"a": 3}}', "[1]", "{}", "{", "[" * 100_000]
)
def test_a_malformed_index_is_refused(tmp_path: Path, names: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(names)
    with pytest.raises(UsageError, match="not a shard index"):
        weight_header(index)


def test_a_folder_needs_exactly_one_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no weights"):
        weight_header(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    assert list(weight_header(tmp_path)) == ["a"]
    save_file({"a": torch.zeros(2)}, tmp_path / "two.safetensors")
    with pytest.raises(UsageError, match="several"):
        weight_header(tmp_path)


def test_reading_a_header_does_not_import_torch(file: Path) -> None:
    code = (
        "import sys; from tuner.core.files import safetensors_header; "
        f"safetensors_header({str(file)!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_folder_with_weights_in_its_folders_names_these(tmp_path):
    (tmp_path / "model" / "transformer").mkdir(parents=True)
    save_file({"a": torch.zeros(1)}, tmp_path / "model" / "transformer" / "model.safetensors")
    with pytest.raises(UsageError) as caught:
        weight_header(tmp_path / "model")
    assert caught.value.fix == f"name one of: {tmp_path / 'model' / 'transformer'}"
