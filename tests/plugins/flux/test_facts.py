"""Files in every layout, what is read from them, and what is refused with which words."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fixtures.tiny_flux import original_shapes, sizes_of
from tests.helpers import golden, golden_path, no_network
from tuner.core.config import facts_problems
from tuner.core.errors import UsageError
from tuner.core.files import TensorInfo, safetensors_header
from tuner.core.types import Placement
from tuner.plugins.flux import hooks
from tuner.plugins.flux.costs import PUBLIC
from tuner.plugins.flux.facts import detect, facts
from tuner.plugins.flux.load import diffusers_tensors
from tuner.plugins.flux.sizes import denoiser_sizes, diffusers_shapes
from tuner.plugins.flux.sources import count_tokens, files, resolve

PREFIX = "model.diffusion_model."


def header(tensors: dict[str, Any]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(dtype="F32", shape=tuple(getattr(value, "shape", value))) for name, value in tensors.items()
    }


# --- detection --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize(("name", "flavour"), [("dev_bfl", "dev"), ("dev_diffusers", "dev"), ("chroma_bfl", "chroma")])
def test_the_golden_files_are_recognised_without_hints(name, flavour, prefix):
    found = header({prefix + key: value for key, value in golden(f"flux/{name}.safetensors").items()})
    assert detect(found) == flavour
    sizes = denoiser_sizes(diffusers_shapes(found))
    wanted = json.loads(safetensors_header(golden_path(f"flux/{name}.safetensors")).metadata["config"])
    assert (sizes.width, sizes.heads, sizes.blocks, sizes.singles) == (48, 3, 2, 2)
    assert (sizes.in_channels, sizes.text_width, sizes.axes) == (64, 28, (4, 6, 6))
    assert sizes.pooled_width == wanted.get("vec_in_dim", wanted.get("pooled_projection_dim"))
    if sizes.approximator is not None:
        assert (sizes.approximator.channels, sizes.approximator.width, sizes.approximator.layers) == (16, 32, 2)


def test_without_guidance_it_is_schnell():
    tensors = {key: value for key, value in golden("flux/dev_bfl.safetensors").items() if "guidance_in" not in key}
    assert detect(header(tensors)) == "schnell"


@pytest.mark.parametrize("flavour", ["dev", "schnell", "chroma"])
def test_public_sizes_are_read_back(flavour):
    found = header(original_shapes(PUBLIC[flavour]))
    assert detect(found) == flavour
    assert denoiser_sizes(diffusers_shapes(found)) == PUBLIC[flavour]


@pytest.mark.parametrize(("flavour", "parameters"), [("dev", 11.90e9), ("schnell", 11.89e9), ("chroma", 8.90e9)])
def test_the_public_sizes_have_the_published_numbers_of_parameters(flavour, parameters):
    from tuner.plugins.flux.denoiser import build

    with torch.device("meta"):
        model = build(PUBLIC[flavour])
    assert sum(each.numel() for each in model.parameters()) == pytest.approx(parameters, rel=1e-3)


def test_pruned_models_have_the_depth_of_their_file():
    sizes = denoiser_sizes(diffusers_shapes(header(original_shapes(sizes_of("dev", blocks=3, singles=1)))))
    assert (sizes.blocks, sizes.singles) == (3, 1)


@pytest.mark.parametrize(
    "keys",
    [
        ["joint_blocks.0.x_block.attn.qkv.weight"],
        ["double_blocks.0.img_attn.qkv.weight", "double_stream_modulation_img.lin.weight"],
        ["transformer_blocks.0.attn.add_k_proj.bias", "pos_embed.pos_embed"],
        [],
    ],
)
def test_other_families_are_not_ours(keys):
    found = header(dict.fromkeys(keys, (2, 2)))
    assert detect(found) is None
    with pytest.raises(UsageError, match=r"not a FLUX\.1 or Chroma"):
        diffusers_shapes(found)


def test_scaled_float8_is_refused_in_words():
    found = header({**golden("flux/dev_bfl.safetensors"), "img_in.scale_weight": torch.ones(())})
    with pytest.raises(UsageError, match="scaled 8-bit"):
        diffusers_shapes(found)


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def all_in_one(tiny, tmp_path) -> dict[str, Any]:
    """One file with everything, and the tokenizers' folders."""
    model = tiny("dev")
    tensors = {PREFIX + name: value for name, value in load_file(model["path"]).items()}
    for name, prefix in (("clip_l", "text_encoders.clip_l.transformer."), ("t5", "text_encoders.t5xxl.transformer.")):
        stored = load_file(model["text_encoders"][name]["path"])
        tensors |= {prefix + key: value for key, value in stored.items()}
    tensors |= {f"vae.{name}": value for name, value in load_file(model["vae"]["path"]).items()}
    save_file(tensors, tmp_path / "all.safetensors")
    return {"family": "flux", "path": str(tmp_path / "all.safetensors"), "tokenizers": model["tokenizers"]}


@pytest.fixture
def folder(tiny, tmp_path) -> dict[str, Any]:
    """A folder as diffusers saves it, the transformer in four shards."""
    import shutil

    from tuner.core.compute.autoencoder import autoencoder_names

    model = tiny("dev")
    tensors = dict(diffusers_tensors(load_file(model["path"]).items()))
    names = sorted(tensors)
    (tmp_path / "transformer").mkdir()
    index: dict[str, str] = {}
    for number in range(4):
        shard = f"diffusion_pytorch_model-0000{number + 1}-of-00004.safetensors"
        part = {name: tensors[name].contiguous() for name in names[number::4]}
        save_file(part, tmp_path / "transformer" / shard)
        index |= dict.fromkeys(part, shard)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"axes_dims_rope": [4, 6, 6]}))
    for name, place, tokenizer in (("clip_l", "text_encoder", "tokenizer"), ("t5", "text_encoder_2", "tokenizer_2")):
        (tmp_path / place).mkdir()
        shutil.copy(model["text_encoders"][name]["path"], tmp_path / place / "model.safetensors")
        shutil.copytree(model["tokenizers"][name]["path"], tmp_path / tokenizer)
    (tmp_path / "vae").mkdir()
    stored = load_file(model["vae"]["path"])
    vae = {name: stored[old] for name, old in autoencoder_names(stored).items()}
    save_file(vae, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    return {"family": "flux", "path": str(tmp_path)}


def state(model: dict[str, Any], run_config) -> dict[str, torch.Tensor]:
    config = run_config(model)
    models = hooks.load_models(config, facts(config), ["denoiser", "clip_l", "t5", "vae"], Placement())
    parts = {"denoiser": models.denoiser, "vae": models.vae, **models.text_encoders}
    tensors = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    assert not any(value.is_meta for value in tensors.values())
    assert set(models.tokenizers) == {"clip_l", "t5"}
    return tensors


@pytest.mark.parametrize("layout", ["all_in_one", "folder"])
def test_every_layout_loads_to_the_same_model(layout, tiny, run_config, request):
    wanted, found = state(tiny("dev"), run_config), state(request.getfixturevalue(layout), run_config)
    assert set(wanted) == set(found)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("layout", ["all_in_one", "folder"])
def test_loading_opens_no_connection(layout, run_config, request, monkeypatch):
    no_network(monkeypatch)
    assert state(request.getfixturevalue(layout), run_config)


def test_every_file_that_makes_a_component_is_named(folder, tiny, run_config):
    found = {name: {path.name for path in paths} for name, paths in files(run_config(folder)).items()}
    assert len(found["denoiser"]) == 6
    assert {"model.safetensors", "tokenizer.json"} <= found["clip_l"]
    single = files(run_config(tiny("dev")))
    assert [path.name for path in single["vae"]] == ["ae.safetensors"]


def test_chroma_in_a_folder_takes_its_one_encoder_from_the_first_place(tiny, run_config, tmp_path):
    import shutil

    model = tiny("chroma")
    for source, place in ((model["path"], "transformer"), (model["vae"]["path"], "vae"),
                          (model["text_encoders"]["t5"]["path"], "text_encoder")):  # fmt: skip
        (tmp_path / place).mkdir()
        shutil.copy(source, tmp_path / place / "model.safetensors")
    shutil.copytree(model["tokenizers"]["t5"]["path"], tmp_path / "tokenizer")
    found = resolve(run_config({"family": "flux", "path": str(tmp_path)}))
    assert found.weights["t5"].parent.name == "text_encoder"
    assert set(found.tokenizers) == {"t5"}


def test_tokens_are_counted_before_any_cutting(tiny, run_config):
    counters = count_tokens(run_config(tiny("dev")))
    assert counters["t5"](["a red cat"]) == [4]
    assert counters["clip_l"]([""]) == [2]


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (("text_encoders", "t5"), r"t5 weights are not named.*model\.text_encoders\.t5\.path"),
        (("text_encoders", "clip_l"), r"clip_l weights are not named"),
        (("tokenizers", "clip_l"), r"cannot fetch openai/clip-vit-large-patch14.*model\.tokenizers\.clip_l\.path"),
        (("vae",), r"vae weights are not named"),
    ],
)
def test_what_is_absent_is_named_with_the_key_that_brings_it(tiny, run_config, tmp_path, monkeypatch, missing, words):
    import copy
    import shutil

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = copy.deepcopy(tiny("dev")) | {"download_dir": str(tmp_path)}
    # Away from the folders that lie beside the tiny model's files.
    for name in ("clip_l", "t5"):
        place = tmp_path / name
        place.mkdir()
        model["text_encoders"][name]["path"] = shutil.copy(model["text_encoders"][name]["path"], place)
    place = model
    for key in missing[:-1]:
        place = place[key]
    del place[missing[-1]]
    with pytest.raises(UsageError, match="(?s)" + words):
        resolve(run_config(model))


def test_a_hub_id_is_fetched_by_folder(monkeypatch, tiny, run_config):
    """The same weights lie in the repository once more as single files."""
    from fnmatch import fnmatch

    asked = {}

    def snapshot(repo, **arguments):
        asked.update(arguments, repo=repo)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(UsageError, match="hf download owner/flux"):
        resolve(run_config(tiny() | {"path": "owner/flux", "subfolder": "other"}))
    fetched = ("transformer/a.safetensors", "text_encoder_2/a.safetensors", "tokenizer/vocab.json", "other/a.sft")
    assert all(any(fnmatch(name, pattern) for pattern in asked["allow_patterns"]) for name in fetched)
    assert not any(fnmatch("flux1-dev.safetensors", pattern) for pattern in asked["allow_patterns"])


def test_a_variant_is_taken_for_every_part_that_has_it(folder, run_config):
    import shutil
    from pathlib import Path

    root = Path(folder["path"])
    for place, name in (("transformer", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")):
        tensors = {}
        for file in sorted((root / place).glob("*.safetensors")):
            tensors |= load_file(file)
        save_file(tensors, root / place / f"{name}.fp16.safetensors")
    shutil.copy(root / "text_encoder/model.safetensors", root / "text_encoder/model.bf16.safetensors")
    found = resolve(run_config({**folder, "variant": "fp16"})).weights
    assert {name: path.name for name, path in found.items()} == {
        "denoiser": "diffusion_pytorch_model.fp16.safetensors",
        "clip_l": "model.safetensors",
        "t5": "model.safetensors",
        "vae": "diffusion_pytorch_model.fp16.safetensors",
    }


def test_missing_and_added_tensors_are_named(tiny, run_config, tmp_path):
    model = tiny("dev")
    tensors = load_file(model["path"])
    del tensors["single_blocks.1.linear2.bias"]
    save_file(tensors, tmp_path / "short.safetensors")
    config = run_config({**model, "path": str(tmp_path / "short.safetensors")})
    with pytest.raises(UsageError, match=r"single_transformer_blocks\.1\.proj_out\.bias"):
        hooks.load_models(config, facts(config), ["denoiser"], Placement())
    save_file({**load_file(model["path"]), "surplus.weight": torch.ones(2)}, tmp_path / "long.safetensors")
    with pytest.raises(UsageError, match=r"unknown tensor surplus\.weight"):
        facts(run_config({**model, "path": str(tmp_path / "long.safetensors")}))


# --- what the configuration may say -----------------------------------------------------------------------------------


def test_flavours_differ_in_what_they_declare(opened):
    declared = {}
    for flavour in ("dev", "schnell", "chroma"):
        config, found = opened(flavour)
        declared[flavour] = (
            found.max_tokens["t5"], found.guidance_input, found.sample.steps, found.sample.shift,
            config.noise.timesteps, config.guidance.embedded, found.architecture,
        )  # fmt: skip
    assert declared == {
        "dev": (512, True, 20, "auto", "flux_shift", 1.0, "flux-1-dev"),
        "schnell": (256, False, 4, 1.0, "sigmoid", None, "flux-1-schnell"),
        "chroma": (512, False, 26, "auto", "sigmoid", None, "chroma"),
    }


@pytest.mark.parametrize(
    ("flavour", "sections", "words"),
    [
        ("dev", {"model": {"flavour": "schnell"}}, "not of flavour 'schnell'"),
        ("chroma", {"text_encoder": {"mask_padding": {"t5": False}}}, "Chroma needs the mask"),
        ("dev", {"text_encoder": {"mask_padding": {"t5": True}, "zero_padding": True}}, "zero_padding has no effect"),
        ("dev", {"text_encoder": {"max_tokens": {"clip_l": 78}}}, "CLIP cannot take 78 tokens"),
    ],
)
def test_contradictions_are_refused(opened, tiny, flavour, sections, words):
    if "model" in sections:
        sections = {**sections, "model": {**tiny(flavour), **sections["model"]}}
    with pytest.raises(UsageError, match=words):
        opened(flavour, **sections)


@pytest.mark.parametrize(
    ("flavour", "sections", "words"),
    [
        ("schnell", {"guidance": {"embedded": 2.0}}, "no embedded guidance"),
        ("chroma", {"guidance": {"embedded": [0, 4]}}, "no embedded guidance"),
        ("schnell", {"sample": {"embedded_guidance": 2.0}}, "no embedded guidance"),
        ("dev", {"text_encoder": {"mask_padding": {"clip": True}}}, "this model has no 'clip'"),
        ("chroma", {"train": {"components": ["clip_l"]}}, "no 'clip_l'"),
        ("chroma", {"text_encoder": {"max_tokens": {"clip_l": 77}}}, "no 'clip_l'"),
        ("dev", {"text_encoder": {"max_tokens": {"t5xxl": 512}}}, "no 't5xxl'"),
        ("dev", {"latents": {"chunk_size": 32}}, "cannot work in bands"),
    ],
)
def test_options_that_the_flavour_has_no_use_for_are_refused(opened, flavour, sections, words):
    config, found = opened(flavour, **sections)
    assert any(words in problem.what for problem in facts_problems(config, found))


def test_chroma_refuses_clip_files(tiny, run_config):
    model = {**tiny("chroma"), "text_encoders": tiny("dev")["text_encoders"]}
    with pytest.raises(UsageError, match="Chroma does not use CLIP"):
        resolve(run_config(model))


def test_variants_that_read_more_than_the_image_are_refused(tiny, run_config, tmp_path):
    model = tiny("dev")
    tensors = load_file(model["path"])
    tensors["img_in.weight"] = torch.zeros(48, 384)
    save_file(tensors, tmp_path / "fill.safetensors")
    with pytest.raises(UsageError, match="reads more than the image"):
        facts(run_config({**model, "path": str(tmp_path / "fill.safetensors")}))


def test_encoders_of_another_width_are_refused(tiny, run_config, tmp_path):
    from tests.fixtures.tiny_parts import random_tensors, t5_shapes

    save_file(random_tensors(t5_shapes(width=32), torch.Generator()), tmp_path / "t5.safetensors")
    model = {**tiny("dev")}
    model["text_encoders"] = {**model["text_encoders"], "t5": {"path": str(tmp_path / "t5.safetensors")}}
    with pytest.raises(UsageError, match="do not fit each other"):
        facts(run_config(model))
