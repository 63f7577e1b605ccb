"""The transformer against recorded outputs, and what we put in place of diffusers' own parts."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.helpers import golden
from tests.plugins.sd3.golden_models import golden_case, golden_sources
from tuner.core.files import weight_header
from tuner.core.memory.checkpointing import apply_checkpointing
from tuner.core.registry import open_run
from tuner.core.types import Placement, TextEmbeds
from tuner.plugins.sd3.denoiser import time_features
from tuner.plugins.sd3.load import denoiser_tensors, load_denoiser
from tuner.plugins.sd3.sizes import denoiser_sizes
from tuner.plugins.sd3.sources import Part, Sources

TOLERANCE = 2e-5
CASES = list(itertools.product(("sd3m", "sd35m"), (0, 1)))


def run(model: nn.Module, case: dict[str, Tensor]) -> Tensor:
    return model(case["x"], case["context"], case["y"], case["timesteps"])


@pytest.mark.parametrize(("flavour", "number"), CASES)
@torch.no_grad()
def test_the_forward_pass_equals_the_recorded_one(golden_model, flavour, number):
    case = golden_case(flavour, f"forward_{number}")
    torch.testing.assert_close(run(golden_model(flavour), case), case["out"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("number", (0, 1))
@torch.no_grad()
def test_the_second_attention_does_not_repeat_the_wrong_head_width(golden_model, number):
    case = golden(f"sd3/sd35m_forward_{number}.safetensors")
    assert (run(golden_model("sd35m"), case) - case["out_wrong_head_dim"]).abs().max() > 1e-3


@pytest.mark.parametrize("flavour", ("sd3m", "sd35m"))
@torch.no_grad()
def test_a_file_in_the_layout_of_diffusers_gives_the_same_model(golden_model, tmp_path, flavour):
    header = golden_sources(flavour).denoiser.header()
    sizes = denoiser_sizes(header)
    tensors = {name: value.contiguous().clone() for name, value in denoiser_tensors(header, sizes.blocks)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert denoiser_sizes(weight_header(tmp_path / "model.safetensors")) == sizes
    part = Part(path=tmp_path / "model.safetensors")
    model = load_denoiser(Sources(denoiser=part, encoders={}, vae=part, tokenizers={}), Placement())
    case = golden_case(flavour, "forward_1")
    torch.testing.assert_close(run(model, case), case["out"], rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_attention_one_sample_at_a_time_gives_the_same(golden_model):
    case = golden_case("sd35m", "forward_0")
    model = load_denoiser(golden_sources("sd35m"), Placement(), split=True)
    torch.testing.assert_close(run(model, case), case["out"], rtol=0, atol=TOLERANCE)


def test_recomputed_blocks_give_the_same_gradient(golden_model):
    case = golden_case("sd35m", "forward_1")
    gradients = []
    for level in ("off", "block"):
        model = golden_model("sd35m")
        apply_checkpointing(model.transformer_blocks.children(), level)
        context = case["context"].clone().requires_grad_()
        run(model, case | {"context": context}).square().sum().backward()
        gradients.append(context.grad)
    assert torch.equal(*gradients)


def test_the_time_embedding_keeps_float32_in_a_bfloat16_model():
    exact = load_denoiser(golden_sources("sd3m"), Placement())
    rough = load_denoiser(golden_sources("sd3m"), Placement(dtypes={"denoiser": "bfloat16"}))
    timesteps = torch.tensor([731.3])
    embedded = [
        each.time_text_embed.timestep_embedder(time_features(timesteps.to(torch.float32))) for each in (exact, rough)
    ]
    assert embedded[1].dtype == torch.float32
    assert (embedded[0] - embedded[1]).abs().max() < 1e-3
    assert rough.transformer_blocks[0].attn.to_q.weight.dtype == torch.bfloat16


@torch.no_grad()
def test_a_bfloat16_run_hands_the_exact_time_to_the_embedding(tiny, run_config):
    seen = []
    for compute in ("fp32", "bf16"):
        run = open_run(run_config(tiny(), precision={"compute": compute}))
        models = run.model.load_models(["denoiser"])
        module = models.denoiser.time_text_embed.timestep_embedder
        module.register_forward_hook(lambda module, given, out: seen.append(out))
        text = {"clip_lg": torch.zeros(1, 77, 112), "pooled": torch.zeros(1, 96), "t5": torch.zeros(1, 4, 112)}
        run.model.predict(models, torch.zeros(1, 16, 4, 4), torch.tensor([0.7313]), TextEmbeds(tensors=text))
    assert (seen[0] - seen[1]).abs().max() < 1e-3


def test_the_state_dict_is_that_of_diffusers(golden_model):
    from diffusers import SD3Transformer2DModel

    ours = golden_model("sd35m")
    theirs = SD3Transformer2DModel.from_config(ours.config)
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }
