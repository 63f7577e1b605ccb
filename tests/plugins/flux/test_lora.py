"""Adapters: what is trained, how files of other programs spell it, and recorded effects (tests/golden/flux)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures.tiny_flux import original_tensors, sizes_of
from tests.helpers import delta_weight, golden, golden_path
from tests.plugins.flux.golden_models import golden_case, golden_denoiser, run
from tuner.core.adapters.convert import convert_adapter
from tuner.core.adapters.export import verify_export
from tuner.core.adapters.files import read_adapter, save_adapter
from tuner.core.adapters.formats import encode_adapter, format_by_name, modules_of
from tuner.core.adapters.lora import adaptable_modules, detach, inject_lora
from tuner.core.adapters.merging import merge_into, read_addition
from tuner.core.adapters.network import adapter_strength, load_network_tensors, network_tensors
from tuner.core.adapters.targets import select_targets
from tuner.core.errors import UsageError
from tuner.core.types import Models
from tuner.plugins.flux.costs import PUBLIC
from tuner.plugins.flux.denoiser import build
from tuner.plugins.flux.facts import lora_rules
from tuner.plugins.flux.names import EMBEDDERS, MAPS

PARITY = 2e-5
SD_SCRIPTS, DIFFUSERS = golden_path("flux/lora_sdscripts.safetensors"), golden_path("flux/lora_diffusers.safetensors")
SPLIT = {
    "sdscripts": golden_path("flux/lora_split_sdscripts.safetensors"),
    "diffusers": golden_path("flux/lora_split_diffusers.safetensors"),
}
LOW_RANK = tuple(each for each in MAPS.formats if "lora" in each.kinds)
FORMATS = tuple(each.name for each in LOW_RANK)


@pytest.fixture
def adapted(opened):
    """(network section) -> the golden model with a LoRA, and the network."""

    def make(**network: Any):
        config, found = opened(network=network)
        models = Models(denoiser=golden_denoiser())
        return models.denoiser, inject_lora(models, config, found)

    return make


def products(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What each linear's adapter adds to its weight; linears to which nothing is added are left out."""
    found = {f"{part}:{path}": delta_weight(tensors, f"{part}:{path}") for part, path in modules_of(tensors)}
    return {name: value for name, value in found.items() if value.any()}


def assert_same_products(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    one, other = products(one), products(other)
    assert set(one) == set(other)
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=0, atol=tolerance)


def filled(network) -> dict[str, torch.Tensor]:
    """The network's tensors, with values in the matrices that start as zeros."""
    generator = torch.Generator().manual_seed(5)
    for parameter in network.module.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network_tensors(network)


# --- recorded effects -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [SD_SCRIPTS, DIFFUSERS], ids=["sd-scripts", "diffusers"])
@torch.no_grad()
def test_a_file_of_another_program_acts_as_recorded(adapted, path):
    case, grid = golden_case("forward_0")
    recorded = golden("flux/lora_forward_0.safetensors")
    denoiser, network = adapted(rank="from_file", init_from=str(path))
    assert (run(denoiser, case, grid) - recorded["out"]).abs().max() < PARITY
    with adapter_strength(network, 0.8):
        assert (run(denoiser, case, grid) - recorded["out_multiplier_0_8"]).abs().max() < PARITY
    with adapter_strength(network, 0.0):
        assert (run(denoiser, case, grid) - case["out"]).abs().max() < PARITY
    detach(network)
    assert (run(denoiser, case, grid) - case["out"]).abs().max() < PARITY


def test_merging_changes_the_weights_as_recorded():
    denoiser = golden_denoiser()
    merge_into(denoiser, "denoiser", [read_addition(SD_SCRIPTS, 0.8, MAPS, where="model.merge")])
    merged = original_tensors(dict(denoiser.named_parameters()))
    for name, wanted in golden("flux/lora_merged_bfl.safetensors").items():
        assert (merged[name] - wanted).abs().max() < PARITY, name


# --- formats ----------------------------------------------------------------------------------------------------------


def test_the_two_recorded_spellings_have_equal_products():
    assert_same_products(read_adapter(SD_SCRIPTS, MAPS).tensors, read_adapter(DIFFUSERS, MAPS).tensors, 1e-5)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("path", [SD_SCRIPTS, DIFFUSERS, *SPLIT.values()], ids=lambda path: path.stem)
def test_conversion_keeps_every_product_and_comes_back(path: Path, to: str, tmp_path):
    there = convert_adapter(path, tmp_path / "there.safetensors", to, MAPS)
    back = convert_adapter(there.path, tmp_path / "back.safetensors", there.source_format, MAPS)
    source = read_adapter(path, MAPS)
    assert read_adapter(there.path, MAPS).format == to
    assert_same_products(source.tensors, read_adapter(there.path, MAPS).tensors)
    assert_same_products(source.tensors, read_adapter(back.path, MAPS).tensors)


def test_a_fused_file_becomes_itself_again_bit_for_bit(tmp_path):
    convert_adapter(SD_SCRIPTS, tmp_path / "comfyui.safetensors", "comfyui", MAPS)
    convert_adapter(tmp_path / "comfyui.safetensors", tmp_path / "back.safetensors", "sd-scripts", MAPS)
    original, back = load_file(SD_SCRIPTS), load_file(tmp_path / "back.safetensors")
    assert set(original) == set(back)
    assert all(torch.equal(back[name], value) for name, value in original.items())


def test_block_diagonal_files_give_the_small_ranks_back_and_take_them():
    small, fused = (load_file(SPLIT[name]) for name in ("diffusers", "sdscripts"))
    ranks = {name: value.shape[0] for name, value in small.items() if name.endswith("lora_A.weight")}
    read = read_adapter(SPLIT["sdscripts"], MAPS).tensors
    assert_same_products(read, read_adapter(SPLIT["diffusers"], MAPS).tensors, 1e-5)
    again = encode_adapter(read, format_by_name(MAPS, "diffusers"))
    assert {name: value.shape[0] for name, value in again.items() if name.endswith("lora_A.weight")} == ranks
    joined = encode_adapter(read_adapter(SPLIT["diffusers"], MAPS).tensors, format_by_name(MAPS, "sd-scripts"))
    assert {name: tuple(value.shape) for name, value in joined.items()} == {
        name: tuple(value.shape) for name, value in fused.items()
    }


def test_parts_of_different_ranks_alphas_and_a_missing_one_are_joined_with_equal_products(tmp_path):
    generator = torch.Generator().manual_seed(0)
    root = "denoiser:single_transformer_blocks.0"
    tensors = {}
    for name, rank, alpha, rows in (("attn.to_q", 2, 1.0, 48), ("attn.to_v", 3, 3.0, 48), ("proj_mlp", 1, 5.0, 192)):
        tensors[f"{root}.{name}.down"] = torch.randn(rank, 48, generator=generator)
        tensors[f"{root}.{name}.up"] = torch.randn(rows, rank, generator=generator)
        tensors[f"{root}.{name}.alpha"] = torch.tensor(alpha)
    path = tmp_path / "joined.safetensors"
    save_adapter(tensors, format_by_name(MAPS, "sd-scripts"), path, {})
    stored = load_file(path)
    assert stored["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (336, 6)
    read = read_adapter(path, MAPS).tensors
    assert "denoiser:single_transformer_blocks.0.attn.to_k.down" not in read
    assert read["denoiser:single_transformer_blocks.0.attn.to_v.down"].shape[0] == 3
    assert_same_products(read, tensors, 1e-5)


def test_the_final_modulation_changes_its_halves_between_the_layouts():
    key = "denoiser:norm_out.linear"
    up = torch.randn(96, 2, generator=torch.Generator().manual_seed(0))
    tensors = {f"{key}.down": torch.ones(2, 48), f"{key}.up": up, f"{key}.alpha": torch.tensor(2.0)}
    original = encode_adapter(tensors, format_by_name(MAPS, "sd-scripts"))
    other = encode_adapter(tensors, format_by_name(MAPS, "diffusers"))
    stored = original["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"]
    assert torch.equal(stored, torch.cat((up[48:], up[:48])))
    assert torch.equal(other["transformer.norm_out.linear.lora_B.weight"], up)


def test_text_encoders_are_spelled_as_other_programs_expect():
    tensors = {}
    for key in ("clip_l:text_model.encoder.layers.0.mlp.fc1", "t5:encoder.block.1.layer.0.SelfAttention.q"):
        tensors |= {f"{key}.down": torch.ones(1, 4), f"{key}.up": torch.ones(4, 1), f"{key}.alpha": torch.tensor(1.0)}
    names = {fmt.name: [name for name in encode_adapter(tensors, fmt) if name.endswith(fmt.down)] for fmt in LOW_RANK}
    assert names == {
        "sd-scripts": [
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
            "lora_te3_encoder_block_1_layer_0_SelfAttention_q.lora_down.weight",
        ],
        "comfyui": [
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
            "text_encoders.t5xxl.transformer.encoder.block.1.layer.0.SelfAttention.q.lora_A.weight",
        ],
        "diffusers": [
            "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
            "text_encoder_2.encoder.block.1.layer.0.SelfAttention.q.lora_A.weight",
        ],
        "lycoris": [
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
            "lora_te3_encoder_block_1_layer_0_SelfAttention_q.lora_down.weight",
        ],
    }


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [False, True])
@torch.no_grad()
def test_every_format_of_a_trained_network_acts_like_it(adapted, opened, tmp_path, split):
    case, grid = golden_case("forward_0")
    denoiser, network = adapted(rank=3, alpha=2, split_fused=split)
    tensors = filled(network)
    wanted = run(denoiser, case, grid)
    assert (wanted - case["out"]).abs().max() > 1e-2
    for fmt in LOW_RANK:
        path = tmp_path / f"{fmt.name}.safetensors"
        save_adapter(tensors, fmt, path, {})
        assert verify_export(path, tensors, MAPS).modules == 40
        other, again = adapted(rank="from_file", init_from=str(path), split_fused=split)
        torch.testing.assert_close(run(other, case, grid), wanted, rtol=0, atol=PARITY)
        assert len(again.module.targets) == len(network.module.targets)


def test_a_shared_adapter_has_one_down_and_saves_the_strength_it_trained_at(adapted, tmp_path):
    _, network = adapted(rank=3, alpha=6)
    targets = {target.path: target for target, _ in network.module.items()}
    shared = targets["single_transformer_blocks.0.attn.to_q+attn.to_k+attn.to_v+proj_mlp"]
    assert shared.paths[-1] == "single_transformer_blocks.0.proj_mlp"
    assert len(targets) == 2 * 10 + 2 * 3
    stored = encode_adapter(filled(network), format_by_name(MAPS, "sd-scripts"))
    assert stored["lora_unet_double_blocks_1_txt_attn_qkv.lora_down.weight"].shape == (3, 48)
    assert stored["lora_unet_double_blocks_1_txt_attn_qkv.alpha"] == 6
    _, separate = adapted(rank=3, alpha=6, split_fused=True)
    stored = encode_adapter(filled(separate), format_by_name(MAPS, "sd-scripts"))
    assert stored["lora_unet_double_blocks_1_txt_attn_qkv.lora_down.weight"].shape == (9, 48)
    assert stored["lora_unet_double_blocks_1_txt_attn_qkv.alpha"] == 18
    assert stored["lora_unet_single_blocks_0_linear1.alpha"] == 24


def test_the_gradient_of_a_shared_down_is_the_sum_over_its_linears(adapted):
    case, grid = golden_case("forward_0")
    grads = []
    for split in (False, True):
        denoiser, network = adapted(rank=2, targets=[r"transformer_blocks\.0\.attn\.to_[qkv]"], split_fused=split)
        generator = torch.Generator().manual_seed(1)
        down, ups = torch.randn(2, 48, generator=generator), torch.randn(144, 2, generator=generator)
        for (_, layer), rows in zip(network.module.items(), ups.split([48, 48, 48]) if split else [ups], strict=True):
            layer.down.data.copy_(down)
            layer.up.data.copy_(rows)
        run(denoiser, case, grid).square().sum().backward()
        layers = [layer for _, layer in network.module.items()]
        grads.append((sum(layer.down.grad for layer in layers), torch.cat([layer.up.grad for layer in layers])))
    for shared, separate in zip(*grads, strict=True):
        torch.testing.assert_close(shared, separate, rtol=1e-4, atol=1e-5)


def test_state_comes_back_and_does_not_fit_a_differently_split_network(adapted):
    _, network = adapted(rank=2)
    tensors = {name: value.clone() for name, value in filled(network).items()}
    _, other = adapted(rank=2)
    load_network_tensors(other, tensors)
    assert all(torch.equal(value, tensors[name]) for name, value in network_tensors(other).items())
    _, separate = adapted(rank=2, split_fused=True)
    with pytest.raises(UsageError, match="an adapter of its own"):
        load_network_tensors(other, filled(separate))


def test_a_file_with_separate_parts_starts_a_split_network_only(adapted, tmp_path):
    path = tmp_path / "split.safetensors"
    _, separate = adapted(rank=2, split_fused=True)
    save_adapter(filled(separate), format_by_name(MAPS, "sd-scripts"), path, {})
    _, again = adapted(rank=2, split_fused=True, init_from=str(path))
    assert_same_products(network_tensors(again), network_tensors(separate))
    with pytest.raises(UsageError, match="split_fused"):
        adapted(rank=2, init_from=str(path))


@pytest.mark.parametrize("dropout", ["dropout", "rank_dropout", "module_dropout"])
def test_dropout_decides_once_for_all_members_of_a_shared_adapter(adapted, dropout):
    from tuner.core.adapters.network import adapter_rng
    from tuner.core.types import Item

    _, network = adapted(rank=4, **{dropout: 0.5})
    _, layer = next((target, layer) for target, layer in network.module.items() if target.members)
    network.module.train()
    x = torch.randn(2, 5, 48)
    with adapter_rng(network, 0, 1, [Item(id=str(number), source="s", caption="") for number in range(2)]):
        masks = [part.mid_mask(x) for part in layer.parts()]
    assert all(torch.equal(masks[0], mask) for mask in masks)


# --- choice of modules ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_size_paths() -> dict[str, tuple[str, ...]]:
    """Every linear of a model of public depth and tiny width."""
    with torch.device("meta"):
        return {"denoiser": tuple(adaptable_modules(build(sizes_of("dev", blocks=19, singles=38))))}


def chosen(opened, paths, **network: Any):
    config, found = opened(network=network)
    return select_targets(paths, config.network, found)


def test_the_default_is_every_linear_of_the_blocks(opened, full_size_paths):
    for preset in (None, "blocks"):
        targets = chosen(opened_deep(opened), full_size_paths, preset=preset)
        assert len(targets) == 304
        assert sum(len(target.paths) for target in targets) == 19 * 14 + 38 * 6


def opened_deep(opened):
    """As ``opened``, with facts of public depth."""
    from dataclasses import replace

    from tuner.core.types import Blocks

    def make(**sections: Any):
        config, found = opened(**sections)
        lists = (Blocks(path="transformer_blocks", count=19), Blocks(path="single_transformer_blocks", count=38))
        return config, replace(found, block_lists=lists, lora=lora_rules(PUBLIC["dev"]))

    return make


PRESET_COUNTS = {
    "mmdit": (19 * 4 + 38 * 3),
    "context": 19 * 4,
    "context+ffs": 19 * 6,
    "all": 19 * 8 + 38 * 3,
    "all+ffs": 19 * 12 + 38 * 5 + 1,
    "ai-toolkit": 19 * 14 + 38 * 6 + 1,
    "all+ffs+embedder": 19 * 12 + 38 * 5 + 2,
    "tiny": 2,
    "nano": 1,
}


@pytest.mark.parametrize("preset", PRESET_COUNTS)
def test_presets_choose_the_linears_of_their_definition(opened, full_size_paths, preset):
    targets = chosen(opened_deep(opened), full_size_paths, preset=preset)
    assert sum(len(target.paths) for target in targets) == PRESET_COUNTS[preset]


def test_every_preset_is_counted():
    assert {*PRESET_COUNTS, "blocks"} == set(lora_rules(PUBLIC["dev"]).presets)


@pytest.mark.parametrize("preset", ["controlnet", "all+ffs+embedder+controlnet"])
def test_presets_of_control_networks_are_refused_by_name(opened, preset):
    from tuner.core.config import facts_problems

    config, found = opened(network={"preset": preset})
    [problem] = facts_problems(config, found)
    assert preset in problem.what and "control networks" in problem.what


def test_ranks_by_layer_class_are_those_of_the_recorded_file(adapted):
    dims = {"img_attn": 3, "txt_attn": 2, "img_mlp": 4, "txt_mlp": 4, "img_mod": 2, "txt_mod": 2, "single": 5,
            "single_mod": 2}  # fmt: skip
    rules = [{"match": name, "rank": rank} for name, rank in dims.items()]
    _, network = adapted(rank=1, alpha=3, rules=rules)
    stored = encode_adapter(filled(network), format_by_name(MAPS, "sd-scripts"))
    recorded = load_file(SD_SCRIPTS)
    assert {name: value.shape for name, value in stored.items()} == {
        name: value.shape for name, value in recorded.items()
    }
    assert all(stored[name] == value for name, value in recorded.items() if name.endswith(".alpha"))


def test_embedders_train_when_they_are_included(adapted):
    rules = [{"match": name, "rank": 2 + number} for number, name in enumerate(EMBEDDERS)]
    _, network = adapted(rank=1, include=list(EMBEDDERS), rules=rules)
    ranks = {target.path: target.rank for target in network.module.targets if "blocks" not in target.path}
    assert ranks == {
        "x_embedder": 2,
        "time_text_embed.timestep_embedder.linear_1": 3,
        "time_text_embed.timestep_embedder.linear_2": 3,
        "time_text_embed.text_embedder.linear_1": 4,
        "time_text_embed.text_embedder.linear_2": 4,
        "time_text_embed.guidance_embedder.linear_1": 5,
        "time_text_embed.guidance_embedder.linear_2": 5,
        "context_embedder": 6,
    }


def test_blocks_are_chosen_by_group(adapted):
    _, network = adapted(rank=1, blocks={"double": [0], "single": "none"})
    assert {target.path.split(".attn")[0].split(".ff")[0].split(".norm")[0] for target in network.module.targets} == {
        "transformer_blocks.0"
    }
    with pytest.raises(UsageError, match="there is no block 2"):
        adapted(rank=1, blocks={"single": ["0-2"]})


def test_members_with_settings_of_their_own_get_their_own_adapter(adapted):
    rules = [{"match": r"transformer_blocks\.0\.attn\.to_k", "rank": 5}]
    _, network = adapted(rank=2, targets=[r"transformer_blocks\.0\.attn\.to_[qkv]"], rules=rules)
    assert {(target.path, target.rank) for target in network.module.targets} == {
        ("transformer_blocks.0.attn.to_q+to_v", 2),
        ("transformer_blocks.0.attn.to_k", 5),
    }
    stored = encode_adapter(filled(network), format_by_name(MAPS, "sd-scripts"))
    assert stored["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape[0] == 9


# --- diffusers as a judge ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_exported_file_acts_the_same_in_diffusers_own_loader(adapted, tmp_path):
    from diffusers import FluxPipeline
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    case, grid = golden_case("forward_0")
    denoiser, network = adapted(rank=3, alpha=2)
    path = tmp_path / "adapter.safetensors"
    save_adapter(filled(network), format_by_name(MAPS, "diffusers"), path, {})
    wanted = run(denoiser, case, grid)
    stock = golden_denoiser()
    # diffusers' own forward and attention, not ours.
    stock.__dict__.pop("forward")
    stock.set_attn_processor(FluxAttnProcessor())
    pipeline = FluxPipeline(
        scheduler=None, vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        transformer=stock,
    )  # fmt: skip
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    out = stock(
        hidden_states=case["img"], encoder_hidden_states=case["txt"], pooled_projections=case["y"],
        timestep=case["timesteps"], guidance=case["guidance"], img_ids=case["img_ids"][0], txt_ids=case["txt_ids"][0],
    ).sample  # fmt: skip
    torch.testing.assert_close(out, wanted, rtol=0, atol=PARITY)


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["transformer_blocks", "single_transformer_blocks"])
def test_an_adapted_block_compiles_to_one_graph_with_equal_gradients(adapted, kind):
    from tuner.plugins.flux.denoiser import key_mask, rope_table

    torch.compiler.reset()
    denoiser, network = adapted(rank=2)
    filled(network)
    block = denoiser.get_submodule(kind)[0]
    generator = torch.Generator().manual_seed(2)
    image, text, vector = (torch.randn(*size, generator=generator) for size in ((2, 24, 48), (2, 9, 48), (2, 48)))
    inputs = {
        "hidden_states": image,
        "encoder_hidden_states": text,
        "temb": vector,
        "image_rotary_emb": rope_table((4, 6), 9, (4, 6, 6), torch.device("cpu")),
        "joint_attention_kwargs": {"attention_mask": key_mask(torch.ones(2, 9, dtype=torch.bool), 24)},
    }
    gradients = []
    for forward in (block, torch.compile(block, backend="aot_eager", fullgraph=True)):
        network.module.zero_grad()
        states, tokens = forward(**inputs)
        (states.square().mean() + tokens.square().mean()).backward()
        gradients.append([each.grad.clone() for each in network.module.parameters() if each.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for plain, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)
