"""Models in other layouts, through the command; adapters are converted in tests of their formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fixtures.tiny_parts import clip_shapes, random_tensors, t5_shapes, vae_shapes
from tests.helpers import golden, golden_path
from tuner.cli.main import main
from tuner.core.files import safetensors_header

DEV = "flux/dev_bfl.safetensors"


def convert(source: Path | str, target: Path, to: str, *words: str, model: str) -> Path:
    assert main(["convert", str(source), str(target), "--to", to, *words, "--model", model]) == 0
    return target


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype and torch.equal(value, second[name]), name


def test_both_published_layouts_come_out_bit_by_bit(tmp_path):
    folder = convert(golden_path(DEV), tmp_path / "folder", "diffusers", model="flux")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    same(load_file(file), golden("flux/dev_diffusers.safetensors"))
    same(load_file(convert(folder, tmp_path / "one.safetensors", "single", model="flux")), golden(DEV))


@pytest.mark.parametrize(
    ("model", "name"), [("flux", "flux/chroma_bfl"), ("sd3", "sd3/sd35m_weights_f16"), ("sd3", "sd3/sd3m_weights_f16")]
)
def test_there_and_back_changes_no_bit(tmp_path, model, name):
    folder = convert(golden_path(f"{name}.safetensors"), tmp_path / "folder", "diffusers", model=model)
    back = convert(folder, tmp_path / "one.safetensors", "single", model=model)
    same(load_file(back), golden(f"{name}.safetensors"))


@pytest.mark.parametrize(
    "name",
    ["anima/e2e_weights", "anima/lora_comfyui", "flux/chroma_bfl", "flux/lora_diffusers", "sd3/sd3m_weights_f16"],
)
def test_the_model_is_that_of_the_file_unless_it_is_named(tmp_path, capsys, name):
    first, second = ("comfyui", "diffusers") if "lora" in name else ("diffusers", "single")
    if name.startswith("flux/lora"):
        first = "sd-scripts"
    made, again = tmp_path / "made", tmp_path / "again.safetensors"
    assert main(["convert", f"{golden_path(name)}.safetensors", str(made), "--to", first]) == 0
    assert main(["convert", str(made), str(again), "--to", second]) == 0
    capsys.readouterr()
    assert main(["inspect", str(again), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == name.partition("/")[0]


def test_a_file_of_no_known_model_needs_a_name(tmp_path, capsys):
    save_file({"strange.weight": torch.zeros(2, 2)}, tmp_path / "strange.safetensors")
    assert main(["convert", str(tmp_path / "strange.safetensors"), str(tmp_path / "out"), "--to", "single"]) == 2
    message = capsys.readouterr().err
    assert "which model is this file for?" in message and "add --model, one of: anima, flux, sd3" in message


def test_a_part_that_has_a_folder_of_its_own_returns_into_the_file(tmp_path, capsys):
    source = golden("anima/e2e_weights.safetensors")
    folder = convert(golden_path("anima/e2e_weights.safetensors"), tmp_path / "folder", "diffusers", model="anima")
    assert (folder / "text_conditioner" / "diffusion_pytorch_model.safetensors").is_file()
    denoiser = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    first = denoiser["transformer_blocks.0.attn1.to_q.weight"]
    assert torch.equal(first, source["net.blocks.0.self_attn.q_proj.weight"])
    assert "pos_embedder.seq" in capsys.readouterr().err
    back = convert(folder, tmp_path / "one.safetensors", "single", model="anima")
    # buffers are computed again by every loader
    same(load_file(back), {name: value for name, value in source.items() if "pos_embedder" not in name})


def test_separate_files_become_one_that_is_a_whole_model(tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    parts = {
        "clip_l": random_tensors(clip_shapes(width=20, layers=1, projection=20), generator),
        "clip_g": random_tensors(clip_shapes(width=20, layers=2, projection=20), generator),
        "t5": random_tensors(t5_shapes(width=24), generator),
        "vae": random_tensors(vae_shapes(), generator),
    }
    for name, tensors in parts.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    words = ("--with", *(f"{name}={tmp_path / name}.safetensors" for name in ("clip_l", "clip_g")))
    words += (str(tmp_path / "t5.safetensors"), str(tmp_path / "vae.safetensors"))
    base = golden_path("sd3/sd35m_weights_f16.safetensors")
    file = convert(base, tmp_path / "all.safetensors", "all-in-one", *words, model="sd3")
    prefixes = {
        "clip_l": "text_encoders.clip_l.transformer.", "clip_g": "text_encoders.clip_g.transformer.",
        "t5": "text_encoders.t5xxl.transformer.", "vae": "first_stage_model.",
    }  # fmt: skip
    wanted = {f"model.diffusion_model.{name}": value for name, value in golden(f"sd3/{base.name}").items()}
    for component, tensors in parts.items():
        wanted |= {prefixes[component] + name: value for name, value in tensors.items()}
    same(load_file(file), wanted)
    capsys.readouterr()
    assert main(["inspect", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told["parts"]) == {"denoiser", *parts} and not told["unmapped"]
    folder = convert(file, tmp_path / "folder", "diffusers", model="sd3")
    assert "components that this layout does not hold: vae" in capsys.readouterr().out
    for name, subfolder in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2"), ("t5", "text_encoder_3")):
        same(load_file(folder / subfolder / "model.safetensors"), parts[name])
    back = convert(folder, tmp_path / "back.safetensors", "all-in-one", model="sd3")
    same(load_file(back), {name: value for name, value in wanted.items() if "first_stage_model" not in name})


def test_a_dtype_changes_every_tensor(tmp_path):
    file = convert(golden_path(DEV), tmp_path / "half.safetensors", "single", "--dtype", "bf16", model="flux")
    same(load_file(file), {name: value.bfloat16() for name, value in golden(DEV).items()})


def test_eight_bits_are_for_the_matrices_of_blocks(tmp_path):
    file = convert(golden_path(DEV), tmp_path / "small.safetensors", "single", "--dtype", "fp8", model="flux")
    found, before = load_file(file), golden(DEV)
    assert found["double_blocks.0.img_attn.qkv.weight"].dtype == torch.float8_e4m3fn
    for name in ("img_in.weight", "final_layer.linear.weight", "double_blocks.0.img_attn.qkv.bias"):
        assert torch.equal(found[name], before[name])


def test_scaled_eight_bit_weights_keep_their_range(tmp_path):
    source = golden(DEV)
    large, small = "double_blocks.0.img_mlp.0.weight", "double_blocks.0.img_mlp.2.weight"
    source[large], source[small] = source[large] * 1e5, source[small] * 1e-5
    save_file(source, tmp_path / "wide.safetensors")
    words = ("--dtype", "fp8-scaled")
    file = convert(tmp_path / "wide.safetensors", tmp_path / "s.safetensors", "single", *words, model="flux")
    found = load_file(file)
    assert found["scaled_fp8"].dtype == torch.float8_e4m3fn and found["scaled_fp8"].shape == (2,)
    for name in (large, small):
        scale = found[name.replace(".weight", ".scale_weight")]
        assert scale.shape == () and scale.dtype == torch.float32
        value = found[name].float() * scale
        assert (value - source[name]).norm() < 0.04 * source[name].norm()
        assert found[name].float().abs().max() == 448
    scales = [name for name in found if name.endswith("scale_weight")]
    assert len(scales) == sum(value.dtype == torch.float8_e4m3fn for value in found.values()) - 1


@pytest.mark.parametrize(
    ("source", "words", "message"),
    [
        (DEV, ("--to", "comfyui"), "use one of: single, all-in-one, diffusers"),
        (DEV, ("--to", "single", "--with", "x"), "--with is for --to all-in-one"),
        ("flux/lora_sdscripts.safetensors", ("--to", "comfyui", "--dtype", "bf16"), "--dtype is for whole models"),
        ("sd3/sd3m_weights_f16.safetensors", ("--to", "single"), "holds no weights of this model"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, capsys, source, words, message):
    target = tmp_path / "new.safetensors"
    assert main(["convert", str(golden_path(source)), str(target), *words, "--model", "flux"]) == 2
    assert message in capsys.readouterr().err
    assert not target.exists()


def test_a_component_that_no_program_looks_for_in_one_file_is_refused(tmp_path, capsys):
    base, encoder = (str(golden_path(f"anima/{name}.safetensors")) for name in ("e2e_weights", "qwen3_weights"))
    words = ["convert", base, str(tmp_path / "all.safetensors"), "--to", "all-in-one", "--with", encoder]
    assert main([*words, "--model", "anima"]) == 2
    assert "this model has no layout with qwen3 in one file" in capsys.readouterr().err


def test_tensors_that_are_no_parameters_are_named(tmp_path, capsys):
    save_file(golden(DEV) | {"odd.weight": torch.ones(1)}, tmp_path / "odd.safetensors")
    same(
        load_file(convert(tmp_path / "odd.safetensors", tmp_path / "new.safetensors", "single", model="flux")),
        golden(DEV),
    )
    assert "were left out: odd.weight" in capsys.readouterr().err


def test_tensors_without_a_place_are_not_dropped(tmp_path, capsys):
    save_file(golden("flux/dev_diffusers.safetensors") | {"odd.weight": torch.ones(1)}, tmp_path / "odd.safetensors")
    words = ["convert", str(tmp_path / "odd.safetensors"), str(tmp_path / "one.safetensors"), "--to", "single"]
    assert main([*words, "--model", "flux"]) == 2
    assert "one of them is denoiser:odd.weight" in capsys.readouterr().err


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_no_source_is_replaced(tmp_path, capsys, overwrite):
    adapter, folder = tmp_path / "lora.safetensors", tmp_path / "model"
    adapter.write_bytes(golden_path("flux/lora_sdscripts.safetensors").read_bytes())
    convert(golden_path(DEV), folder, "diffusers", model="flux")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    for words in ([adapter, adapter, "--to", "diffusers"], [folder, folder, "--to", "diffusers", "--dtype", "bf16"]):
        assert main(["convert", *map(str, words), *overwrite, "--model", "flux"]) == 2
        assert "would replace" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == before


def test_an_existing_folder_is_filled_only_when_it_is_empty(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    convert(golden_path(DEV), tmp_path / "empty", "diffusers", model="flux")
    words = ["convert", str(golden_path(DEV)), str(tmp_path / "empty"), "--to", "diffusers", "--model", "flux"]
    assert main(words) == 2
    assert "the folder is not empty" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0


@pytest.mark.parametrize("dtype", ["fp16", "fp8"])
def test_values_beyond_a_number_format_are_refused(tmp_path, capsys, dtype):
    source = golden(DEV)
    source["double_blocks.0.img_mlp.0.weight"] *= 1e6
    save_file(source, tmp_path / "wide.safetensors")
    words = ["convert", str(tmp_path / "wide.safetensors"), str(tmp_path / "n.safetensors"), "--to", "single"]
    assert main([*words, "--dtype", dtype, "--model", "flux"]) == 2
    assert "double_blocks.0.img_mlp.0.weight has values that float" in capsys.readouterr().err
    assert not (tmp_path / "n.safetensors").exists()


def test_what_makes_steps_and_biases_is_not_in_eight_bits(tmp_path):
    words = ("--dtype", "fp8", "--to", "single", "--model", "anima")
    source, file = golden_path("anima/e2e_weights.safetensors"), tmp_path / "small.safetensors"
    assert main(["convert", str(source), str(file), *words]) == 0
    found = load_file(file)
    assert found["net.blocks.0.self_attn.q_proj.weight"].dtype == torch.float8_e4m3fn
    assert found["net.llm_adapter.blocks.0.mlp.0.weight"].dtype == torch.float8_e4m3fn
    assert found["net.t_embedder.1.linear_1.weight"].dtype == torch.float32


def test_encoders_beside_a_scaled_denoiser_stay_as_they_are(tmp_path):
    encoder = random_tensors(t5_shapes(width=24), torch.Generator().manual_seed(0))
    save_file(encoder, tmp_path / "t5.safetensors")
    words = ["--with", str(tmp_path / "t5.safetensors"), "--dtype"]
    base = golden_path("sd3/sd35m_weights_f16.safetensors")
    scaled = load_file(convert(base, tmp_path / "s.safetensors", "all-in-one", *words, "fp8-scaled", model="sd3"))
    plain = load_file(convert(base, tmp_path / "p.safetensors", "all-in-one", *words, "fp8", model="sd3"))
    start = "text_encoders.t5xxl.transformer."
    assert all(torch.equal(scaled[start + name], value) for name, value in encoder.items())
    assert scaled["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"].dtype == torch.float8_e4m3fn
    layer = f"{start}encoder.block.0.layer.0.SelfAttention"
    assert plain[f"{layer}.q.weight"].dtype == torch.float8_e4m3fn
    assert plain[f"{layer}.relative_attention_bias.weight"].dtype == torch.float32


def test_what_the_file_says_about_the_model_goes_with_it(tmp_path):
    told = {"modelspec.author": "ada", "modelspec.hash_sha256": "0x1", "format": "pt"}
    save_file(golden(DEV), tmp_path / "named.safetensors", told)
    folder = convert(tmp_path / "named.safetensors", tmp_path / "folder", "diffusers", model="flux")
    back = convert(folder, tmp_path / "back.safetensors", "single", model="flux")
    for file in (folder / "transformer" / "diffusion_pytorch_model.safetensors", back):
        assert safetensors_header(file).metadata == {"format": "pt", "modelspec.author": "ada"}


@pytest.mark.parametrize("formats", [{torch.uint16}, {torch.float8_e4m3fn, torch.float32}], ids=["unknown", "mixed"])
def test_a_number_format_that_cannot_be_converted_is_told(tmp_path, capsys, formats):
    source = golden("flux/dev_diffusers.safetensors")
    for name, dtype in zip(("to_q", "to_k"), sorted(formats, key=str), strict=False):
        key = f"transformer_blocks.0.attn.{name}.weight"
        source[key] = source[key].to(dtype)
    save_file(source, tmp_path / "odd.safetensors")
    words = ["convert", str(tmp_path / "odd.safetensors"), str(tmp_path / "n.safetensors"), "--to", "single"]
    assert main([*words, "--model", "flux"]) == 2
    assert "number format that cannot be converted" in capsys.readouterr().err


def test_tensors_stand_in_the_order_of_their_source(tmp_path):
    """Sets of names would order them anew in every process."""
    source = golden_path("anima/e2e_weights.safetensors")
    file = convert(source, tmp_path / "one.safetensors", "single", model="anima")
    assert list(safetensors_header(file)) == [name for name in safetensors_header(source) if "pos_embedder" not in name]


def test_a_file_that_is_not_the_named_component_is_refused(tmp_path, capsys):
    encoder = random_tensors(t5_shapes(width=24), torch.Generator().manual_seed(0))
    save_file(encoder, tmp_path / "t5.safetensors")
    words = ["--to", "all-in-one", "--with", f"clip_l={tmp_path / 't5.safetensors'}", "--model", "sd3"]
    base = str(golden_path("sd3/sd35m_weights_f16.safetensors"))
    assert main(["convert", base, str(tmp_path / "all.safetensors"), *words]) == 2
    assert "holds no clip_l of this model" in capsys.readouterr().err
