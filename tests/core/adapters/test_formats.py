"""Adapter files in the names of other programs: every key maps or the file is refused, and no value changes."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.core.adapters.toy import FACTS, MAPS, PATHS
from tuner.core.adapters.convert import convert_adapter
from tuner.core.adapters.deltas import merged_weight
from tuner.core.adapters.export import verify_export
from tuner.core.adapters.files import read_adapter, save_adapter
from tuner.core.adapters.formats import decode_adapter, encode_adapter, format_by_name, key_maps, module_name
from tuner.core.errors import UsageError
from tuner.core.files import safetensors_header

FORMATS = [fmt.name for fmt in MAPS.formats]


def adapter(components: tuple[str, ...] = ("denoiser",), dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for component in components:
        for path in PATHS[component]:
            rank = 3 if "mlp" in path else 2
            for part, shape in (("down", (rank, 6)), ("up", (8, rank))):
                tensors[f"{component}:{path}.{part}"] = torch.randn(shape, generator=generator).to(dtype)
            tensors[f"{component}:{path}.alpha"] = torch.tensor(1.5)
    return tensors


def same_effect(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert set(one) == set(two)
    for key in {name.rpartition(".")[0] for name in one}:
        torch.testing.assert_close(update(one, key), update(two, key))


def update(tensors: dict[str, Tensor], key: str) -> Tensor:
    """What the adapter adds to the weights of one module."""
    down, up, alpha = (tensors[f"{key}.{part}"] for part in ("down", "up", "alpha"))
    return merged_weight(torch.zeros(len(up), down.shape[1]), {"down": down, "up": up, "alpha": alpha})


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_is_read_back_with_the_same_effect(name: str) -> None:
    fmt = format_by_name(MAPS, name)
    components = tuple(fmt.prefixes)
    encoded = encode_adapter(adapter(components), fmt)
    assert any(key.endswith(".alpha") for key in encoded) == (fmt.alpha is not None)
    decoded, found = decode_adapter(encoded, MAPS.formats, PATHS)
    assert found == name
    same_effect(decoded, adapter(components))


def test_the_default_format_folds_alpha_into_up_in_float32() -> None:
    fmt = format_by_name(MAPS, None)
    encoded = encode_adapter(adapter(), fmt, torch.bfloat16)
    want = (adapter()["denoiser:head.up"] * (1.5 / 2)).to(torch.bfloat16)
    assert torch.equal(encoded["model.head.lora_B.weight"], want)
    assert not any("alpha" in key for key in encoded)


def test_names_are_spelled_by_prefix_renames_and_separator() -> None:
    names = [module_name(format_by_name(MAPS, name), "denoiser", "blocks.1.q") for name in FORMATS]
    assert names == ["model.blocks.1.q", "model.blocks.1.q", "lora_model_blocks_1_q", "transformer.layers.1.to_q"]


@pytest.mark.parametrize("prefix", ["net.", "model."])
@pytest.mark.parametrize(
    "suffixes", [("lora_down", "lora_up"), ("lora_A", "lora_B"), ("lora_A.default", "lora_B.default")]
)
@pytest.mark.parametrize("alpha", [False, True])
def test_other_prefixes_and_suffixes_are_read(prefix: str, suffixes: tuple[str, str], alpha: bool) -> None:
    tensors = {
        f"{prefix}blocks.0.k_proj.{suffixes[0]}.weight": torch.ones(2, 6),
        f"{prefix}blocks.0.k_proj.{suffixes[1]}.weight": torch.ones(6, 2),
    }
    if alpha:
        tensors[f"{prefix}blocks.0.k_proj.alpha"] = torch.tensor(1.0)
    decoded, _ = decode_adapter(tensors, MAPS.formats, PATHS)
    assert float(decoded["denoiser:blocks.0.k_proj.alpha"]) == (1.0 if alpha else 2.0)


def test_an_alpha_of_zero_means_the_rank() -> None:
    tensors = encode_adapter(adapter(), format_by_name(MAPS, "flat"))
    tensors["lora_model_head.alpha"] = torch.tensor(0.0)
    decoded, _ = decode_adapter(tensors, MAPS.formats, PATHS)
    assert float(decoded["denoiser:head.alpha"]) == 2.0


def test_alphas_that_peft_keeps_in_the_metadata_count() -> None:
    tensors = encode_adapter(adapter(), format_by_name(MAPS, "renamed"))
    settings = {"transformer.r": 2, "transformer.lora_alpha": 4, "transformer.alpha_pattern": {"layers.0.to_q": 7}}
    decoded, _ = decode_adapter(tensors, MAPS.formats, PATHS, {"lora_adapter_metadata": json.dumps(settings)})
    assert float(decoded["denoiser:head.alpha"]) == 4
    assert float(decoded["denoiser:blocks.0.q.alpha"]) == 7


def broken(**changes: Tensor | None) -> dict[str, Tensor]:
    tensors = encode_adapter(adapter(), format_by_name(MAPS, "flat"))
    for key, value in changes.items():
        if value is None:
            del tensors[key.replace("__", ".")]
        else:
            tensors[key.replace("__", ".")] = value
    return tensors


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "no tensors"),
        (broken(lora_model_blocks_9_q__alpha=torch.ones(())), "1 of 43 keys.*\n    lora_model_blocks_9_q.alpha"),
        (broken(something=torch.ones(1)), "\n    something"),
        (broken(lora_model_head__hada_w1_a=torch.ones(1)), "hada_w1_a does not belong to a lora"),
        (broken(lora_model_head__dora_scale=torch.ones(1)), "lengths of shape \\[1\\] for 8 rows"),
        (broken(lora_model_head__lora_up__weight=None), "lacks denoiser:head.up"),
        (broken(lora_model_head__lora_up__weight=torch.ones(6, 5)), "do not fit"),
        (broken(lora_model_head__alpha=torch.ones(2)), "not a number"),
        (broken(**{"model__head__alpha": torch.ones(())}), "two keys mean the same"),
    ],
)
def test_a_file_that_would_load_in_part_is_refused(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(UsageError) as error:
        decode_adapter(tensors, MAPS.formats, PATHS)
    assert re.search(message, str(error.value)), str(error.value)


def test_a_format_without_room_for_a_component_is_refused() -> None:
    with pytest.raises(UsageError, match="renamed cannot hold words"):
        encode_adapter(adapter(("denoiser", "words")), format_by_name(MAPS, "renamed"))


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown adapter format 'falt'"):
        format_by_name(MAPS, "falt")


def test_the_maps_come_from_the_facts() -> None:
    assert key_maps(FACTS).default == "dotted"


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target"), [("flat", "dotted-alpha"), ("dotted-alpha", "flat"), ("flat", "flat")])
def test_conversion_keeps_every_bit_and_the_metadata(tmp_path: Path, source: str, target: str) -> None:
    first, second, third = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "c"))
    tensors = adapter(("denoiser", "words"), torch.bfloat16)
    save_adapter(tensors, format_by_name(MAPS, source), first, {"ss_note": "hello", "author": "me"})
    done = convert_adapter(first, second, target, MAPS)
    assert (done.source_format, done.format, done.modules) == (source, target, len(tensors) // 3)
    convert_adapter(second, third, source, MAPS)
    assert first.read_bytes() == third.read_bytes()
    assert {"ss_note": "hello", "author": "me"}.items() <= safetensors_header(second).metadata.items()
    decoded = read_adapter(second, MAPS).tensors
    assert all(torch.equal(decoded[name], value) for name, value in tensors.items())


def test_conversion_drops_metadata_that_would_scale_twice(tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    tensors = encode_adapter(adapter(), format_by_name(MAPS, "renamed"))
    settings = {"transformer.r": 2, "transformer.lora_alpha": 4}
    save_file(tensors, first, {"lora_adapter_metadata": json.dumps(settings)})
    convert_adapter(first, second, "dotted", MAPS)
    assert "lora_adapter_metadata" not in safetensors_header(second).metadata
    same_effect(read_adapter(first, MAPS).tensors, read_adapter(second, MAPS).tensors)


def test_conversion_never_overwrites(tmp_path: Path) -> None:
    path = save_adapter(adapter(), MAPS.formats[0], tmp_path / "a.safetensors", {})
    with pytest.raises(UsageError, match="exists"):
        convert_adapter(path, path, "flat", MAPS)


def test_the_same_tensors_give_the_same_bytes_with_both_hashes(tmp_path: Path) -> None:
    fmt = format_by_name(MAPS, "flat")
    metadata = {f"ss_{index}": str(index) for index in range(20)} | {"sshs_model_hash": "old"}
    first = save_adapter(adapter(), fmt, tmp_path / "a.safetensors", metadata)
    second = save_adapter(adapter(), fmt, tmp_path / "b.safetensors", dict(reversed(metadata.items())))
    data = first.read_bytes()
    assert data == second.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    stored = safetensors_header(first).metadata
    assert stored["sshs_model_hash"] == hashlib.sha256(data[start:]).hexdigest()
    assert stored["sshs_legacy_hash"] == hashlib.sha256(b"").hexdigest()[:8]
    assert set(load_file(first)) == set(encode_adapter(adapter(), fmt))


def test_the_legacy_hash_looks_one_mebibyte_into_the_file_with_ss_metadata_only(tmp_path: Path) -> None:
    tensors = {
        "denoiser:head.down": torch.randn(300, 600, generator=torch.Generator().manual_seed(1)),
        "denoiser:head.up": torch.randn(700, 300, generator=torch.Generator().manual_seed(2)),
        "denoiser:head.alpha": torch.tensor(1.0),
    }
    fmt = format_by_name(MAPS, "flat")
    plain = save_adapter(tensors, fmt, tmp_path / "a.safetensors", {"ss_x": "1", "author": "me"})
    save_file(encode_adapter(tensors, fmt), tmp_path / "b.safetensors", {"ss_x": "1"})
    want = hashlib.sha256((tmp_path / "b.safetensors").read_bytes()[0x100000:0x110000]).hexdigest()[:8]
    assert safetensors_header(plain).metadata["sshs_legacy_hash"] == want


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_adapter(adapter(), MAPS.formats[0], tmp_path / "a.safetensors", {})
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tuner.core.atomic.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_adapter(adapter(), MAPS.formats[1], path, {})
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["dotted", "dotted-alpha", "flat"])
def test_an_export_is_proven_by_reading_it_back(tmp_path: Path, name: str, dtype: torch.dtype | None) -> None:
    tensors = adapter(("denoiser", "words"))
    path = save_adapter(tensors, format_by_name(MAPS, name), tmp_path / "a.safetensors", {}, dtype)
    verified = verify_export(path, tensors, MAPS)
    assert verified.modules == len(tensors) // 3
    assert str(verified).startswith(f"{verified.keys} of {verified.keys} keys map")


@pytest.mark.parametrize("change", ["module", "value", "scale"])
def test_an_export_that_differs_is_found(tmp_path: Path, change: str) -> None:
    tensors = adapter()
    path = save_adapter(tensors, format_by_name(MAPS, "flat"), tmp_path / "a.safetensors", {})
    if change == "module":
        tensors = {name: value for name, value in tensors.items() if ":head." not in name}
    elif change == "value":
        tensors["denoiser:head.up"] = tensors["denoiser:head.up"].flip(0)
    else:
        tensors["denoiser:head.alpha"] = torch.tensor(1.6)
    with pytest.raises(UsageError, match="other modules" if change == "module" else "acts differently"):
        verify_export(path, tensors, MAPS)


def test_a_file_of_another_model_is_named_in_the_error(tmp_path: Path) -> None:
    save_file({"other.lora_A.weight": torch.ones(1, 1)}, tmp_path / "a.safetensors")
    with pytest.raises(UsageError) as error:
        read_adapter(tmp_path / "a.safetensors", MAPS)
    assert str(tmp_path / "a.safetensors") in str(error.value)
    assert "model.embed.lora_A.weight" in str(error.value)
