"""Whether weight files are whole: the tensors that each component must have, known from its sizes. No torch.

The loaders are as strict; this look at the headers tells the same before anything has been encoded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from tuner.core.errors import UsageError
from tuner.core.files import key_mismatch

from . import vae_names
from .sizes import looks_like

if TYPE_CHECKING:
    from .sizes import AdapterSizes, DenoiserSizes, EncoderSizes

DENOISER_LAYERS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.output_proj", "self_attn.q_norm",
    "self_attn.k_norm", "cross_attn.q_proj", "cross_attn.k_proj", "cross_attn.v_proj", "cross_attn.output_proj",
    "cross_attn.q_norm", "cross_attn.k_norm", "mlp.layer1", "mlp.layer2",
)  # fmt: skip
MODULATIONS = ("adaln_modulation_self_attn", "adaln_modulation_cross_attn", "adaln_modulation_mlp")
ADAPTER_LAYERS = (
    "norm_self_attn", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "self_attn.q_norm", "self_attn.k_norm", "norm_cross_attn", "cross_attn.q_proj", "cross_attn.k_proj",
    "cross_attn.v_proj", "cross_attn.o_proj", "cross_attn.q_norm", "cross_attn.k_norm", "norm_mlp", "mlp.0", "mlp.2",
)  # fmt: skip
ENCODER_LAYERS = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
)  # fmt: skip


def denoiser_keys(sizes: DenoiserSizes) -> set[str]:
    """Original names of all tensors of the denoiser."""
    numbers = (1, 2) if sizes.adaln_rank else (1,)
    layers = [*DENOISER_LAYERS, *(f"{name}.{number}" for name in MODULATIONS for number in numbers)]
    modules = ["x_embedder.proj.1", "t_embedder.1.linear_1", "t_embedder.1.linear_2", "t_embedding_norm"]
    modules += ["final_layer.linear", *(f"final_layer.adaln_modulation.{number}" for number in numbers)]
    modules += [f"blocks.{index}.{layer}" for index in range(sizes.blocks) for layer in layers]
    keys = {f"{module}.weight" for module in modules}
    return keys if sizes.adaln_rank else keys | {"t_embedder.1.linear_1.bias"}


def adapter_keys(sizes: AdapterSizes) -> set[str]:
    """Names of all tensors of the adapter, without prefix."""
    modules = ["embed", "norm", "out_proj"]
    modules += [f"blocks.{index}.{layer}" for index in range(sizes.layers) for layer in ADAPTER_LAYERS]
    keys = {f"{module}.weight" for module in modules} | {"out_proj.bias"}
    keys |= {f"blocks.{index}.mlp.{number}.bias" for index in range(sizes.layers) for number in (0, 2)}
    if sizes.embed_width != sizes.width:
        keys |= {"in_proj.weight", "in_proj.bias"} if sizes.in_proj_bias else {"in_proj.weight"}
    return keys


def encoder_keys(sizes: EncoderSizes) -> set[str]:
    """Names of all tensors of the text encoder, relative to its inner model."""
    modules = ["embed_tokens", "norm"]
    modules += [f"layers.{index}.{layer}" for index in range(sizes.layers) for layer in ENCODER_LAYERS]
    return {f"{module}.weight" for module in modules}


def key_problems(found: Collection[str], expected: set[str], where: str, prefix: str = "") -> list[UsageError]:
    """What tensors a file lacks, and which it should not have; ``prefix`` goes before each name."""
    missing, unknown = expected - set(found), set(found) - expected
    error = key_mismatch([prefix + name for name in missing], [prefix + name for name in unknown], where)
    return [] if error is None else [error]


def vae_problems(keys: Iterable[str], where: str) -> list[UsageError]:
    """The same for the keys of a VAE's file, in either layout."""
    keys = list(keys)
    found = {name for name in vae_names.names(keys) if not vae_names.UNUSED.fullmatch(name)}
    if {"encoder.conv1.weight", "decoder.conv1.weight", "conv1.bias"} <= found:
        return key_problems(found, vae_names.expected_names(found), where)
    kind = looks_like(keys)
    why = "encoder.conv1, decoder.conv1 or conv1 is absent" + (f"; it looks like {kind}" if kind else "")
    fix = "set model.vae.path to the qwen_image_vae file"
    return [UsageError("this is not a Qwen-Image VAE", where=where, why=why, fix=fix)]
