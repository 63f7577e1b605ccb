"""Three encoders: what the denoiser gets from them, what masks, dropout and empty captions do, and a missing T5."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tuner.core.errors import UsageError
from tuner.core.registry import open_run
from tuner.core.registry.blank import blank_text
from tuner.core.types import TextEmbeds
from tuner.plugins.sd3 import text as captioning

CAPTIONS = ["a red dog", "", "photo of the blue circle on a green square"]
ENCODERS = ("clip_l", "clip_g", "t5")
FP32 = {"compute": "fp32", "text_encoder": dict.fromkeys(ENCODERS, "fp32")}


@pytest.fixture
def opened(tiny, run_config):
    """(sections) -> an open run on a tiny model, and its text encoders."""

    def make(layout="all-in-one", with_t5=True, **sections):
        config = run_config(
            tiny("sd3m", layout, with_t5), **{"precision": FP32 if with_t5 else {"compute": "fp32"}, **sections}
        )
        run = open_run(config)
        return run, run.model.load_models(run.facts.text_components)

    return make


@torch.no_grad()
def test_the_fields_are_made_as_documented(opened, tiny):
    run, models = opened()
    fields = run.model.encode_text(models, CAPTIONS).tensors
    assert {name: tuple(value.shape) for name, value in fields.items()} == {
        "clip_lg": (3, 77, 112), "pooled": (3, 96), "t5": (3, 256, 112),
    }  # fmt: skip
    ids = {name: models.tokenizers[name](CAPTIONS, 77)[0] for name in ("clip_l", "clip_g")}
    end = models.tokenizers["clip_l"].end_id
    assert ids["clip_l"][0, -1] == end and ids["clip_g"][0, -1] == 0
    for name, start, width in (("clip_l", 0, 32), ("clip_g", 32, 64)):
        out = models.text_encoders[name].text_model(input_ids=ids[name], output_hidden_states=True)
        expected = out.hidden_states[-2]
        torch.testing.assert_close(fields["clip_lg"][..., start : start + width], expected, rtol=0, atol=1e-5)
        places = (ids[name] == end).int().argmax(-1)
        pooled = models.text_encoders[name].text_projection(out.last_hidden_state[torch.arange(3), places])
        torch.testing.assert_close(fields["pooled"][:, start : start + width], pooled, rtol=0, atol=1e-5)
    assert not fields["clip_lg"][..., 96:].any()
    context, _ = captioning.context(fields, 112)
    assert torch.equal(context, torch.cat([fields["clip_lg"], fields["t5"]], dim=1))


@pytest.mark.parametrize("layout", ("all-in-one", "separate"))
def test_embedded_encoders_are_really_loaded(opened, tiny, layout):
    _, models = opened(layout)
    file = load_file(tiny("sd3m")["path"])
    for name, key in (("clip_l", "clip_l"), ("clip_g", "clip_g"), ("t5", "t5xxl")):
        prefix = f"text_encoders.{key}.transformer."
        state = models.text_encoders[name].state_dict()
        for stored, value in file.items():
            if stored.startswith(prefix):
                assert torch.equal(state[stored.removeprefix(prefix)], value)
        assert all(value.device.type == "cpu" for value in state.values())


@torch.no_grad()
def test_a_mask_hides_padding_inside_an_encoder_and_changes_nothing_else(opened):
    run, models = opened()
    plain = run.model.encode_text(models, CAPTIONS).tensors
    for name, changed in (("clip", "clip_lg"), ("t5", "t5")):
        masked_run, _ = opened(text_encoder={"mask_padding": {name: True}})
        masked = masked_run.model.encode_text(models, CAPTIONS).tensors
        assert not torch.allclose(masked[changed], plain[changed])
        assert all(torch.equal(masked[key], plain[key]) for key in plain if key not in (changed, "pooled"))


@torch.no_grad()
def test_zeroed_padding_is_zero_behind_the_caption_alone(opened):
    run, models = opened()
    plain = run.model.encode_text(models, CAPTIONS).tensors
    zeroed_run, _ = opened(text_encoder={"zero_padding": True})
    zeroed = zeroed_run.model.encode_text(models, CAPTIONS).tensors
    mask = zeroed["t5_mask"]
    assert mask.sum(-1).tolist() == models.tokenizers["t5"].lengths(CAPTIONS)
    assert torch.equal(zeroed["t5"], plain["t5"] * mask[..., None])


@torch.no_grad()
def test_an_empty_caption_can_be_zeros_for_one_encoder(opened):
    run, models = opened(text_encoder={"unconditional": {"clip_g": "zero", "t5": "empty_string"}})
    usual, _ = opened()
    fields, plain = (each.model.encode_text(models, CAPTIONS).tensors for each in (run, usual))
    assert not fields["clip_lg"][1, :, 32:].any() and not fields["pooled"][1, 32:].any()
    assert torch.equal(fields["clip_lg"][1, :, :32], plain["clip_lg"][1, :, :32])
    assert torch.equal(fields["t5"], plain["t5"])
    assert torch.equal(fields["clip_lg"][[0, 2]], plain["clip_lg"][[0, 2]])


def test_dropping_one_encoder_zeroes_its_part_of_each_field_and_keeps_gradients(opened):
    run, _ = opened()
    fields = {
        "clip_lg": torch.randn(2, 77, 112, requires_grad=True),
        "pooled": torch.randn(2, 96),
        "t5": torch.randn(2, 4, 112),
    }
    kept = {"clip_l": torch.tensor([False, True]), "t5": torch.tensor([True, False])}
    dropped = blank_text(fields, run.facts.text_fields, kept)
    assert (
        not dropped["clip_lg"][0, :, :32].any() and not dropped["pooled"][0, :32].any() and not dropped["t5"][1].any()
    )
    assert torch.equal(dropped["clip_lg"][0, :, 32:], fields["clip_lg"][0, :, 32:])
    assert torch.equal(dropped["clip_lg"][1], fields["clip_lg"][1]) and torch.equal(dropped["t5"][0], fields["t5"][0])
    dropped["clip_lg"].sum().backward()
    assert not fields["clip_lg"].grad[0, :, :32].any() and fields["clip_lg"].grad[1].eq(1).all()


def test_a_missing_t5_is_77_rows_of_zeros(opened):
    run, models = opened(with_t5=False)
    assert "t5" not in run.facts.components and "t5" not in run.facts.text_fields
    fields = run.model.encode_text(models, CAPTIONS).tensors
    context, _ = captioning.context(fields, 112)
    assert context.shape == (3, 154, 112) and not context[:, 77:].any()


@pytest.mark.parametrize("section", ({"dropout": {"t5": 0.1}}, {"mask_padding": {"t5": True}}, {"zero_padding": True}))
def test_options_of_a_missing_t5_are_refused(opened, section):
    with pytest.raises(UsageError, match="text_encoder"):
        opened(with_t5=False, text_encoder=section)


@torch.no_grad()
def test_one_training_clip_leaves_the_other_to_the_cache(opened):
    run, models = opened(train={"components": ["denoiser", "clip_l"]})
    assert set(run.facts.text_fields) == {"clip_l", "pooled_clip_l", "clip_g", "pooled_clip_g", "t5"}
    cached = run.model.encode_text(models, CAPTIONS, ("clip_g", "t5")).tensors
    live = run.model.encode_text(models, CAPTIONS, ("clip_l",)).tensors
    assert set(live) == {"clip_l", "pooled_clip_l"}
    apart = captioning.context({**cached, **live}, 112)
    usual, _ = opened()
    together = captioning.context(usual.model.encode_text(models, CAPTIONS).tensors, 112)
    assert all(torch.equal(*pair) for pair in zip(apart, together, strict=True))


@torch.no_grad()
def test_the_denoiser_sees_what_its_text_says(opened, tiny, run_config):
    run, models = opened()
    text = run.model.encode_text(models, ["a red dog", ""])
    models.denoiser = run.model.load_models(["denoiser"]).denoiser
    assert isinstance(models.denoiser, nn.Module)
    noisy = torch.randn(1, 16, 8, 6).expand(2, -1, -1, -1)
    sigmas = torch.full((2,), 0.7)
    out = run.model.predict(models, noisy, sigmas, text)
    assert out.shape == noisy.shape and not torch.allclose(out[0], out[1])
    blank = TextEmbeds(tensors={name: torch.zeros_like(value) for name, value in text.tensors.items()})
    same = run.model.predict(models, noisy, sigmas, blank)
    torch.testing.assert_close(same[0], same[1])
