"""What is read from the weights, and what is refused before anything is loaded."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import no_network
from tests.plugins.sd3.golden_models import golden_file
from tuner.core.errors import UsageError
from tuner.core.files import TensorInfo, weight_header
from tuner.core.registry import open_run
from tuner.plugins.sd3.facts import detect, facts
from tuner.plugins.sd3.names import denoiser_modules
from tuner.plugins.sd3.sizes import denoiser_sizes


@pytest.mark.parametrize(("name", "flavour", "dual"), (("sd3m", "medium", ()), ("sd35m", "3.5-medium", (0,))))
def test_the_golden_files_tell_their_sizes_without_hints(tmp_path, name, flavour, dual):
    path = golden_file(name, "weights_f16")
    prefixed = {f"model.diffusion_model.{key}": value for key, value in load_file(path).items()}
    save_file(prefixed | {"first_stage_model.x": torch.zeros(1)}, tmp_path / "prefixed.safetensors")
    for header in (weight_header(path), weight_header(tmp_path / "prefixed.safetensors")):
        sizes = denoiser_sizes(header)
        assert (sizes.width, sizes.heads, sizes.blocks, sizes.side) == (128, 2, 2, 10)
        assert (sizes.text_width, sizes.pooled_width, sizes.in_channels, sizes.out_channels) == (24, 20, 16, 16)
        assert (sizes.patch, sizes.dual) == (2, dual) and detect(header) == flavour


@pytest.mark.parametrize(
    ("flavour", "name"), (("sd3m", "medium"), ("sd35m", "3.5-medium"), ("sd35l", "3.5-large"))
)  # fmt: skip
@pytest.mark.parametrize("layout", ("all-in-one", "separate"))
def test_every_flavour_opens_from_every_layout(tiny, run_config, flavour, name, layout):
    run = open_run(run_config(tiny(flavour, layout)))
    assert run.facts.flavour == name
    assert run.facts.components == ("denoiser", "clip_l", "clip_g", "t5", "vae")
    assert run.config.loss.target == "clean" and run.config.noise.timesteps == "logit_normal"
    assert run.config.noise.truncate is True and run.config.latents.posterior == "sample"


@pytest.mark.parametrize("layout", ("all-in-one", "separate"))
def test_loading_opens_no_connection(tiny, run_config, monkeypatch, layout):
    no_network(monkeypatch)
    run = open_run(run_config(tiny("sd35m", layout)))
    models = run.model.load_models(run.facts.components)
    assert set(models.text_encoders) == set(models.tokenizers) == {"clip_l", "clip_g", "t5"}


def test_a_folder_in_the_layout_of_diffusers_serves_everything(tiny, run_config, tmp_path):
    separate = tiny("sd35l", "separate")
    source = Path(separate["path"]).parent
    root = tmp_path / "sd35"
    for name, folder, file in (
        ("denoiser", "transformer", "diffusion_pytorch_model"), ("vae", "vae", "diffusion_pytorch_model"),
        ("clip_l", "text_encoder", "model"), ("clip_g", "text_encoder_2", "model"), ("t5", "text_encoder_3", "model"),
    ):  # fmt: skip
        (root / folder).mkdir(parents=True)
        shutil.copy(source / f"{name}.safetensors", root / folder / f"{file}.safetensors")
    shutil.copytree(source / "clip_tokenizer", root / "tokenizer")
    shutil.copytree(source / "t5_tokenizer", root / "tokenizer_3")
    run = open_run(run_config({"family": "sd3", "path": str(root)}))
    models = run.model.load_models(run.facts.components)
    assert run.facts.flavour == "3.5-large"
    assert all(models.component(name) is not None for name in run.facts.components)


@pytest.mark.parametrize(
    ("flavour", "sections", "place"),
    (
        ("sd3m", {"model": {"scaled_pos_embed": True}}, "model.scaled_pos_embed"),
        ("sd35l", {"model": {"pos_embed_random_crop": 0.5}}, "model.pos_embed_random_crop"),
        ("sd3m", {"latents": {"chunk_size": 8}}, "latents.chunk_size"),
        ("sd3m", {"text_encoder": {"max_tokens": {"clip": 100}}}, "text_encoder.max_tokens.clip"),
        ("sd3m", {"text_encoder": {"max_tokens": {"qwen": 100}}}, "text_encoder.max_tokens"),
        ("sd3m", {"text_encoder": {"dropout": {"clip": 0.1}}}, "text_encoder.dropout.clip"),
        ("sd3m", {"train": {"components": ["vae"]}}, "train.components"),
        ("sd3m", {"model": {"flavour": "3.5-large"}}, "model.flavour"),
        ("sd3m", {"network": {"blocks": {"blocks": [2]}}}, "network.blocks"),
    ),
)
def test_what_does_not_fit_is_refused_by_its_key(tiny, run_config, flavour, sections, place):
    model = tiny(flavour) | sections.pop("model", {}) if "model" in sections else tiny(flavour)
    with pytest.raises(UsageError, match=place):
        run = open_run(run_config(model, **sections))
        run.model.build_network(run.model.load_models(["denoiser"]))


def test_parts_of_different_models_are_refused(tiny, run_config):
    model = tiny("sd3m", "separate")
    encoders = model["text_encoders"] | {"clip_g": model["text_encoders"]["clip_l"]}
    with pytest.raises(UsageError, match="clip_g"):
        facts(run_config(model | {"text_encoders": encoders}))


def test_a_file_without_encoders_says_what_to_name(tiny, run_config):
    model = tiny("sd3m", "separate")
    with pytest.raises(UsageError, match=r"model\.text_encoders\.clip_l\.path"):
        facts(run_config(model | {"text_encoders": {}}))


def test_another_family_is_refused_with_its_name(tmp_path, tiny, run_config):
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(3, 1)}, tmp_path / "flux.safetensors")
    with pytest.raises(UsageError, match="FLUX"):
        facts(run_config(tiny("sd3m", "separate") | {"path": str(tmp_path / "flux.safetensors")}))


def test_a_damaged_file_names_the_first_missing_tensor(tmp_path):
    tensors = load_file(golden_file("sd3m", "weights_f16"))
    del tensors["y_embedder.mlp.0.weight"]
    save_file(tensors, tmp_path / "damaged.safetensors")
    with pytest.raises(UsageError, match=r"y_embedder\.mlp\.0\.weight"):
        denoiser_sizes(weight_header(tmp_path / "damaged.safetensors"))


def test_opening_a_run_imports_no_torch(tiny):
    code = (
        "import sys; from tuner.plugins.sd3 import plugin, config, facts, names, sources, sizes;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'transformers', 'diffusers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


FULL = {
    "medium": (24, 1536, 192, False, (), 2.03e9, 237),
    "3.5-medium": (24, 1536, 384, True, tuple(range(13)), 2.47e9, 263),
    "3.5-large": (38, 2432, 192, True, (), 8.06e9, 377),
}


@pytest.mark.parametrize("flavour", FULL)
def test_the_public_sizes_have_the_published_numbers_of_parameters(flavour):
    from tuner.plugins.sd3.denoiser import build
    from tuner.plugins.sd3.sizes import DenoiserSizes, flavour_of

    blocks, width, side, norm, dual, parameters, _ = FULL[flavour]
    sizes = DenoiserSizes(
        width=width, heads=width // 64, blocks=blocks, patch=2, in_channels=16, out_channels=16, side=side,
        text_width=4096, pooled_width=2048, qk_norm=norm, dual=dual,
    )  # fmt: skip
    assert flavour_of(sizes) == flavour
    model = build(sizes)
    assert sum(each.numel() for each in (*model.parameters(), *model.buffers())) == pytest.approx(parameters, rel=0.03)
    modules = dict(model.named_modules())
    present = [path for path in denoiser_modules(blocks) if path in modules]
    linears = {path for path, each in modules.items() if isinstance(each, torch.nn.Linear | torch.nn.Conv2d)}
    assert set(present) == linears


def test_headers_of_infos_are_enough():
    info = TensorInfo(dtype="F16", shape=(1,))
    assert detect({"some.weight": info}) is None


def test_scaled_8_bit_weights_are_refused_rather_than_read_wrongly(tmp_path):
    tensors = load_file(golden_file("sd3m", "weights_f16"))
    save_file(
        tensors | {"joint_blocks.0.x_block.attn.qkv.scale_weight": torch.ones(1)}, tmp_path / "scaled.safetensors"
    )
    with pytest.raises(UsageError, match="scaled 8-bit"):
        denoiser_sizes(weight_header(tmp_path / "scaled.safetensors"))


def test_a_hub_id_is_fetched_by_folder_without_its_variants(monkeypatch, tiny, run_config):
    asked = {}

    def snapshot(repo, **arguments):
        asked.update(arguments, repo=repo)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(UsageError, match=r"hf download owner/sd3 .*--exclude '\*\.fp16\*'"):
        facts(run_config(tiny() | {"path": "owner/sd3"}))
    assert asked["repo"] == "owner/sd3" and "transformer/*" in asked["allow_patterns"]
    assert "*.fp16*" in asked["ignore_patterns"]
