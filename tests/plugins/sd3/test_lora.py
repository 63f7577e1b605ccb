"""Adapters: what is trained, how files of other programs spell it, and recorded effects."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures.tiny_parts import clip_shapes, t5_shapes
from tests.helpers import delta_weight
from tests.plugins.sd3.golden_models import golden_case, golden_file
from tuner.core.adapters.convert import convert_adapter
from tuner.core.adapters.files import read_adapter, save_adapter
from tuner.core.adapters.formats import encode_adapter, format_by_name, modules_of
from tuner.core.adapters.lora import inject_lora
from tuner.core.adapters.merging import merge_into, read_addition
from tuner.core.adapters.network import adapter_strength, network_tensors
from tuner.core.registry import open_run
from tuner.core.types import Models
from tuner.plugins.sd3.denoiser import build
from tuner.plugins.sd3.facts import facts
from tuner.plugins.sd3.names import CLASSES, EMBEDDER_KINDS, LORA, MAPS, exchanged, parameter_parts
from tuner.plugins.sd3.sizes import DenoiserSizes

TOLERANCE = 2e-5
FLAVOURS = ("sd3m", "sd35m")


@pytest.fixture
def adapted(golden_model, tiny, run_config):
    """(flavour, network section) -> the golden model with a LoRA, and the network."""

    def make(flavour: str, **network: Any):
        config = run_config(tiny(flavour), network=network)
        models = Models(denoiser=golden_model(flavour))
        return models.denoiser, inject_lora(models, config, facts(config))

    return make


def run(model, flavour: str):
    case = golden_case(flavour, "forward_0")
    return model(case["x"], case["context"], case["y"], case["timesteps"])


def products(tensors) -> dict[str, torch.Tensor]:
    """What each module of internal tensors adds to its weight."""
    return {f"{part}:{path}": delta_weight(tensors, f"{part}:{path}") for part, path in modules_of(tensors)}


def assert_same_products(one, other):
    one, other = products(one), products(other)
    assert set(one) == set(other)
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=0, atol=1e-6)


def random_adapter(network) -> dict[str, torch.Tensor]:
    """The network's tensors, with values in the matrices that start as zeros."""
    generator = torch.Generator().manual_seed(5)
    for parameter in network.module.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network_tensors(network)


# --- recorded effects -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("kind", ("sdscripts", "diffusers"))
@torch.no_grad()
def test_a_file_of_another_program_acts_as_recorded(adapted, flavour, kind):
    path = golden_file(flavour, f"lora_{kind}")
    model, network = adapted(flavour, rank="from_file", init_from=str(path))
    expected = golden_case(flavour, "lora_forward_0")["out"]
    torch.testing.assert_close(run(model, flavour), expected, rtol=0, atol=TOLERANCE)
    with adapter_strength(network, 0.0):
        plain = golden_case(flavour, "forward_0")["out"]
        torch.testing.assert_close(run(model, flavour), plain, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_merged_matrices_are_the_recorded_ones(golden_model, flavour):
    model = golden_model(flavour)
    path = golden_file(flavour, "lora_sdscripts")
    merge_into(model, "denoiser", [read_addition(path, 1.0, MAPS, where="model.merge")])
    weights = dict(model.named_parameters())
    for name, expected in golden_case(flavour, "lora_merged_some").items():
        merged = torch.cat([weights[part] for part in parameter_parts(name)])
        if exchanged(parameter_parts(name)[0].removesuffix(".weight"), len(model.transformer_blocks)):
            merged = torch.cat(merged.chunk(2)[::-1])
        torch.testing.assert_close(merged, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_both_spellings_of_one_adapter_have_the_same_products(flavour):
    read = {kind: read_adapter(golden_file(flavour, f"lora_{kind}"), MAPS) for kind in ("sdscripts", "diffusers")}
    assert {kind: each.format for kind, each in read.items()} == {"sdscripts": "sd-scripts", "diffusers": "diffusers"}
    assert_same_products(read["sdscripts"].tensors, read["diffusers"].tensors)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("other", ("diffusers", "comfyui"))
def test_conversion_there_and_back_keeps_products_ranks_and_names(tmp_path, flavour, other):
    source = golden_file(flavour, "lora_sdscripts")
    convert_adapter(source, tmp_path / "there.safetensors", other, MAPS)
    convert_adapter(tmp_path / "there.safetensors", tmp_path / "back.safetensors", "sd-scripts", MAPS)
    there, back = (read_adapter(tmp_path / f"{name}.safetensors", MAPS).tensors for name in ("there", "back"))
    assert_same_products(there, read_adapter(source, MAPS).tensors)
    assert_same_products(back, there)
    original, again = golden_case(flavour, "lora_sdscripts"), _load(tmp_path / "back.safetensors")
    assert {name: tuple(value.shape) for name, value in original.items()} == {
        name: tuple(value.shape) for name, value in again.items()
    }
    if other == "diffusers":
        twin = golden_case(flavour, "lora_diffusers")
        assert set(_load(tmp_path / "there.safetensors")) == set(twin)


def _load(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


# --- what is trained --------------------------------------------------------------------------------------------------


def test_ranks_by_kind_give_the_shapes_of_the_recorded_adapter(golden_model, tiny, run_config):
    ranks = {"context_attn": 3, "context_mlp": 2, "context_mod": 2, "x_attn": 4, "x_mlp": 3, "x_mod": 2}
    embedders = dict(zip(EMBEDDER_KINDS, (2, 2, 3, 2, 2, 3), strict=True))
    rules = [{"match": name, "rank": rank} for name, rank in (ranks | embedders).items()]
    for flavour in FLAVOURS:
        network = {"preset": "all", "rank": 4, "alpha": 2.0, "rules": rules}
        config = open_run(run_config(tiny(flavour), network=network)).config
        built = inject_lora(Models(denoiser=golden_model(flavour)), config, facts(config))
        tensors = encode_adapter(network_tensors(built), format_by_name(MAPS, "sd-scripts"))
        recorded = golden_case(flavour, "lora_sdscripts")
        assert {name: tuple(value.shape) for name, value in tensors.items()} == {
            name: tuple(value.shape) for name, value in recorded.items()
        }


@pytest.mark.parametrize(
    ("blocks", "width", "side", "norm", "dual", "count"),
    ((24, 1536, 192, False, (), 237), (24, 1536, 384, True, tuple(range(13)), 263), (38, 2432, 192, True, (), 377)),
)
def test_the_default_adapts_every_linear_of_the_blocks_at_full_size(
    tiny, run_config, blocks, width, side, norm, dual, count
):
    sizes = DenoiserSizes(
        width=width, heads=width // 64, blocks=blocks, patch=2, in_channels=16, out_channels=16, side=side,
        text_width=4096, pooled_width=2048, qk_norm=norm, dual=dual,
    )  # fmt: skip
    config = run_config(tiny("sd3m"), network={"rank": 1})
    network = inject_lora(Models(denoiser=build(sizes)), config, facts(config))
    names = encode_adapter(network_tensors(network), format_by_name(MAPS, "sd-scripts"))
    assert len({name.partition(".")[0] for name in names}) == count


@pytest.mark.parametrize("preset", LORA.presets)
def test_every_preset_names_what_it_says(adapted, preset):
    _, network = adapted("sd35m", preset=preset, rank=2)
    paths = {path for _, path in modules_of(network_tensors(network))}
    if preset in CLASSES:
        assert all(re.fullmatch(CLASSES[preset], path) for path in paths)
    assert ("pos_embed.proj" in paths) == (preset in ("embedders", "all"))


def test_blocks_can_be_chosen(adapted):
    _, network = adapted("sd35m", rank=2, blocks={"blocks": [1]})
    assert {path.split(".")[1] for _, path in modules_of(network_tensors(network))} == {"1"}


def test_queries_keys_and_values_share_one_matrix_unless_split(adapted):
    fmt = format_by_name(MAPS, "sd-scripts")
    key = "lora_unet_joint_blocks_0_x_block_attn2_qkv"
    for split, rank in ((False, 2), (True, 6)):
        _, network = adapted("sd35m", rank=2, alpha=1.0, split_fused=split)
        tensors = random_adapter(network)
        stored = encode_adapter(tensors, fmt)
        assert stored[f"{key}.lora_down.weight"].shape == (rank, 128)
        assert float(stored[f"{key}.alpha"]) / rank == pytest.approx(0.5)
        joint = stored[f"{key}.lora_up.weight"] @ stored[f"{key}.lora_down.weight"] * 0.5
        parts = [
            delta_weight(tensors, f"denoiser:transformer_blocks.0.attn2.{name}") for name in ("to_q", "to_k", "to_v")
        ]
        torch.testing.assert_close(joint, torch.cat(parts), rtol=0, atol=1e-6)


@pytest.mark.parametrize("split", (False, True))
@torch.no_grad()
def test_a_saved_adapter_acts_the_same_when_it_is_read(adapted, tmp_path, split):
    model, network = adapted("sd35m", preset="all", rank=2, alpha=1.0, split_fused=split)
    tensors = random_adapter(network)
    expected = run(model, "sd35m")
    assert (expected - golden_case("sd35m", "forward_0")["out"]).abs().max() > 0.01
    for fmt in MAPS.formats:
        path = save_adapter(tensors, fmt, tmp_path / f"{fmt.name}.safetensors", {})
        again, _ = adapted("sd35m", rank="from_file", init_from=str(path), split_fused=split)
        torch.testing.assert_close(run(again, "sd35m"), expected, rtol=0, atol=TOLERANCE)


# --- text encoders ----------------------------------------------------------------------------------------------------


def test_text_encoder_names_are_those_that_other_programs_read():
    paths = MAPS.paths(["layers.1.", "encoder.block.1."])
    tensors = {}
    for name in ("clip_l", "clip_g", "t5"):
        key = f"{name}:{paths[name][0]}"
        tensors |= {f"{key}.down": torch.ones(1, 4), f"{key}.up": torch.ones(4, 1), f"{key}.alpha": torch.tensor(1.0)}
    stored = encode_adapter(tensors, format_by_name(MAPS, "sd-scripts"))
    assert {name.partition(".")[0] for name in stored} == {
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
    }
    known = {f"{path}.weight" for path in paths["clip_l"]}
    assert known <= set(clip_shapes(width=8, layers=2, projection=8))
    assert {f"{path}.weight" for path in paths["t5"]} <= set(t5_shapes(width=8))


# --- compiled ---------------------------------------------------------------------------------------------------------


def test_an_adapted_block_compiles_to_one_graph_with_equal_gradients(adapted):
    torch.compiler.reset()
    model, network = adapted("sd35m", rank=2)
    random_adapter(network)
    block = model.transformer_blocks[0]
    generator = torch.Generator().manual_seed(2)
    image, text, vector = (torch.randn(*size, generator=generator) for size in ((2, 24, 128), (2, 9, 128), (2, 128)))
    gradients = []
    for forward in (block, torch.compile(block, backend="aot_eager", fullgraph=True)):
        network.module.zero_grad()
        states, tokens = forward(image, text, vector)
        (states.square().mean() + tokens.square().mean()).backward()
        gradients.append([each.grad.clone() for each in network.module.parameters() if each.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for plain, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)
