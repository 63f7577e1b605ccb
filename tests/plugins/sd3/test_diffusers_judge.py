"""diffusers' own pipeline loads what we export, through its public door, and computes what we compute.

diffusers is an outside judge here: nothing of ours takes part in its adapter loading and its forward pass.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tuner.core.adapters.files import save_adapter
from tuner.core.adapters.formats import format_by_name
from tuner.core.adapters.network import network_tensors
from tuner.core.compute.encoders import clip_states, load_clip, load_t5, t5_states
from tuner.core.registry import open_run
from tuner.plugins.sd3.load import denoiser_tensors
from tuner.plugins.sd3.names import MAPS
from tuner.plugins.sd3.sources import resolve

AGREEMENT = 2e-5
EFFECT = 1e-2
CAPTIONS = ["a red dog", "photo of a blue circle"]
COMPONENTS = ("denoiser", "clip_l", "clip_g", "t5")
TRAINED = ["denoiser", "clip_l", "clip_g"]
"""The pipeline loads no adapter into T5."""


def judge(config: Any, transformer: Any) -> Any:
    """diffusers' SD3 pipeline with the weights of a tiny model; the transformer is diffusers' own."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    sources = resolve(config)
    header = sources.denoiser.header()
    model = SD3Transformer2DModel.from_config(transformer.config)
    model.load_state_dict(dict(denoiser_tensors(header, len(transformer.transformer_blocks))), strict=True)
    encoders = [
        load_clip(sources.part("clip_l").header(), activation="quick_gelu", dtype=torch.float32),
        load_clip(sources.part("clip_g").header(), activation="gelu", dtype=torch.float32),
        load_t5(sources.part("t5").header(), dtype=torch.float32),
    ]
    return StableDiffusion3Pipeline(
        transformer=model.eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=None,
        text_encoder=encoders[0], text_encoder_2=encoders[1], text_encoder_3=encoders[2],
        tokenizer=None, tokenizer_2=None, tokenizer_3=None,
    )  # fmt: skip


@pytest.mark.parametrize("flavour", ("sd3m", "sd35m", "sd35l"))
def test_the_pipeline_predicts_as_we_do_with_our_exported_adapter(tiny, run_config, tmp_path, flavour):
    config = run_config(
        tiny(flavour), network={"preset": "all", "rank": 3, "alpha": 2.0}, train={"components": TRAINED},
        precision={"compute": "fp32", "text_encoder": {"t5": "fp32"}},
    )  # fmt: skip
    run = open_run(config)
    models = run.model.load_models(COMPONENTS)
    pipeline = judge(config, models.denoiser)
    network = run.model.build_network(models)
    generator = torch.Generator().manual_seed(1)
    for parameter in network.module.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    path = save_adapter(network_tensors(network), format_by_name(MAPS, "diffusers"), tmp_path / "lora.safetensors", {})

    noisy, sigmas = torch.randn(2, 16, 8, 12, generator=generator), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        text = run.model.encode_text(models, CAPTIONS)
        ours = run.model.predict(models, noisy, sigmas, text)
        before = theirs(pipeline, models, noisy, sigmas)
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
        after = theirs(pipeline, models, noisy, sigmas)
    assert (after - before).abs().max() > EFFECT
    torch.testing.assert_close(after, ours, rtol=0, atol=AGREEMENT)


def theirs(pipeline: Any, models: Any, noisy: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """The prediction of the pipeline's parts for the tokens of the captions."""
    states = []
    for name, encoder in (("clip_l", pipeline.text_encoder), ("clip_g", pipeline.text_encoder_2)):
        ids, _ = models.tokenizers[name](CAPTIONS, 77)
        states.append(clip_states(encoder, ids, models.tokenizers[name].end_id))
    clip = torch.cat([each.before_last for each in states], dim=-1)
    ids, _ = models.tokenizers["t5"](CAPTIONS, 256)
    t5 = t5_states(pipeline.text_encoder_3, ids)
    clip = torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
    return pipeline.transformer(
        hidden_states=noisy,
        encoder_hidden_states=torch.cat([clip, t5], dim=1),
        pooled_projections=torch.cat([each.projected for each in states], dim=-1),
        timestep=sigmas * 1000,
        return_dict=False,
    )[0]


@torch.no_grad()
def test_previews_follow_the_pipelines_schedule_and_decode_with_its_autoencoder(tiny, run_config):
    from diffusers import FlowMatchEulerDiscreteScheduler

    from tuner.core.flow import euler_sigmas

    run = open_run(run_config(tiny()))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    ours = euler_sigmas(7, 3.0, run.facts.sample.schedule)
    torch.testing.assert_close(ours, scheduler.sigmas, rtol=0, atol=1e-6)
    models = run.model.load_models(["vae"])
    latents = torch.randn(1, 16, 8, 6)
    decoded = models.vae.decode(latents / 1.5305 + 0.0609).sample
    torch.testing.assert_close(run.model.decode_latents(models, latents), decoded.clamp(-1, 1), rtol=0, atol=1e-6)
    pixels = torch.rand(1, 3, 64, 48) * 2 - 1
    mean = (models.vae.encode(pixels).latent_dist.mean - 0.0609) * 1.5305
    torch.testing.assert_close(run.model.encode_latents(models, pixels), mean, rtol=0, atol=1e-6)
