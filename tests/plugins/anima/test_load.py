"""Every layout of the weight files gives the same model, and every wrong file is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tuner.core.config import RunConfig
from tuner.core.errors import UsageError
from tuner.core.types import Models, Placement
from tuner.plugins.anima import hooks, names
from tuner.plugins.anima.facts import facts
from tuner.plugins.anima.sources import files

Configure = Callable[..., RunConfig]


def tensors_of(model: dict[str, Any]) -> dict[str, Tensor]:
    return {key.removeprefix("net."): value for key, value in load_file(model["path"]).items()}


def without(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if part not in key}


def load(config: RunConfig, *components: str, **placement: Any) -> Models:
    return hooks.load_models(config, components or ("denoiser", "llm_adapter"), Placement(**placement))


def assert_same(models: Models, others: Models) -> None:
    assert models.denoiser is not None
    assert others.denoiser is not None
    pairs = (
        (models.denoiser, others.denoiser),
        (models.text_encoders["llm_adapter"], others.text_encoders["llm_adapter"]),
    )
    for one, other in pairs:
        expected = other.state_dict()
        assert list(one.state_dict()) == list(expected)
        for name, value in one.state_dict().items():
            assert torch.equal(value, expected[name]), name


@pytest.fixture(scope="module")
def expected(tiny: dict[str, Any], run_config: Configure) -> Models:
    return load(run_config(tiny))


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "net.", "model.diffusion_model."])
def test_key_prefixes_and_position_buffers_make_no_difference(
    tiny: dict[str, Any], run_config: Configure, expected: Models, tmp_path: Path, prefix: str
) -> None:
    tensors = {f"{prefix}{key}": value for key, value in tensors_of(tiny).items() if "pos_embedder" not in key}
    if prefix == "model.diffusion_model.":
        tensors["text_encoders.qwen3_06b.transformer.model.norm.weight"] = torch.zeros(2)
        tensors["vae.conv1.bias"] = torch.zeros(2)
    save_file(tensors, tmp_path / "anima.safetensors")
    assert_same(load(run_config({**tiny, "path": str(tmp_path / "anima.safetensors")})), expected)


def test_reading_without_mapping_gives_the_same_model(
    tiny: dict[str, Any], run_config: Configure, expected: Models
) -> None:
    assert_same(load(run_config({**tiny, "mmap": False})), expected)


@pytest.mark.parametrize("prefix", ["", "llm_adapter.", "net.llm_adapter."])
def test_a_separate_adapter_file_wins_over_the_one_inside(
    tiny: dict[str, Any], run_config: Configure, expected: Models, tmp_path: Path, prefix: str
) -> None:
    # sd-scripts documents this option and ignores it.
    inside = {key: value for key, value in tensors_of(tiny).items() if key.startswith("llm_adapter.")}
    tensors = {prefix + key.removeprefix("llm_adapter."): value + 1 for key, value in inside.items()}
    save_file(tensors, tmp_path / "adapter.safetensors")
    config = run_config({**tiny, "llm_adapter": {"path": str(tmp_path / "adapter.safetensors")}})
    adapter = load(config, "llm_adapter").text_encoders["llm_adapter"].state_dict()
    for name, value in expected.text_encoders["llm_adapter"].state_dict().items():
        assert torch.equal(adapter[name], value + 1), name


def test_the_diffusers_layout_needs_nothing_but_its_folder(
    tiny: dict[str, Any], run_config: Configure, expected: Models, tmp_path: Path
) -> None:
    folder = diffusers_folder(tiny, tmp_path)
    config = run_config({"family": "anima", "path": str(folder)})
    assert_same(load(config), expected)
    assert facts(config).files["llm_adapter"][0].endswith("text_conditioner/diffusion_pytorch_model.safetensors")
    assert set(load(config, "qwen3", "vae").tokenizers) == {"qwen3", "t5"}


def test_shards_with_an_index_are_one_model(
    tiny: dict[str, Any], run_config: Configure, expected: Models, tmp_path: Path
) -> None:
    folder = diffusers_folder(tiny, tmp_path)
    whole = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    keys = sorted(tensors)
    places = {}
    for number, part in enumerate((keys[::2], keys[1::2]), 1):
        name = f"diffusion_pytorch_model-{number:05}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, whole.parent / name)
        places |= dict.fromkeys(part, name)
    index = whole.parent / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = run_config({"family": "anima", "path": str(folder)})
    assert_same(load(config), expected)
    assert len(facts(config).files["denoiser"]) == 3


def test_a_file_variant_is_chosen_by_name(
    tiny: dict[str, Any], run_config: Configure, expected: Models, tmp_path: Path
) -> None:
    folder = diffusers_folder(tiny, tmp_path)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    (folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(file.read_bytes())
    file.write_bytes(b"")
    assert_same(load(run_config({"family": "anima", "path": str(folder), "variant": "fp16"})), expected)
    with pytest.raises(UsageError, match="variant 'bf16'"):
        load(run_config({"family": "anima", "path": str(folder), "variant": "bf16"}))


def diffusers_folder(model: dict[str, Any], folder: Path) -> Path:
    """The tiny model as a folder of the diffusers layout."""
    tensors = without(tensors_of(model), "pos_embedder")
    adapter = {key.removeprefix("llm_adapter."): value for key, value in tensors.items() if "llm_adapter" in key}
    renamed = {}
    for key, value in without(tensors, "llm_adapter").items():
        module, _, leaf = key.rpartition(".")
        other = names.to_diffusers(module)
        assert other is not None
        renamed[f"{other}.{leaf}"] = value
    for name, content in (("transformer", renamed), ("text_conditioner", adapter)):
        (folder / name).mkdir()
        save_file(content, folder / name / "diffusion_pytorch_model.safetensors")
    source = Path(model["text_encoders"]["qwen3"]["path"])
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder" / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    for name, origin in (("tokenizer", source), ("t5_tokenizer", Path(model["tokenizers"]["t5"]["path"]))):
        (folder / name).mkdir()
        (folder / name / "tokenizer.json").write_bytes((origin / "tokenizer.json").read_bytes())
    (folder / "vae").mkdir()
    (folder / "vae" / "vae.safetensors").write_bytes(Path(model["vae"]["path"]).read_bytes())
    return folder


def test_the_name_table_is_that_of_diffusers_own_classes(
    tiny: dict[str, Any], run_config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import CosmosTransformer3DModel
    from diffusers.models.transformers import transformer_cosmos

    # Its padding mask wants torchvision's nearest resize; the mask is all zero here, so its size is all that matters.
    resize = SimpleNamespace(
        functional=SimpleNamespace(resize=lambda mask, size, **_: torch.zeros(*mask.shape[:2], *size)),
        InterpolationMode=SimpleNamespace(NEAREST="nearest"),
    )
    monkeypatch.setattr(transformer_cosmos, "transforms", resize, raising=False)
    transformer = CosmosTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=3, attention_head_dim=32, num_layers=2, mlp_ratio=4.0,
        text_embed_dim=64, adaln_lora_dim=16, max_size=(128, 240, 240), patch_size=(1, 2, 2),
        rope_scale=(1.0, 4.0, 4.0), concat_padding_mask=True, extra_pos_embed_type=None,
    )  # fmt: skip
    folder = diffusers_folder(tiny, tmp_path)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    transformer.load_state_dict(load_file(file), strict=True)
    models = load(run_config({"family": "anima", "path": str(folder)}))
    assert models.denoiser is not None
    generator = torch.Generator().manual_seed(0)
    latents, context = torch.randn(2, 16, 8, 12, generator=generator), torch.randn(2, 512, 64, generator=generator)
    sigmas = torch.tensor([0.2, 0.9])
    with torch.no_grad():
        ours = models.denoiser(latents, sigmas, context)
        theirs = transformer(
            latents[:, :, None], sigmas, context, padding_mask=torch.zeros(1, 1, 8, 12), return_dict=False
        )[0][:, :, 0]
    assert (ours - theirs).abs().max() <= 3e-5


# --- placement --------------------------------------------------------------------------------------------------------


def test_components_are_frozen_in_eval_mode_and_in_the_asked_dtype(tiny: dict[str, Any], run_config: Configure) -> None:
    models = load(
        run_config(tiny), "denoiser", "llm_adapter", "qwen3", "vae",
        dtypes={"denoiser": "bfloat16", "llm_adapter": "bfloat16", "qwen3": "bfloat16", "vae": "float32"},
    )  # fmt: skip
    modules = {"denoiser": models.denoiser, "vae": models.vae, **models.text_encoders}
    assert set(modules) == {"denoiser", "vae", "qwen3", "llm_adapter"}
    for name, module in modules.items():
        assert module is not None
        assert not module.training
        assert not any(parameter.requires_grad or parameter.is_meta for parameter in module.parameters())
        dtype = torch.float32 if name == "vae" else torch.bfloat16
        assert {parameter.dtype for parameter in module.parameters()} == {dtype}


def test_only_the_named_components_are_loaded(tiny: dict[str, Any], run_config: Configure) -> None:
    config = run_config(tiny)
    vae = load(config, "vae")
    assert vae.denoiser is None
    assert not vae.text_encoders
    assert not vae.tokenizers
    alone = load(config, "tokenizers")
    assert set(alone.tokenizers) == {"qwen3", "t5"}
    assert not alone.text_encoders


def test_changing_a_loaded_model_leaves_its_file_alone(tiny: dict[str, Any], run_config: Configure) -> None:
    before = Path(tiny["path"]).read_bytes()
    models = load(run_config(tiny))
    assert models.denoiser is not None
    with torch.no_grad():
        for parameter in models.denoiser.parameters():
            parameter.zero_()
    assert Path(tiny["path"]).read_bytes() == before


def test_a_single_encoder_file_loads_with_or_without_prefix_and_head(
    tiny: dict[str, Any], run_config: Configure, tmp_path: Path
) -> None:
    folder = Path(tiny["text_encoders"]["qwen3"]["path"])
    tensors = {key.removeprefix("model."): value for key, value in load_file(folder / "model.safetensors").items()}
    save_file({**tensors, "lm_head.weight": torch.zeros(2, 2)}, tmp_path / "qwen.safetensors")
    model = {
        **tiny,
        "text_encoders": {"qwen3": {"path": str(tmp_path / "qwen.safetensors")}},
        "tokenizers": {**tiny["tokenizers"], "qwen3": {"path": str(folder)}},
    }
    one = load(run_config(model), "qwen3").text_encoders["qwen3"].state_dict()
    other = load(run_config(tiny), "qwen3").text_encoders["qwen3"].state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


# --- wrong files ------------------------------------------------------------------------------------------------------


def wrong(tiny: dict[str, Any], run_config: Configure, tmp_path: Path, tensors: dict[str, Tensor]) -> str:
    save_file(tensors, tmp_path / "anima.safetensors")
    config = run_config({**tiny, "path": str(tmp_path / "anima.safetensors")})
    with pytest.raises(UsageError) as caught:
        facts(config)
        load(config)
    assert str(tmp_path / "anima.safetensors") in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("key", ["blocks.1.mlp.layer2.weight", "t_embedding_norm.weight", "final_layer.linear.weight"])
def test_a_missing_key_is_named(tiny: dict[str, Any], run_config: Configure, tmp_path: Path, key: str) -> None:
    assert key in wrong(tiny, run_config, tmp_path, without(tensors_of(tiny), key))


def test_an_unknown_key_is_named(tiny: dict[str, Any], run_config: Configure, tmp_path: Path) -> None:
    tensors = {**tensors_of(tiny), "blocks.0.mlp.layer3.weight": torch.zeros(2)}
    assert "unknown: blocks.0.mlp.layer3.weight" in wrong(tiny, run_config, tmp_path, tensors)


def test_a_gap_in_the_block_numbers_is_an_error(tiny: dict[str, Any], run_config: Configure, tmp_path: Path) -> None:
    tensors = {key.replace("blocks.1.", "blocks.2."): value for key, value in tensors_of(tiny).items()}
    assert "blocks.1" in wrong(tiny, run_config, tmp_path, tensors)


def test_a_model_without_adapter_asks_for_one(tiny: dict[str, Any], run_config: Configure, tmp_path: Path) -> None:
    message = wrong(tiny, run_config, tmp_path, without(tensors_of(tiny), "llm_adapter"))
    assert "model.llm_adapter.path" in message


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("double_blocks.0.img_attn.qkv.weight", "Flux"),
        ("transformer_blocks.0.attn.to_q.weight single_transformer_blocks.0.attn.to_q.weight", "Flux"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("model.diffusion_model.input_blocks.0.0.weight", "Stable Diffusion 1"),
        ("transformer_blocks.0.img_mod.1.weight", "Qwen-Image"),
        ("blocks.0.self_attn.q.weight", "Wan"),
        ("model.embed_tokens.weight", "a text encoder"),
        ("decoder.conv1.weight", "a VAE"),
        ("lora_unet_blocks_0_self_attn_q_proj.lora_down.weight", "LoRA"),
        ("something.else", None),
    ],
)
def test_a_file_of_another_family_is_told_by_name(
    tiny: dict[str, Any], run_config: Configure, tmp_path: Path, key: str, family: str | None
) -> None:
    message = wrong(tiny, run_config, tmp_path, {name: torch.zeros(2, 2) for name in key.split()})
    with pytest.raises(UsageError) as caught:
        files(run_config({**tiny, "path": str(tmp_path / "anima.safetensors")}))
    assert str(caught.value) == message
    assert "not an Anima model" in message
    assert family is None or f"it looks like {'' if family.startswith('a ') else 'a'}" in message
    assert family is None or family in message


def test_a_text_encoder_of_another_width_does_not_fit(
    tiny: dict[str, Any], run_config: Configure, tmp_path: Path
) -> None:
    tensors = tensors_of(tiny)
    for index in range(2):
        for name in ("k_proj", "v_proj"):
            key = f"llm_adapter.blocks.{index}.cross_attn.{name}.weight"
            tensors[key] = torch.zeros(64, 80)
    save_file(tensors, tmp_path / "anima.safetensors")
    with pytest.raises(UsageError, match="do not fit each other"):
        facts(run_config({**tiny, "path": str(tmp_path / "anima.safetensors")}))


def test_the_denoiser_file_is_no_text_encoder(tiny: dict[str, Any], run_config: Configure) -> None:
    model = {**tiny, "text_encoders": {"qwen3": {"path": tiny["path"]}}}
    model["tokenizers"] = {**tiny["tokenizers"], "qwen3": tiny["text_encoders"]["qwen3"]}
    with pytest.raises(UsageError, match="not a Qwen3 text encoder"):
        facts(run_config(model))


@pytest.mark.parametrize("name", ["path", "vae", "qwen3", "t5"])
def test_a_missing_path_is_named_with_its_key(tiny: dict[str, Any], run_config: Configure, name: str) -> None:
    absent = {"path": "/absent/file.safetensors"}
    changed = {
        "path": absent,
        "vae": {"vae": absent},
        "qwen3": {"text_encoders": {"qwen3": absent}},
        "t5": {"tokenizers": {"t5": absent}},
    }[name]
    with pytest.raises(UsageError, match="no such file") as caught:
        facts(run_config({**tiny, **changed}))
    assert re.search(r"model\..*path", caught.value.where or "")


@pytest.mark.parametrize("key", ["subfolder", "variant", "revision"])
def test_a_key_that_one_local_file_does_not_use_is_refused(
    tiny: dict[str, Any], run_config: Configure, key: str
) -> None:
    with pytest.raises(UsageError, match=f"model.{key} has no effect"):
        files(run_config(tiny | {key: "x"}))


def test_parts_that_are_not_named_are_asked_for(tiny: dict[str, Any], run_config: Configure) -> None:
    with pytest.raises(UsageError, match="vae weights are not named") as caught:
        facts(run_config({key: value for key, value in tiny.items() if key != "vae"}))
    assert caught.value.fix == "set model.vae.path to a file, a folder or a hub id"


def test_a_folder_without_tokenizer_files_is_refused(
    tiny: dict[str, Any], run_config: Configure, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="no t5 tokenizer here"):
        facts(run_config({**tiny, "tokenizers": {"t5": {"path": str(tmp_path)}}}))


# --- hub --------------------------------------------------------------------------------------------------------------


def test_a_hub_id_without_network_gives_the_command_to_run(
    tiny: dict[str, Any], run_config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = {**tiny, "path": "owner/name", "revision": "main", "download_dir": str(tmp_path)}
    with pytest.raises(UsageError, match="cannot fetch owner/name") as caught:
        facts(run_config(model))
    assert caught.value.where == "model.path"
    assert "hf download owner/name --include '*.safetensors'" in (caught.value.fix or "")
    assert f"--revision main --cache-dir {tmp_path}" in (caught.value.fix or "")


def test_a_hub_id_is_read_from_the_download_folder(
    tiny: dict[str, Any], run_config: Configure, expected: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    diffusers_folder(tiny, snapshot)
    model = {"family": "anima", "path": "owner/name", "download_dir": str(tmp_path)}
    assert_same(load(run_config(model)), expected)
    (snapshot / "split").mkdir()
    (snapshot / "split" / "dit.safetensors").write_bytes(Path(tiny["path"]).read_bytes())
    inside = {**tiny, "path": "owner/name/split/dit.safetensors", "download_dir": str(tmp_path)}
    assert_same(load(run_config(inside)), expected)


def test_tokenizers_that_are_nowhere_are_fetched_once_or_explained(
    tiny: dict[str, Any], run_config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = {**tiny, "tokenizers": {}, "download_dir": str(tmp_path)}
    with pytest.raises(UsageError, match="cannot fetch google-t5/t5-base") as caught:
        facts(run_config(model))
    assert caught.value.where == "model.tokenizers.t5.path"
    assert "hf download google-t5/t5-base --include 'tokenizer.json'" in (caught.value.fix or "")
