"""What `tuner inspect` says about files of every kind, and the copies that it strips."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.fixtures.tiny_parts import clip_shapes, random_tensors, t5_shapes, vae_shapes
from tests.helpers import golden, golden_path
from tuner.cli.main import main

LORA = "flux/lora_sdscripts.safetensors"


@pytest.fixture
def told(capsys):
    def inspect(path: Path | str, *words: str) -> dict[str, Any]:
        assert main(["inspect", str(path), "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)

    return inspect


@pytest.mark.parametrize(
    ("name", "what", "family", "flavour"),
    [
        ("flux/dev_bfl", "checkpoint", "flux", "dev"),
        ("flux/dev_diffusers", "checkpoint", "flux", "dev"),
        ("flux/chroma_bfl", "checkpoint", "flux", "chroma"),
        ("sd3/sd35m_weights_f16", "checkpoint", "sd3", "3.5-medium"),
        ("sd3/sd3m_weights_f16", "checkpoint", "sd3", "medium"),
        ("anima/e2e_weights", "checkpoint", "anima", "2x96"),
        ("anima/qwen3_weights", "qwen3", "anima", None),
        ("anima/adapter_weights", "llm_adapter", "anima", None),
        ("anima/vae_weights", "vae", "anima", None),
        ("flux/lora_sdscripts", "adapter", "flux", None),
        ("flux/lora_split_diffusers", "adapter", "flux", None),
        ("sd3/sd3m_lora_diffusers", "adapter", "sd3", None),
        ("anima/lora_sdscripts", "adapter", "anima", None),
        ("core/noise", "unknown", None, None),
    ],
)
def test_files_are_told_apart(told, name, what, family, flavour):
    found = told(golden_path(f"{name}.safetensors"))
    assert (found["what"], found["family"], found["flavour"]) == (what, family, flavour)
    assert sum(each["tensors"] for each in found["dtypes"].values()) == found["tensors"]
    if what == "unknown":
        assert len(found["unmapped"]) == found["tensors"]
    else:
        parts = sum(each["tensors"] for each in found["parts"].values())
        assert parts + len(found["unmapped"]) == found["tensors"]


def test_parts_that_several_models_have_name_all_of_them(told, tmp_path):
    files = {
        "clip_l or clip_g": clip_shapes(width=20, layers=1, projection=8),
        "t5": t5_shapes(width=28),
        "vae": vae_shapes(),
    }
    for what, shapes in files.items():
        path = tmp_path / "part.safetensors"
        save_file(random_tensors(shapes, torch.Generator()), path)
        found = told(path)
        assert (found["what"], found["family"]) == (what, "flux or sd3")


def test_an_all_in_one_file_is_counted_by_parts(told, tmp_path):
    tensors = {f"model.diffusion_model.{name}": value for name, value in golden("flux/dev_bfl.safetensors").items()}
    encoder = random_tensors(t5_shapes(width=28), torch.Generator())
    tensors |= {f"text_encoders.t5xxl.transformer.{name}": value for name, value in encoder.items()}
    tensors |= {"vae.decoder.odd": torch.ones(1), "leftover": torch.ones(1)}
    save_file(tensors, tmp_path / "all.safetensors")
    found = told(tmp_path / "all.safetensors")
    assert {name: each["tensors"] for name, each in found["parts"].items()} == {
        "denoiser": len(golden("flux/dev_bfl.safetensors")), "t5": len(encoder), "vae": 1,
    }  # fmt: skip
    assert found["unmapped"] == ["leftover"]


def test_an_adapter_is_described_module_by_module(told):
    found = told(golden_path("anima/lora_sdscripts.safetensors"))
    assert found["format"] == "sd-scripts"
    assert {(row["rank"], row["alpha"], row["kind"]): row["modules"] for row in found["ranks"]} == {
        (4, 2.0, "lora"): 40, (6, 2.0, "lora"): 14,
    }  # fmt: skip
    row = next(row for row in found["modules"] if row["name"] == "lora_unet_blocks_0_mlp_layer1")
    assert (row["component"], row["paths"], row["dtype"]) == ("denoiser", ["blocks.0.mlp.layer1"], "F32")
    assert set(found["unread"]) == {"diffusers"} and len(found["unread"]["diffusers"]) == 54
    joint = told(golden_path(LORA))["modules"]
    paths = {tuple(row["paths"]) for row in joint if row["name"].endswith("0_img_attn_qkv")}
    assert paths == {tuple(f"transformer_blocks.0.attn.to_{letter}" for letter in "qkv")}


def test_keys_that_fit_nothing_or_that_a_program_would_not_read_are_named(told, tmp_path, capsys):
    tensors = golden("anima/lora_comfyui.safetensors")
    strange = {"diffusion_model.blocks.0.nothing.lora_A.weight": torch.ones(2, 4), "surprise": torch.ones(1)}
    renamed = {name.replace("diffusion_model.", "net.", 1): value for name, value in tensors.items()}
    save_file(renamed | strange, tmp_path / "odd.safetensors")
    found = told(tmp_path / "odd.safetensors")
    assert set(found["unmapped"]) == set(strange)
    assert "net.blocks.0.mlp.layer1" in found["unread"]["ComfyUI"]
    assert "text_encoders.qwen3_06b.transformer.model.layers.0.mlp.up_proj" not in found["unread"]["ComfyUI"]
    assert main(["inspect", str(tmp_path / "odd.safetensors")]) == 0
    printed = capsys.readouterr().out
    assert "2 keys belong to no modules of this family:" in printed
    assert "ComfyUI would not understand" in printed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_alphas_are_read_in_every_number_format(told, tmp_path, dtype):
    tensors = golden(LORA) | {"lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(1.5, dtype=dtype)}
    save_file(tensors, tmp_path / "a.safetensors")
    rows = {row["name"]: row["alpha"] for row in told(tmp_path / "a.safetensors")["modules"]}
    assert rows["lora_unet_double_blocks_0_img_attn_qkv"] == 1.5


def test_the_hashes_are_those_of_the_bytes(told, tmp_path):
    path = golden_path("anima/lora_sdscripts.safetensors")
    found = told(path)["hashes"]
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert found["sha256"] == hashlib.sha256(data).hexdigest()
    assert found["tensors"] == hashlib.sha256(data[start:]).hexdigest()
    assert found["stored"] is True
    changed = tmp_path / "changed.safetensors"
    changed.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert told(changed)["hashes"]["stored"] is False


def test_scaled_weights_are_explained(told, tmp_path):
    tensors = golden("flux/dev_bfl.safetensors") | {"double_blocks.0.img_mlp.0.scale_weight": torch.ones(())}
    save_file(tensors, tmp_path / "scaled.safetensors")
    found = told(tmp_path / "scaled.safetensors")
    assert (found["what"], found["family"]) == ("checkpoint", "flux")
    [problem] = found["problems"]
    assert problem.startswith("as flux: these are scaled 8-bit weights")


def test_the_report_is_readable(capsys, tmp_path):
    metadata = {"ss_learning_rate": "0.0001", "ss_network_args": json.dumps({"a": 1}), "ss_tag_frequency": "{}"}
    save_file(golden(LORA), tmp_path / "a.safetensors", metadata)
    assert main(["inspect", str(tmp_path / "a.safetensors"), "--modules"]) == 0
    printed = capsys.readouterr().out
    for text in (
        "a.safetensors: adapter of flux, format sd-scripts",
        "learning rate    0.0001",
        "network options  a=1",
        "1 further metadata; --metadata shows all",
        "denoiser:transformer_blocks.0.attn.to_q + transformer_blocks.0.attn.to_k + transformer_blocks.0.attn.to_v",
    ):
        assert text in printed
    assert main(["inspect", str(tmp_path / "a.safetensors"), "--metadata"]) == 0
    assert "ss_tag_frequency = {}" in capsys.readouterr().out


def test_looking_needs_no_torch():
    code = (
        "import sys; from tuner.cli.main import main; "
        f"main(['inspect', {str(golden_path(LORA))!r}]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


# --- copies with fewer metadata ---------------------------------------------------------------------------------------

METADATA = {
    "format": "pt",
    "lora_adapter_metadata": '{"transformer.r": 4, "transformer.base_model_name_or_path": "ada/secret-model"}',
    "modelspec.title": "Hero",
    "modelspec.implementation": "https://example.org/model",
    "modelspec.date": "2026-01-02T03:04:05",
    "modelspec.merged_from": "ada:0.5, client:1",
    "ss_network_dim": "8",
    "ss_network_args": '{"file": "/home/ada/targets.txt"}',
    "ss_learning_rate": "1e-4",
    "ss_optimizer": "adamw",
    "ss_seed": "42",
    "ss_training_started_at": "1700000000.5",
    "ss_session_id": "123456",
    "ss_output_name": "my secret project",
    "ss_sd_model_name": "C:\\models\\base.safetensors",
    "ss_dataset_dirs": '{"3_ada": {"n_repeats": 3}}',
    "ss_tag_frequency": '{"3_ada": {"portrait of ada": 12}}',
    "ss_training_comment": "for the client",
    "workflow": '{"prompt": "a cat"}',
    "unheard_of": "ada",
}
KEPT = {
    "private": {"format", "lora_adapter_metadata", "modelspec.title", "modelspec.implementation", "ss_network_dim",
                "ss_learning_rate", "ss_optimizer", "ss_seed"},
    "training": {"format", "lora_adapter_metadata", "modelspec.title", "modelspec.implementation", "ss_network_dim"},
    "all": {"format", "lora_adapter_metadata"},
}  # fmt: skip


@pytest.mark.parametrize("level", KEPT)
def test_a_stripped_copy_has_the_same_tensors_and_only_what_may_stay(tmp_path, capsys, level):
    source, copy = tmp_path / "a.safetensors", tmp_path / "clean.safetensors"
    save_file(golden(LORA), source, METADATA)
    before = source.read_bytes()
    assert main(["inspect", str(source), "--strip", level, "--out", str(copy)]) == 0
    assert source.read_bytes() == before
    with safe_open(copy, "pt") as file:
        assert set(file.metadata()) == KEPT[level]
        assert json.loads(file.metadata()["lora_adapter_metadata"]) == {"transformer.r": 4}
    first, second = load_file(source), load_file(copy)
    assert list(first) == list(second)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert "ss_dataset_dirs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--strip", "all"), "--strip and --out belong together"),
        (("--overwrite",), "--overwrite is for the copy that --strip writes"),
        (("--strip", "all", "--out", "x", "--hashes"), "--hashes is for looking"),
    ],
)
def test_options_of_the_copy_belong_together(capsys, words, message):
    assert main(["inspect", str(golden_path(LORA)), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_file_is_never_stripped_in_place(tmp_path, capsys):
    source = tmp_path / "a.safetensors"
    save_file(golden(LORA), source, METADATA)
    assert main(["inspect", str(source), "--strip", "all", "--out", str(source), "--overwrite"]) == 2
    assert "would replace the file it is made of" in capsys.readouterr().err


def test_what_cannot_be_shown_is_refused(tmp_path, capsys):
    assert main(["inspect", str(golden_path("flux/dev_bfl.safetensors")), "--modules"]) == 2
    assert "--modules is for adapters" in capsys.readouterr().err
    save_file(golden(LORA), tmp_path / "a.safetensors")
    index = tmp_path / "a.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(golden(LORA), "a.safetensors")}))
    assert main(["inspect", str(index), "--hashes"]) == 2
    assert "name one of its shards" in capsys.readouterr().err
    assert main(["inspect", str(index), "--json"]) == 0


def test_a_number_format_that_is_not_known_is_copied(tmp_path):
    header = b'{"__metadata__":{"ss_tag":"me"},"a":{"dtype":"F4_NEW","shape":[8],"data_offsets":[0,4]}}'
    source, copy = tmp_path / "new.safetensors", tmp_path / "clean.safetensors"
    source.write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    assert main(["inspect", str(source), "--strip", "all", "--out", str(copy)]) == 0
    assert b"F4_NEW" in copy.read_bytes() and copy.read_bytes().endswith(b"1234") and b"me" not in copy.read_bytes()


def test_a_change_of_weights_alone_is_an_adapter(told, tmp_path, capsys):
    name = "diffusion_model.blocks.0.self_attn.q_proj"
    save_file({f"{name}.diff": torch.ones(4, 4)}, tmp_path / "full.safetensors")
    found = told(tmp_path / "full.safetensors")
    assert (found["what"], found["family"], found["modules"][0]["kind"]) == ("adapter", "anima", "full")
    save_file({"act.alpha": torch.ones(4), "act.weight": torch.ones(4)}, tmp_path / "other.safetensors")
    assert told(tmp_path / "other.safetensors")["what"] == "unknown"


def test_a_program_is_credited_with_every_kind_that_it_reads(told, tmp_path):
    """A LoKr of a joint matrix, as LyCORIS trains it under sd-scripts."""
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file({f"{name}.lokr_w1": torch.ones(12, 4), f"{name}.lokr_w2": torch.ones(12, 12)}, tmp_path / "a.safetensors")
    found = told(tmp_path / "a.safetensors")
    assert (found["family"], found["modules"][0]["kind"], len(found["modules"][0]["paths"])) == ("flux", "lokr", 3)
    assert set(found["unread"]) == {"kohya-ss/sd-scripts", "diffusers"}


def test_alphas_that_a_program_does_not_take_count_as_not_read(told, tmp_path):
    found = told(golden_path("anima/lora_comfyui.safetensors"))
    assert len(found["unread"]["diffusers"]) == len(found["modules"])
    plain = {name: value for name, value in golden("anima/lora_comfyui.safetensors").items() if "alpha" not in name}
    save_file(plain, tmp_path / "plain.safetensors")
    assert set(told(tmp_path / "plain.safetensors")["unread"]) == {"kohya-ss/sd-scripts"}
