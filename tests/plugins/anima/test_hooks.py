"""The hooks of the plugin: one training step equals the reference's, and its known faults are not here.

Golden data: one step of kohya-ss/sd-scripts on a tiny random model, float32, CPU (tests/golden/anima).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from tests.helpers import golden, golden_path
from tuner.core.adapters.files import read_adapter
from tuner.core.adapters.lora import inject_lora
from tuner.core.adapters.network import adapter_strength, network_tensors
from tuner.core.config import RunConfig
from tuner.core.flow.objective import rectified_flow
from tuner.core.rng import Rng
from tuner.core.types import Models, Network, Placement, TextEmbeds
from tuner.plugins.anima import hooks
from tuner.plugins.anima.facts import facts
from tuner.plugins.anima.names import MAPS

Configure = Callable[..., RunConfig]
PARITY = 3e-5
GRADIENTS = 1e-4


@pytest.fixture(scope="module")
def golden_config(tiny: dict[str, Any], run_config: Configure) -> RunConfig:
    """The reference's end-to-end weights beside the tiny text encoder and VAE."""
    return run_config({**tiny, "path": str(golden_path("anima/e2e_weights.safetensors"))})


@pytest.fixture(scope="module")
def golden_models(golden_config: RunConfig) -> Models:
    return hooks.load_models(golden_config, ("denoiser", "llm_adapter"), Placement())


@pytest.fixture(scope="module")
def step() -> dict[str, Tensor]:
    return golden("anima/e2e_step.safetensors")  # type: ignore[no-any-return]


def live_text(step: dict[str, Tensor]) -> TextEmbeds:
    """What the adapter reads, as the loader hands it over."""
    return TextEmbeds(
        tensors={
            "qwen3": step["qwen_hidden"],
            "qwen3_mask": step["qwen_mask"].bool(),
            "t5_ids": step["t5_ids"].long(),
            "t5_mask": step["t5_mask"].bool(),
        }
    )


def trimmed(text: TextEmbeds, source: int, target: int) -> TextEmbeds:
    lengths = {"qwen3": source, "qwen3_mask": source, "t5_ids": target, "t5_mask": target}
    return TextEmbeds(tensors={name: value[:, : lengths[name]] for name, value in text.tensors.items()})


# --- parity -----------------------------------------------------------------------------------------------------------


def test_one_step_has_the_reference_prediction_losses_and_gradients(
    golden_config: RunConfig, step: dict[str, Tensor]
) -> None:
    models = hooks.load_models(golden_config, ("denoiser", "llm_adapter"), Placement())
    assert models.denoiser is not None
    trained = {**dict(models.denoiser.named_parameters())}
    adapter = models.text_encoders["llm_adapter"]
    trained |= {f"llm_adapter.{name}": parameter for name, parameter in adapter.named_parameters()}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    prediction = hooks.predict(models, step["noisy"], step["t"], live_text(step))
    assert (prediction - step["pred"]).abs().max() <= PARITY
    errors = (prediction - step["target"]).square().mean(dim=(1, 2, 3))
    sigma = step["t"]
    weights = {
        "none": torch.ones_like(sigma),
        "sigma_sqrt": sigma**-2,
        "cosmap": 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2)),
    }
    for name, weight in weights.items():
        assert torch.allclose((errors * weight).mean(), step[f"loss.{name}"], rtol=1e-5)
    errors.mean().backward()
    for key, expected in step.items():
        if key.startswith("grad."):
            grad = trained[key.removeprefix("grad.")].grad
            assert grad is not None, key
            assert (grad - expected).norm() / expected.norm() <= GRADIENTS, key
    grads = [parameter.grad for parameter in trained.values() if parameter.grad is not None]
    total = torch.stack([grad.double().norm() for grad in grads]).norm()
    assert abs(total / step["grad_norm_total"] - 1) <= GRADIENTS


def test_the_objective_is_the_reference_one(step: dict[str, Tensor]) -> None:
    made = rectified_flow(step["latents"], step["noise"], step["t"])
    assert torch.allclose(made.noisy, step["noisy"], atol=1e-6)
    assert torch.allclose(made.target, step["target"], atol=1e-6)
    assert torch.equal(made.timesteps, step["t"])


def test_padding_of_the_text_encoder_takes_no_part(golden_models: Models, step: dict[str, Tensor]) -> None:
    # The full fine-tuning path of sd-scripts drops this mask, which moves its prediction by 0.3.
    with torch.no_grad():
        prediction = hooks.predict(golden_models, step["noisy"], step["t"], live_text(step))
    assert (prediction - step["pred_without_source_mask"]).abs().max() > 0.05


def test_the_context_is_padded_to_512_rows_however_short_the_text_arrives(
    golden_models: Models, step: dict[str, Tensor]
) -> None:
    # Zero rows take part in the softmax. In sd-scripts a shorter limit changes that.
    short = trimmed(live_text(step), 172, 190)
    with torch.no_grad():
        prediction = hooks.predict(golden_models, step["noisy"], step["t"], short)
    assert (prediction - step["pred"]).abs().max() <= PARITY


def test_a_cached_context_gives_the_same_prediction_as_the_live_adapter(
    golden_models: Models, step: dict[str, Tensor]
) -> None:
    fields = live_text(step).tensors
    with torch.no_grad():
        context = golden_models.text_encoders["llm_adapter"](*fields.values())[:, :190]
        cached = TextEmbeds(tensors={"context": context, "context_mask": fields["t5_mask"][:, :190]})
        prediction = hooks.predict(golden_models, step["noisy"], step["t"], cached)
    assert (prediction - step["pred"]).abs().max() <= PARITY


def test_sigma_reaches_the_model_unrounded(golden_models: Models, step: dict[str, Tensor]) -> None:
    # sd-scripts rounds the model's time to bfloat16 first.
    shifted = step["t"] + 3e-4
    assert torch.equal(shifted.bfloat16(), step["t"].bfloat16())
    with torch.no_grad():
        one = hooks.predict(golden_models, step["noisy"], step["t"], live_text(step))
        other = hooks.predict(golden_models, step["noisy"], shifted, live_text(step))
    assert (one - other).abs().max() > 1e-6


def test_rotary_angles_stay_float32_in_a_bfloat16_model(golden_config: RunConfig) -> None:
    # sd-scripts casts the frequencies with the model: angles are off by up to 0.1 rad at 1024 pixels.
    dtypes = {"denoiser": "bfloat16", "llm_adapter": "bfloat16"}
    models = hooks.load_models(golden_config, ("denoiser", "llm_adapter"), Placement(dtypes=dtypes))
    exact = hooks.load_models(golden_config, ("denoiser",), Placement())
    for one, other in zip(
        models.denoiser.rope(64, 64, torch.device("cpu")),  # type: ignore[union-attr, operator]
        exact.denoiser.rope(64, 64, torch.device("cpu")),  # type: ignore[union-attr, operator]
        strict=True,
    ):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_a_bfloat16_model_stays_near_the_float32_one(golden_config: RunConfig, step: dict[str, Tensor]) -> None:
    dtypes = {"denoiser": "bfloat16", "llm_adapter": "bfloat16"}
    models = hooks.load_models(golden_config, ("denoiser", "llm_adapter"), Placement(dtypes=dtypes))
    with torch.no_grad():
        prediction = hooks.predict(models, step["noisy"], step["t"], live_text(step))
    assert prediction.dtype == torch.float32
    assert (prediction - step["pred"]).norm() / step["pred"].norm() < 0.05


@pytest.mark.parametrize("size", [(2, 34), (34, 2), (10, 14)])
def test_a_small_image_sees_its_whole_context(golden_config: RunConfig, size: tuple[int, int]) -> None:
    # split_attn of sd-scripts cuts the context to the number of image tokens.
    config = golden_config.model_copy(update={"attention": golden_config.attention.model_copy(update={"split": True})})
    split = hooks.load_models(config, ("denoiser",), Placement())
    plain = hooks.load_models(golden_config, ("denoiser",), Placement())
    rng = Rng(3, "small", *size)
    noisy, context = rng.child("noisy").normal((2, 16, *size)), rng.child("context").normal((2, 512, 64))
    text = TextEmbeds(tensors={"context": context, "context_mask": torch.ones(2, 512, dtype=torch.bool)})
    with torch.no_grad():
        one = hooks.predict(split, noisy, torch.tensor([0.3, 0.8]), text)
        other = hooks.predict(plain, noisy, torch.tensor([0.3, 0.8]), text)
    assert (one - other).abs().max() <= 1e-5


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_models(tiny: dict[str, Any], run_config: Configure) -> Models:
    return hooks.load_models(run_config(tiny), ("qwen3", "llm_adapter"), Placement())


def encode(models: Models, config: RunConfig, *captions: str, training: bool = False) -> dict[str, Tensor]:
    record = facts(config)
    return hooks.encode_text(models, record, captions, ("qwen3",) if training else record.text_components).tensors


def test_captions_become_the_declared_fields(tiny: dict[str, Any], run_config: Configure, text_models: Models) -> None:
    for training in (["denoiser"], ["llm_adapter"]):
        config = run_config(tiny, train={"components": training})
        record = facts(config)
        tensors = hooks.encode_text(text_models, record, ["a red cat", ""], record.text_components).tensors
        assert list(tensors) == list(record.text_fields)
        for name, field in record.text_fields.items():
            assert str(tensors[name].dtype) == f"torch.{field.dtype}"
            assert tensors[name].shape[0] == 2
            assert tensors[name].shape[2:] == field.shape[1:]


def test_only_fields_of_the_asked_components_are_made(
    tiny: dict[str, Any], run_config: Configure, text_models: Models
) -> None:
    record = facts(run_config(tiny, train={"components": ["denoiser", "llm_adapter"]}))
    assert hooks.encode_text(text_models, record, ["a cat"], ("llm_adapter",)).tensors == {}
    assert set(hooks.encode_text(text_models, record, ["a cat"], ("qwen3",)).tensors) == set(record.text_fields)


def test_a_caption_is_encoded_the_same_alone_and_in_a_batch(
    tiny: dict[str, Any], run_config: Configure, text_models: Models
) -> None:
    config = run_config(tiny)
    captions = ["a photo of a red cat on the blue square", "a cat", ""]
    together = encode(text_models, config, *captions)
    for row, caption in enumerate(captions):
        alone = encode(text_models, config, caption)
        length = alone["context"].shape[1]
        assert (together["context"][row, :length] - alone["context"][0]).abs().max() <= 1e-5
        assert not together["context"][row, length:].any()
        assert together["context_mask"][row].sum() == length


def test_the_empty_caption_is_the_trained_unconditional(
    tiny: dict[str, Any], run_config: Configure, text_models: Models
) -> None:
    tensors = encode(text_models, run_config(tiny, train={"components": ["llm_adapter"]}), "", training=True)
    assert not tensors["qwen3"].any()
    assert not tensors["qwen3_mask"].any()
    assert tensors["t5_ids"].tolist() == [[1]]
    assert tensors["t5_mask"].tolist() == [[True]]
    # No valid key anywhere must not make NaN.
    assert encode(text_models, run_config(tiny), "")["context"].isfinite().all()


def test_gradients_reach_a_training_encoder_through_the_frozen_adapter(
    tiny: dict[str, Any], run_config: Configure
) -> None:
    config = run_config(tiny, train={"components": ["qwen3"]}, network={"rank": 2})
    record = facts(config)
    models = hooks.load_models(config, ("denoiser", *record.text_components), Placement())
    network = inject_lora(models, config, record)
    text = hooks.encode_text(models, record, ["a red cat", ""], ("qwen3",))
    prediction = hooks.predict(models, torch.randn(2, 16, 8, 8), torch.tensor([0.2, 0.7]), text)
    prediction.square().mean().backward()
    # sd-scripts un-freezes a parameter of the encoder for checkpointing's sake.
    assert not any(parameter.requires_grad for parameter in models.text_encoders["qwen3"].parameters())
    ups = [
        parameter for group in network.param_groups for name, parameter in group.params.items() if name.endswith(".up")
    ]
    assert len(ups) == 14
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in ups)


# --- latents ----------------------------------------------------------------------------------------------------------


def test_latents_are_the_mode_unless_a_sample_is_asked_for(tiny: dict[str, Any], run_config: Configure) -> None:
    models = hooks.load_models(run_config(tiny), ("vae",), Placement())
    pixels = Rng(0, "pixels").uniform((1, 3, 48, 32)) * 2 - 1
    rng = Rng(0, "image")
    with torch.no_grad():
        mode = hooks.encode_latents(models, run_config(tiny), pixels, None)
        assert torch.equal(mode, hooks.encode_latents(models, run_config(tiny), pixels, rng))
        config = run_config(tiny, latents={"posterior": "sample"})
        sample = hooks.encode_latents(models, config, pixels, rng)
        assert torch.equal(sample, hooks.encode_latents(models, config, pixels, rng))
        assert not torch.equal(sample, mode)
        assert mode.shape == (1, 16, 6, 4)
        assert hooks.decode_latents(models, mode).shape == pixels.shape


def test_the_chunk_size_reaches_the_vae(tiny: dict[str, Any], run_config: Configure) -> None:
    models = hooks.load_models(run_config(tiny, latents={"chunk_size": 5}), ("vae",), Placement())
    assert isinstance(models.vae, nn.Module)
    assert {module.band_rows for module in models.vae.modules() if hasattr(module, "band_rows")} == {6}


# --- LoRA and saving --------------------------------------------------------------------------------------------------


def lora(config: RunConfig) -> tuple[Models, Network]:
    record = facts(config)
    models = hooks.load_models(config, ("denoiser", "llm_adapter"), Placement())
    network = inject_lora(models, config, record)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return models, network


@pytest.mark.parametrize("name", [each.name for each in MAPS.formats])
def test_a_saved_adapter_reads_back_to_the_same_update(
    tiny: dict[str, Any], run_config: Configure, tmp_path: Path, name: str
) -> None:
    config = run_config(
        tiny,
        train={"components": ["denoiser", "llm_adapter"]},
        network={"rank": 4, "alpha": 2},
        checkpoint={"format": name},
    )
    _, network = lora(config)
    tensors = network_tensors(network)
    assert len(tensors) == 3 * 40
    paths = hooks.save(config, facts(config), network, tensors, tmp_path / "lora.safetensors", {"ss_seed": "0"})
    assert paths == [tmp_path / "lora.safetensors"]
    read = read_adapter(paths[0], MAPS)
    for key in {key.rpartition(".")[0] for key in tensors}:
        deltas = [
            each[f"{key}.up"] @ each[f"{key}.down"] * (each[f"{key}.alpha"] / 4) for each in (tensors, read.tensors)
        ]
        assert torch.allclose(*deltas, atol=1e-6), key


def test_the_strength_of_an_adapter_moves_the_prediction(tiny: dict[str, Any], run_config: Configure) -> None:
    config = run_config(tiny, network={"rank": 4})
    models, network = lora(config)
    text = TextEmbeds(
        tensors={"context": Rng(1, "c").normal((1, 6, 64)), "context_mask": torch.ones(1, 6, dtype=torch.bool)}
    )
    noisy = Rng(1, "n").normal((1, 16, 8, 8))
    with torch.no_grad():
        adapted = hooks.predict(models, noisy, torch.tensor([0.5]), text)
        with adapter_strength(network, 0.0):
            base = hooks.predict(models, noisy, torch.tensor([0.5]), text)
        plain = hooks.load_models(config, ("denoiser",), Placement())
        assert torch.equal(base, hooks.predict(plain, noisy, torch.tensor([0.5]), text))
    assert (adapted - base).abs().max() > 1e-3


def test_exported_metadata_name_the_architecture_and_no_path(
    tiny: dict[str, Any], run_config: Configure, tmp_path: Path
) -> None:
    config = run_config(tiny, network={"rank": 4}, noise={"timesteps": "shift", "shift": 3.0})
    _, network = lora(config)
    path = tmp_path / "lora.safetensors"
    hooks.save(config, facts(config), network, network_tensors(network), path, {"modelspec.title": "hero"})
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.title"] == "hero"
    assert metadata["modelspec.architecture"] == "anima-2x96/lora"
    assert metadata["modelspec.resolution"] == "64x64"
    assert metadata["ss_network_dim"] == "4"
    assert metadata["ss_timestep_sampling"] == "shift"
    assert metadata["ss_discrete_flow_shift"] == "3.0"
    private = (str(tmp_path), tiny["path"], str(Path.home()))
    assert not any(value in text for value in private for text in metadata.values())


def test_exported_metadata_name_the_density_and_what_was_adapted(
    tiny: dict[str, Any], run_config: Configure, tmp_path: Path
) -> None:
    network = {"rank": 4, "exclude": [r".*mlp.*"], "init_from": str(tmp_path / "start.safetensors")}
    config = run_config(tiny, network=network, noise={"timesteps": "sigma", "density": "logit_normal"})
    metadata = hooks.own_metadata(config, facts(config))
    assert metadata["ss_weighting_scheme"] == "logit_normal"
    assert json.loads(metadata["ss_network_args"]) == {"components": ["denoiser"], "exclude": [".*mlp.*"]}


def test_embedding_metadata_can_be_switched_off(tiny: dict[str, Any], run_config: Configure, tmp_path: Path) -> None:
    config = run_config(tiny, network={"rank": 4}, checkpoint={"metadata": {"embed": False}})
    _, network = lora(config)
    path = tmp_path / "lora.safetensors"
    hooks.save(config, facts(config), network, network_tensors(network), path, {})
    with safe_open(path, "pt") as file:
        assert set(file.metadata()) == {"sshs_model_hash", "sshs_legacy_hash"}
