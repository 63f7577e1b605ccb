"""Captions to fields: lengths, masks, padding, and what is stored of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tuner.core.compute.encoders import t5_states
from tuner.core.data.text_cache import join_text, split_text
from tuner.core.registry import open_run
from tuner.core.types import Placement
from tuner.plugins.flux import hooks

CAPTIONS = ["a red cat on the square", "", "dog"]


@pytest.fixture
def encoded(opened):
    """(flavour, sections) -> (fields, facts, models)."""

    def make(flavour: str = "dev", **sections: Any):
        config, found = opened(flavour, **sections)
        models = hooks.load_models(config, found, found.text_components, Placement())
        with torch.no_grad():
            return hooks.encode_text(models, config, found, CAPTIONS, found.text_components).tensors, found, models

    return make


@pytest.mark.parametrize(("flavour", "length"), [("dev", 512), ("schnell", 256)])
def test_without_a_mask_padding_is_part_of_the_text(encoded, flavour, length):
    fields, found, models = encoded(flavour)
    assert set(fields) == {"t5", "clip_pooled"} == set(found.text_fields)
    assert fields["t5"].shape == (3, length, 28)
    ids, _ = models.tokenizers["t5"](CAPTIONS, length)
    assert torch.equal(fields["t5"], t5_states(models.text_encoders["t5"], ids))
    assert fields["clip_pooled"].shape == (3, 20)


def test_a_masked_encoding_is_as_long_as_its_longest_caption_and_equals_the_hidden_part_of_a_full_one(encoded):
    fields, _, models = encoded("dev", text_encoder={"mask_padding": {"t5": True}})
    mask = fields["t5_mask"]
    assert mask.dtype == torch.bool and mask.shape[1] == int(mask.sum(dim=1).max()) < 30
    ids, real = models.tokenizers["t5"](CAPTIONS, 512)
    whole = t5_states(models.text_encoders["t5"], ids, real)
    assert torch.equal(real[:, : mask.shape[1]], mask)
    torch.testing.assert_close(fields["t5"][mask], whole[real], rtol=0, atol=1e-5)
    assert not fields["t5"][~mask].any()


def test_chroma_sees_one_token_of_padding(encoded):
    fields, found, models = encoded("chroma")
    assert set(fields) == {"t5", "t5_mask"} and found.text_components == ("t5",)
    _, real = models.tokenizers["t5"](CAPTIONS, 512)
    assert (fields["t5_mask"].sum(dim=1) == real.sum(dim=1) + 1).all()
    assert fields["t5"][fields["t5_mask"]].any(dim=-1).all()


def test_a_caption_as_long_as_the_limit_has_no_padding_to_show(encoded):
    fields, _, _ = encoded("chroma", text_encoder={"max_tokens": {"t5": 4}})
    assert fields["t5"].shape[1] == 4
    assert fields["t5_mask"][0].all()


def test_zeroed_padding_keeps_its_length(encoded):
    fields, found, models = encoded("dev", text_encoder={"zero_padding": True})
    plain, _, _ = encoded("dev")
    _, real = models.tokenizers["t5"](CAPTIONS, 512)
    assert fields["t5"].shape == (3, 512, 28)
    assert torch.equal(fields["t5"][real], plain["t5"][real])
    assert not fields["t5"][~real].any()
    assert found.text_fields["t5"].floor == 512


@pytest.mark.parametrize(
    ("flavour", "sections"),
    [
        ("dev", {}),
        ("dev", {"text_encoder": {"mask_padding": {"t5": True}}}),
        ("dev", {"text_encoder": {"zero_padding": True}}),
        ("chroma", {}),
        ("chroma", {"text_encoder": {"zero_padding": True}}),
    ],
)
def test_what_is_stored_comes_back_as_it_was(encoded, flavour, sections):
    from tuner.core.types import TextEmbeds

    fields, found, _ = encoded(flavour, **sections)
    rows = split_text(TextEmbeds(tensors=fields), found.text_fields)
    back = join_text(rows, found.text_fields).tensors
    assert all(torch.equal(back[name], value) for name, value in fields.items())


@pytest.mark.parametrize("flavour", ["dev", "chroma"])
def test_an_empty_caption_whose_text_is_zeros_and_hidden_can_be_predicted_from_the_cache(opened, flavour):
    """Nothing of it is stored, yet the denoiser gets a row to hide."""
    sections = {"mask_padding": {"t5": True}, "unconditional": {"t5": "zero"}}
    config, _ = opened(flavour, text_encoder=sections)
    run = open_run(config)
    models = run.model.load_models(run.facts.components)
    noisy, sigmas = torch.ones(1, 16, 4, 4), torch.tensor([0.5])
    with torch.no_grad():
        live = run.model.encode_text(models, [""], run.facts.text_components)
        stored = join_text(split_text(live, run.facts.text_fields), run.facts.text_fields)
        assert stored.tensors["t5"].shape == (1, 1, 28) and not stored.tensors["t5_mask"].any()
        expected = run.model.predict(models, noisy, sigmas, live)
        torch.testing.assert_close(run.model.predict(models, noisy, sigmas, stored), expected)


def test_clip_is_pooled_at_the_first_end_token_without_the_projection(encoded):
    fields, _, models = encoded("dev")
    tokenizer, encoder = models.tokenizers["clip_l"], models.text_encoders["clip_l"]
    ids, _ = tokenizer(CAPTIONS, 77)
    with torch.no_grad():
        last = encoder.text_model(input_ids=ids).last_hidden_state
    places = [row.tolist().index(tokenizer.end_id) for row in ids]
    wanted = torch.stack([last[number, place] for number, place in enumerate(places)])
    torch.testing.assert_close(fields["clip_pooled"], wanted)


def test_only_the_fields_of_the_asked_components_are_made(opened):
    config, found = opened()
    models = hooks.load_models(config, found, ["clip_l"], Placement())
    fields = hooks.encode_text(models, config, found, CAPTIONS, ["clip_l"]).tensors
    assert set(fields) == {"clip_pooled"}
    assert set(models.text_encoders) == {"clip_l"}
