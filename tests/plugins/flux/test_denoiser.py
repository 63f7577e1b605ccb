"""The transformer against executions of kohya-ss/sd-scripts on tiny random models, float32, CPU (tests/golden/flux)."""

from __future__ import annotations

import pytest
import torch

from tests.fixtures.tiny_flux import original_tensors
from tests.helpers import golden
from tests.plugins.flux.golden_models import golden_case, golden_denoiser, run
from tuner.core.files import safetensors_header
from tuner.core.memory.checkpointing import apply_checkpointing
from tuner.core.registry import open_run
from tuner.core.types import Placement, TextEmbeds
from tuner.plugins.flux.denoiser import blocks_of, pack, sinusoid, unpack
from tuner.plugins.flux.load import load_denoiser

PARITY, CHROMA_PARITY = 2e-5, 2e-5
GRADIENT = 1e-4


@pytest.fixture(scope="module")
def dev():
    return golden_denoiser()


@pytest.mark.parametrize("weights", ["dev_bfl", "dev_diffusers"])
@pytest.mark.parametrize("name", ["forward_0", "forward_1"])
def test_the_forward_pass_agrees_in_both_layouts_with_and_without_a_text_mask(weights, name):
    denoiser = golden_denoiser(weights)
    case, grid = golden_case(name)
    assert (run(denoiser, case, grid) - case["out"]).abs().max() < PARITY
    masked = run(denoiser, case, grid, text_mask=case["txt_attention_mask"].bool())
    assert (masked - case["out_masked"]).abs().max() < PARITY


@pytest.mark.parametrize("name", ["forward_0", "forward_1"])
def test_without_the_guidance_embedder_it_is_schnell(name):
    denoiser = golden_denoiser(drop="guidance_in.")
    case, grid = golden_case(name)
    assert (run(denoiser, case, grid, guidance=None) - case["out_schnell"]).abs().max() < PARITY


@pytest.mark.parametrize("name", ["forward_0", "forward_1"])
def test_packing_is_the_references_and_unpacking_is_its_inverse(name):
    case, grid = golden_case(name)
    assert torch.equal(pack(case["latents"]), case["img"])
    assert torch.equal(unpack(case["img"], grid), case["latents"])
    assert torch.equal(unpack(case["out"], grid), case["out_unpacked"])


def test_converting_layouts_reproduces_the_other_file_bit_for_bit(dev):
    original, other = golden("flux/dev_bfl.safetensors"), golden("flux/dev_diffusers.safetensors")
    state = dev.state_dict()
    assert set(state) == set(other)
    assert all(torch.equal(state[name], value) for name, value in other.items())
    back = original_tensors(other)
    assert set(back) == set(original)
    assert all(torch.equal(back[name], value) for name, value in original.items())


def test_chromas_layout_converts_and_comes_back_bit_for_bit():
    original = golden("flux/chroma_bfl.safetensors")
    back = original_tensors(dict(golden_denoiser("chroma_bfl").named_parameters()))
    assert set(back) == set(original)
    assert all(torch.equal(back[name], value) for name, value in original.items())


@pytest.mark.parametrize("level", ["off", "block"])
def test_gradients_agree_with_and_without_recomputation(level):
    denoiser = golden_denoiser()
    for root in ("transformer_blocks", "single_transformer_blocks"):
        apply_checkpointing(denoiser.get_submodule(root).children(), level)
    case, grid = golden_case("forward_0")
    wanted = golden("flux/grad_0.safetensors")
    denoiser.requires_grad_(True)
    case["img"].requires_grad_(True)
    (run(denoiser, case, grid) * wanted["probe"]).sum().backward()
    gradients = original_tensors({name: parameter.grad for name, parameter in denoiser.named_parameters()})
    found = {f"grad.{name}": value for name, value in gradients.items()} | {"grad_img": case["img"].grad}
    for name in set(wanted) - {"probe"}:
        assert (found[name] - wanted[name]).norm() / wanted[name].norm() < GRADIENT, name


def test_chroma_lets_one_padding_token_through():
    case = golden("flux/chroma_forward.safetensors")
    denoiser = golden_denoiser("chroma_bfl")
    mask = case["txt_attention_mask"].bool()
    seen = torch.cat((torch.ones_like(mask[:, :1]), mask[:, :-1]), dim=1)
    assert (run(denoiser, case, (4, 6), text_mask=seen) - case["out"]).abs().max() < CHROMA_PARITY
    assert (run(denoiser, case, (4, 6), text_mask=mask) - case["out"]).abs().max() > 1e-3
    full = run(denoiser, case, (4, 6), text_mask=torch.ones_like(mask))
    assert (full - case["out_full_mask"]).abs().max() < CHROMA_PARITY


def test_hidden_text_need_not_be_there_at_all():
    case = golden("flux/chroma_forward.safetensors")
    denoiser = golden_denoiser("chroma_bfl")
    seen = torch.zeros(2, 12, dtype=torch.bool)
    seen[0, :5], seen[1, :3] = True, True
    whole = run(denoiser, case, (4, 6), text_mask=seen)
    short = run(denoiser, case | {"txt": case["txt"][:, :5]}, (4, 6), text_mask=seen[:, :5])
    assert torch.allclose(whole, short, atol=1e-5)


def test_a_mask_of_numbers_is_refused():
    case = golden("flux/chroma_forward.safetensors")
    with pytest.raises(TypeError, match="boolean"):
        run(golden_denoiser("chroma_bfl"), case, (4, 6), text_mask=case["txt_attention_mask"])


def test_chromas_modulation_vectors_agree():
    from tuner.plugins.flux.denoiser import chroma_vectors

    case = golden("flux/chroma_forward.safetensors")
    vectors = chroma_vectors(golden_denoiser("chroma_bfl"), case["timesteps"], case["mod_vectors"].shape[1])
    assert (vectors - case["mod_vectors"]).abs().max() < 5e-5


def test_in_bfloat16_the_time_is_embedded_from_the_exact_value():
    denoiser, exact = golden_denoiser(dtype="bfloat16"), golden_denoiser()
    time = torch.tensor([0.7313])
    features = [
        module.time_text_embed.timestep_embedder(sinusoid(time, 256).to(torch.float32)) for module in (denoiser, exact)
    ]
    assert denoiser.x_embedder.weight.dtype == torch.bfloat16
    # Both embedders are float32; that of the bfloat16 model holds the same weights.
    assert (features[0] - features[1]).abs().max() < 1e-3
    rounded = sinusoid((time.bfloat16() * 1000).float() / 1000, 256)
    assert (rounded - sinusoid(time, 256)).abs().max() > 0.1


@torch.no_grad()
def test_a_bfloat16_run_hands_the_exact_time_and_guidance_to_the_embedding(tiny, run_config):
    seen = {}
    for compute in ("fp32", "bf16"):
        run = open_run(run_config(tiny(), precision={"compute": compute}))
        models = run.model.load_models(["denoiser"])
        found = seen[compute] = []
        for name in ("timestep_embedder", "guidance_embedder"):
            module = models.denoiser.get_submodule(f"time_text_embed.{name}")
            module.register_forward_hook(lambda module, given, out, found=found: found.append(out))
        text = TextEmbeds(tensors={"t5": torch.zeros(1, 3, 28), "clip_pooled": torch.zeros(1, 20)})
        run.model.predict(models, torch.zeros(1, 16, 4, 4), torch.tensor([0.7313]), text, torch.tensor([3.507]))
    for exact, rough in zip(seen["fp32"], seen["bf16"], strict=True):
        assert (exact - rough).abs().max() < 1e-3


def test_bfloat16_is_near_float32():
    case, grid = golden_case("forward_0")
    case = {name: value.bfloat16() if name in ("img", "txt", "y") else value for name, value in case.items()}
    out = run(golden_denoiser(dtype="bfloat16"), case, grid).float()
    assert (out - case["out"]).norm() / case["out"].norm() < 0.05


def test_attention_settings_do_not_change_the_result(dev):
    from tuner.plugins.flux.denoiser import set_attention

    case, grid = golden_case("forward_0")
    set_attention(dev, "sdpa", split=True)
    assert (run(dev, case, grid) - case["out"]).abs().max() < PARITY


def test_diffusers_own_forward_agrees_where_it_is_exact(dev):
    from diffusers import FluxTransformer2DModel

    case, grid = golden_case("forward_0")
    ids = case["img_ids"][0]
    stock = FluxTransformer2DModel.forward(
        dev,
        hidden_states=case["img"],
        encoder_hidden_states=case["txt"],
        pooled_projections=case["y"],
        timestep=case["timesteps"],
        guidance=case["guidance"],
        img_ids=ids,
        txt_ids=case["txt_ids"][0],
    ).sample
    assert torch.allclose(stock, run(dev, case, grid), atol=2e-6)


def test_float8_files_are_widened(tmp_path):
    from safetensors.torch import save_file

    tensors = {name: value.to(torch.float8_e4m3fn) for name, value in golden("flux/dev_bfl.safetensors").items()}
    save_file(tensors, tmp_path / "fp8.safetensors")
    denoiser = load_denoiser(
        safetensors_header(tmp_path / "fp8.safetensors"), Placement(dtypes={"denoiser": "bfloat16"})
    )
    back = original_tensors(dict(denoiser.named_parameters()))
    name = "double_blocks.0.img_mlp.0.weight"
    assert back[name].dtype == torch.bfloat16
    assert torch.equal(back[name].float(), tensors[name].float())


def test_no_tensor_is_left_without_values():
    for name in ("dev_bfl", "chroma_bfl"):
        denoiser = golden_denoiser(name)
        assert not any(value.is_meta for value in (*denoiser.parameters(), *denoiser.buffers()))
        assert not any(value.requires_grad for value in denoiser.parameters())
        assert len(blocks_of(denoiser)) == 4
