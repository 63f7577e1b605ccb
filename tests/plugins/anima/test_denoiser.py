"""The denoiser against the reference's numbers, and what its speed-ups promise not to change.

Golden data: executions of kohya-ss/sd-scripts on tiny random models, float32, CPU (tests/golden/anima).
"""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.helpers import golden
from tuner.core.adapters.layers import Dropout, DropoutKeys, LoraLayer, inject
from tuner.core.flow.sampler import apply_cfg, euler_sample, euler_sigmas
from tuner.core.memory.checkpointing import apply_checkpointing
from tuner.core.rng import Rng
from tuner.plugins.anima import sizes as shapes_of
from tuner.plugins.anima.denoiser import Block, Denoiser, fold_context, rope_angles, unpatchify
from tuner.plugins.anima.text import LLMAdapter

PARITY = 3e-5
"""Largest difference from the reference that the golden data allows for outputs of order 1."""
EXACT = 5e-6
"""What we ask of ourselves for one forward; 2e-6 was measured."""
GRADIENTS = 1e-5
"""Relative L2 error per tensor: a tenth of what the golden data allows; 8e-7 was measured."""

SIZES = shapes_of.DenoiserSizes(
    width=64, heads=2, head_dim=32, blocks=2, mlp_width=128, text_width=24, adaln_rank=8, in_channels=16,
    out_channels=16, rope_ratio=4.0,
)  # fmt: skip


def weights(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of the denoiser and of the adapter in a golden weight file."""
    tensors = golden(f"anima/{name}.safetensors")
    named = {new: tensors[old] for new, old in shapes_of.original_names(tensors).items()}
    prefix = shapes_of.ADAPTER_PREFIX
    adapter = {key.removeprefix(prefix): value for key, value in named.items() if key.startswith(prefix)}
    return {key: value for key, value in named.items() if not key.startswith(prefix)}, adapter


def shapes(tensors: dict[str, Tensor]) -> dict[str, SimpleNamespace]:
    return {key: SimpleNamespace(shape=tuple(value.shape)) for key, value in tensors.items()}


def load_denoiser(name: str) -> Denoiser:
    tensors, _ = weights(name)
    denoiser = Denoiser(shapes_of.denoiser_sizes(shapes(tensors)))
    denoiser.load_state_dict(tensors, strict=True)
    return denoiser.requires_grad_(False)


def random_denoiser(sizes: shapes_of.DenoiserSizes = SIZES, seed: int = 0) -> Denoiser:
    """Random weights with no dead branch: the modulation outputs are not left at zero."""
    denoiser = Denoiser(sizes)
    generator = torch.Generator().manual_seed(seed)
    denoiser.reset_parameters(generator)
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if "adaln" in name or parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return denoiser.requires_grad_(False)


def inputs(batch: int = 2, seed: int = 1, *, tokens: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, 16, 6, 8, generator=generator),
        torch.rand(batch, generator=generator),
        torch.randn(batch, tokens, SIZES.text_width, generator=generator),
    )


def adapt(module: nn.Module, contains: str = "proj") -> list[nn.Parameter]:
    """Put a random adapter on every linear whose path contains ``contains``; returns the trainable parameters."""
    parameters: list[nn.Parameter] = []
    for name, linear in list(module.named_modules()):
        if isinstance(linear, nn.Linear) and contains in name:
            rng = Rng(0, name)
            layer = LoraLayer(
                linear, rank=4, alpha=2.0, dropout=Dropout(), keys=DropoutKeys(), dtype=torch.float32, rng=rng
            )
            layer.up.data.copy_(0.2 * rng.child("up").normal(layer.up.shape))
            inject(linear, layer)
            parameters += [layer.down, layer.up]
    return parameters


def close(actual: Tensor, expected: Tensor, tolerance: float = PARITY) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max().item() <= tolerance


# --- parity with the reference ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["s1", "s2", "s3"])
def test_forward_matches_the_reference(case: str) -> None:
    data = golden("anima/dit_forward.safetensors")
    with torch.no_grad():
        out = load_denoiser("dit_weights")(
            data[f"{case}.x"][:, :, 0],
            data[f"{case}.t"],
            data[f"{case}.context"],
            padding_mask=data[f"{case}.padding_mask"],
        )
    close(out, data[f"{case}.out"][:, :, 0], EXACT)


def test_intermediate_values_match_the_reference() -> None:
    data = golden("anima/dit_forward.safetensors")
    denoiser = load_denoiser("dit_weights")
    seen: dict[str, Tensor] = {}
    denoiser.x_embedder.register_forward_hook(lambda _m, _i, out: seen.update(patch_embed=out))
    denoiser.blocks[0].register_forward_hook(lambda _m, _i, out: seen.update(block0_out=out))
    denoiser.final_layer.register_forward_hook(lambda _m, _i, out: seen.update(final_layer_out=out))
    denoiser.t_embedder[0].register_forward_hook(lambda _m, _i, out: seen.update(t_sinusoid=out))
    with torch.no_grad():
        denoiser(data["s1.x"][:, :, 0], data["s1.t"], data["s1.context"], padding_mask=data["s1.padding_mask"])
        embedding, shared = denoiser.embed_sigmas(data["s1.t"])
    for name, value in seen.items():
        close(value, data[f"s1.{name}"].view(value.shape))
    assert shared is not None
    close(shared, data["s1.adaln_lora"][:, 0])
    close(embedding, nn.functional.silu(data["s1.t_embedding"][:, 0]))


@pytest.mark.parametrize(("case", "rows", "columns"), [("s1", 6, 10), ("s2", 3, 17)])
def test_rope_angles_match_the_reference(case: str, rows: int, columns: int) -> None:
    close(rope_angles(rows, columns, 32, 4.0), golden("anima/dit_forward.safetensors")[f"{case}.rope_angles"][:, 0, 0])


def test_a_padding_mask_of_twice_the_size_is_sampled_by_plain_nearest() -> None:
    data = golden("anima/dit_forward.safetensors")
    denoiser = load_denoiser("dit_weights")
    seen: list[Tensor] = []
    denoiser.x_embedder.register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.no_grad():
        denoiser(data["s3.x"][:, :, 0], data["s3.t"], data["s3.context"], padding_mask=data["s3.padding_mask"])
    close(seen[0], data["s3.patch_embed"].view(seen[0].shape))


def test_one_training_step_with_the_adapter_matches_the_reference() -> None:
    data = golden("anima/e2e_step.safetensors")
    denoiser = load_denoiser("e2e_weights").requires_grad_(True)
    _, tensors = weights("e2e_weights")
    adapter = LLMAdapter(shapes_of.adapter_sizes(shapes(tensors)))
    adapter.load_state_dict(tensors, strict=True)
    context = adapter(data["qwen_hidden"], data["qwen_mask"], data["t5_ids"], data["t5_mask"])
    pred = denoiser(data["noisy"], data["t"], context)
    close(pred, data["pred"], EXACT)
    loss = (pred - data["target"]).square().mean()
    loss.backward()
    close(loss.detach(), data["loss"], 1e-5)
    named = dict(denoiser.named_parameters())
    named |= {f"llm_adapter.{name}": parameter for name, parameter in adapter.named_parameters()}
    for key in (key for key in data if key.startswith("grad.")):
        gradient, expected = named[key.removeprefix("grad.")].grad, data[key]
        assert gradient is not None
        assert (gradient - expected).norm() <= GRADIENTS * expected.norm(), key
    total = sum(p.grad.double().square().sum() for p in named.values() if p.grad is not None).sqrt()
    assert abs(total - data["grad_norm_total"]) <= GRADIENTS * data["grad_norm_total"]


@pytest.mark.parametrize("guided", [True, False])
def test_preview_latents_match_the_reference(guided: bool) -> None:
    data = golden("anima/preview_sampler.safetensors")
    denoiser = load_denoiser("e2e_weights")

    def velocity(noisy: Tensor, sigmas: Tensor) -> Tensor:
        positive = denoiser(noisy, sigmas, data["cond"])
        return apply_cfg(positive, denoiser(noisy, sigmas, data["uncond"]), 4.0) if guided else positive

    with torch.no_grad():
        latents = euler_sample(velocity, data["noise"][:, :, 0], euler_sigmas(6, 3.0))
    close(latents, data["latents_cfg" if guided else "latents_nocfg"][:, :, 0], 1e-4)


# --- structure --------------------------------------------------------------------------------------------------------


def test_parameters_carry_the_published_names_and_nothing_else() -> None:
    tensors, _ = weights("dit_weights")
    assert load_denoiser("dit_weights").state_dict().keys() == tensors.keys()


def test_the_full_size_model_builds_on_the_meta_device_with_the_published_count() -> None:
    sizes = shapes_of.DenoiserSizes(
        width=2048, heads=16, head_dim=128, blocks=28, mlp_width=8192, text_width=1024, adaln_rank=256, in_channels=16,
        out_channels=16, rope_ratio=4.0,
    )  # fmt: skip
    with torch.device("meta"):
        denoiser = Denoiser(sizes)
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == 1_956_405_248


def test_a_model_without_low_rank_modulation_runs_and_trains() -> None:
    sizes = shapes_of.DenoiserSizes(
        width=64, heads=2, head_dim=32, blocks=2, mlp_width=128, text_width=24, adaln_rank=0, in_channels=16,
        out_channels=16, rope_ratio=4.0,
    )  # fmt: skip
    frozen, trained = random_denoiser(sizes), random_denoiser(sizes).requires_grad_(True)
    assert "blocks.0.adaln_modulation_mlp.2.weight" not in frozen.state_dict()
    out = trained(*inputs())
    close(frozen(*inputs()), out, 1e-6)
    out.square().mean().backward()
    assert all(parameter.grad is not None for parameter in trained.parameters())


def test_patches_go_in_channel_first_and_come_out_channel_last() -> None:
    denoiser = random_denoiser()
    latents = torch.arange(2 * 4 * 6, dtype=torch.float32).view(1, 2, 4, 6)
    tokens = denoiser.x_embedder.proj[0](latents)
    assert tokens[0, 0].tolist() == [0, 1, 6, 7, 24, 25, 30, 31]
    assert torch.equal(unpatchify(tokens.view(1, 6, 2, 4).transpose(2, 3).flatten(2), 4, 6), latents)


def test_training_from_scratch_starts_as_a_zero_modulation_model() -> None:
    denoiser = Denoiser(SIZES)
    denoiser.reset_parameters(torch.Generator().manual_seed(3))
    weight = denoiser.get_parameter("blocks.0.mlp.layer1.weight")
    std = SIZES.width**-0.5
    assert weight.abs().max() <= 3 * std
    assert abs(weight.std() / std - 1) < 0.05
    assert not denoiser.get_parameter("blocks.1.adaln_modulation_mlp.2.weight").any()
    assert not denoiser.get_parameter("final_layer.adaln_modulation.2.weight").any()
    assert (denoiser.get_parameter("blocks.0.self_attn.q_norm.weight") == 1).all()


# --- speed-ups that must not change the numbers -----------------------------------------------------------------------


def is_fused(linears: list[nn.Linear]) -> bool:
    first = linears[0].weight
    return all(
        linear.weight.data_ptr() == first.data_ptr() + index * first.numel() * first.element_size()
        for index, linear in enumerate(linears)
    )


def assert_fused(denoiser: Denoiser) -> None:
    attention = denoiser.blocks[1].self_attn
    assert is_fused([attention.q_proj, attention.k_proj, attention.v_proj])
    assert is_fused([denoiser.blocks[1].cross_attn.k_proj, denoiser.blocks[1].cross_attn.v_proj])
    modulation = [getattr(block, f"adaln_modulation_{name}")[2] for block in denoiser.blocks
                  for name in ("self_attn", "cross_attn", "mlp")]  # fmt: skip
    assert is_fused(modulation)


def test_shared_storage_survives_casts_loading_and_materialisation() -> None:
    original = random_denoiser()
    expected = original(*inputs())
    assert_fused(original)
    assert_fused(random_denoiser().to(torch.bfloat16))
    with torch.device("meta"):
        empty = Denoiser(SIZES).requires_grad_(False)
    empty.to_empty(device="cpu")
    assert_fused(empty)
    empty.load_state_dict(original.state_dict())
    assert_fused(empty)
    assert torch.equal(empty(*inputs()), expected)
    with torch.device("meta"):
        assigned = Denoiser(SIZES).requires_grad_(False)
    copies = {key: value.clone() for key, value in original.state_dict().items()}
    assigned.load_state_dict(copies, assign=True)
    assigned.requires_grad_(False)
    assert_fused(assigned)
    assert torch.equal(assigned(*inputs()), expected)


def test_embedders_and_norms_may_stay_in_float32_beside_bfloat16_blocks() -> None:
    denoiser = random_denoiser()
    expected = denoiser(*inputs())
    denoiser.to(torch.bfloat16)
    for name, module in denoiser.named_modules():
        if re.fullmatch(r".*norm|(x|t)_embedder|final_layer", name):
            module.float()
    assert_fused(denoiser)
    assert denoiser.dtype == torch.bfloat16
    assert denoiser.x_embedder.proj[1].weight.dtype == torch.float32
    assert denoiser.blocks[0].self_attn.q_norm.weight.dtype == torch.float32
    out = denoiser(*inputs())
    assert out.dtype == torch.float32
    assert (out - expected).norm() <= 0.02 * expected.norm()


def test_folding_zero_context_rows_changes_nothing_even_with_adapters_on_keys_and_values() -> None:
    denoiser = random_denoiser()
    parameters = adapt(denoiser, "cross_attn")
    latents, sigmas, context = inputs(tokens=64)
    mask = torch.zeros(2, 64, dtype=torch.bool)
    mask[0, :5], mask[1, :11] = True, True
    context = context * mask[..., None]
    folded, bias = fold_context(context, mask)
    assert folded.shape[1] == 12
    assert bias is not None
    assert bias.dtype == torch.float32
    plain = torch.autograd.grad(denoiser(latents, sigmas, context).square().mean(), parameters)
    quick = torch.autograd.grad(denoiser(latents, sigmas, context, context_mask=mask).square().mean(), parameters)
    for expected, actual in zip(plain, quick, strict=True):
        assert (actual - expected).norm() <= 1e-5 * expected.norm() + 1e-9


@pytest.mark.parametrize("valid", [0, 1, 7, 8])
def test_folding_is_exact_for_any_caption_length(valid: int) -> None:
    denoiser = random_denoiser()
    latents, sigmas, context = inputs(batch=1, tokens=8)
    mask = (torch.arange(8) < valid)[None]
    context = context * mask[..., None]
    close(denoiser(latents, sigmas, context, context_mask=mask), denoiser(latents, sigmas, context), 2e-6)


def test_one_batch_equals_its_samples() -> None:
    # Batch 1 takes another path through the norms.
    denoiser = random_denoiser()
    latents, sigmas, context = inputs(batch=3)
    singles = [denoiser(latents[i : i + 1], sigmas[i : i + 1], context[i : i + 1]) for i in range(3)]
    close(denoiser(latents, sigmas, context), torch.cat(singles), 2e-6)


def test_splitting_attention_by_sample_changes_nothing() -> None:
    denoiser = random_denoiser()
    expected = denoiser(*inputs())
    denoiser.set_attention("sdpa", split=True)
    close(denoiser(*inputs()), expected, 1e-6)


def test_modulation_vectors_are_the_same_frozen_trainable_and_with_a_neutral_adapter() -> None:
    denoiser = random_denoiser()
    expected = denoiser(*inputs())
    close(denoiser.requires_grad_(True)(*inputs()), expected, 1e-6)
    denoiser.requires_grad_(False)
    for parameter in adapt(denoiser, "adaln_modulation_mlp")[1::2]:
        parameter.data.zero_()
    close(denoiser(*inputs()), expected, 1e-6)


def test_adapters_on_modulation_and_time_embedding_get_gradients() -> None:
    denoiser = random_denoiser()
    parameters = adapt(denoiser, "adaln") + adapt(denoiser, "t_embedder")
    gradients = torch.autograd.grad(denoiser(*inputs()).square().mean(), parameters)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("rank", [SIZES.adaln_rank, 0])
def test_what_trains_before_frozen_modulation_gets_the_whole_gradient(rank: int) -> None:
    denoiser = random_denoiser(replace(SIZES, adaln_rank=rank)).requires_grad_(True)
    before = [*denoiser.t_embedder.parameters(), denoiser.t_embedding_norm.weight]
    gradients = []
    for trains in (True, False):
        for name, parameter in denoiser.named_parameters():
            if "adaln_modulation" in name:
                parameter.requires_grad_(trains)
        gradients.append(torch.autograd.grad(denoiser(*inputs()).square().mean(), before))
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        close(found, expected, 1e-5)


def test_a_forward_under_inference_mode_does_not_spoil_a_later_training_step() -> None:
    denoiser = random_denoiser()
    parameters = adapt(denoiser)
    with torch.inference_mode():
        denoiser(*inputs())
    torch.autograd.grad(denoiser(*inputs()).square().mean(), parameters)


def test_sigma_reaches_the_model_in_float32_whatever_the_weights_are() -> None:
    denoiser = random_denoiser().to(torch.bfloat16)
    near, far = torch.tensor([0.5]), torch.tensor([0.501])
    assert near.bfloat16() == far.bfloat16()
    assert not torch.equal(denoiser.embed_sigmas(near)[0], denoiser.embed_sigmas(far)[0])
    assert denoiser.rope(3, 4, torch.device("cpu")).dtype == torch.float32


# --- blocks as the unit of every service ------------------------------------------------------------------------------


def block_inputs(batch: int, *, bias: bool) -> tuple[Tensor | None, ...]:
    generator = torch.Generator().manual_seed(5)
    angles = rope_angles(3, 4, 32, 4.0)
    return (
        torch.randn(batch, 12, SIZES.width, generator=generator),
        torch.randn(batch, 7, SIZES.text_width, generator=generator),
        torch.randn(9, batch, SIZES.width, generator=generator),
        torch.stack((angles.cos(), angles.sin())),
        torch.zeros(7) if bias else None,
    )


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_a_block_compiles_without_a_graph_break(adapted: bool, batch: int, bias: bool) -> None:
    torch._dynamo.reset()
    block = random_denoiser().blocks[0]
    assert isinstance(block, Block)
    parameters = adapt(block) + adapt(block, "mlp.layer") if adapted else []
    arguments = block_inputs(batch, bias=bias)
    compiled = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    out, expected = compiled(*arguments), block(*arguments)
    close(out, expected, 1e-5)
    if adapted:
        plain = torch.autograd.grad(expected.square().mean(), parameters)
        for one, other in zip(torch.autograd.grad(out.square().mean(), parameters), plain, strict=True):
            assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at its inputs
@pytest.mark.parametrize("level", ["off", "block"])
def test_compiled_blocks_share_their_graphs_and_give_the_same_gradients(level: str) -> None:
    # More blocks than graphs: a guard on a block's identity would compile each, and past a limit fall back to eager.
    denoiser = random_denoiser(replace(SIZES, blocks=5))
    parameters = adapt(denoiser.blocks)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(denoiser(*inputs()).square().mean(), parameters)

    plain = gradients()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for block in denoiser.blocks:
        block.forward = torch.compile(block.forward, backend=counter, fullgraph=True)
    apply_checkpointing(denoiser.blocks, level)
    for expected, actual in zip(plain, gradients(), strict=True):
        assert (actual - expected).norm() <= 1e-5 * expected.norm()
    # The first block's input needs no gradient, the others' does.
    assert counter.frame_count == 2


@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_blocks_give_the_same_bits(every: int) -> None:
    denoiser = random_denoiser()
    parameters = adapt(denoiser)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(denoiser(*inputs()).square().mean(), parameters)

    plain = gradients()
    handle = apply_checkpointing(denoiser.blocks, "block", every)
    for expected, actual in zip(plain, gradients(), strict=True):
        assert torch.equal(actual, expected)
    handle.remove()
    assert all("forward" not in block.__dict__ for block in denoiser.blocks)
