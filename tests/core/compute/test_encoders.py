from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tuner.core.compute.encoders import clip_states, load_clip, load_t5, t5_states
from tuner.core.errors import UsageError
from tuner.core.files import weight_header

END = 49


@pytest.fixture(scope="module")
def clip():
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=128, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        projection_dim=24, bos_token_id=48, eos_token_id=END, pad_token_id=END, hidden_act="quick_gelu",
    )  # fmt: skip
    return CLIPTextModelWithProjection(config).eval()


@pytest.fixture(scope="module")
def t5():
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=50, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()


@pytest.fixture
def ids():
    rows = torch.full((2, 12), END)
    rows[0, :4] = torch.tensor([48, 3, 4, 5])
    rows[1, :2] = torch.tensor([48, 7])
    return rows


SPELLINGS = {
    "own": lambda name: name,
    "no text_model level": lambda name: name.removeprefix("text_model."),
    "inside a model": lambda name: f"text_encoder.{name}",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_clip_loads_in_every_spelling_and_agrees_with_transformers(clip, ids, tmp_path, spelling):
    tensors = {SPELLINGS[spelling](name): value.contiguous() for name, value in clip.state_dict().items()}
    tensors["logit_scale"] = torch.tensor(1.0)
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, tmp_path / "clip.safetensors")
    loaded = load_clip(weight_header(tmp_path / "clip.safetensors"), activation="quick_gelu", dtype=torch.float32)
    wanted = clip(input_ids=ids, output_hidden_states=True)
    found = clip_states(loaded, ids, END)
    assert torch.allclose(found.projected, wanted.text_embeds, atol=1e-6)
    assert torch.allclose(found.before_last, wanted.hidden_states[-2], atol=1e-6)
    assert torch.allclose(found.pooled, found.last[torch.arange(2), torch.tensor([4, 2])])
    assert not any(value.is_meta for value in loaded.state_dict().values())


def test_clip_without_projection_projects_by_the_identity(clip, ids, tmp_path):
    tensors = {name: value.contiguous() for name, value in clip.state_dict().items() if "projection" not in name}
    save_file(tensors, tmp_path / "clip.safetensors")
    loaded = load_clip(weight_header(tmp_path / "clip.safetensors"), activation="quick_gelu", dtype=torch.float32)
    states = clip_states(loaded, ids, END)
    assert torch.equal(states.projected, states.pooled)


def test_clip_reads_its_own_settings_and_not_those_of_a_neighbour_in_the_folder(clip, ids, tmp_path):
    save_file({name: value.contiguous() for name, value in clip.state_dict().items()}, tmp_path / "clip.safetensors")
    header = weight_header(tmp_path / "clip.safetensors")

    def states(settings):
        loaded = load_clip(header, activation="quick_gelu", dtype=torch.float32, settings=settings)
        return clip_states(loaded, ids, END).last

    plain = states(None)
    assert torch.equal(states({"num_attention_heads": 4, "hidden_act": "gelu"}), plain)
    assert torch.equal(states({"hidden_size": 256, "num_attention_heads": 4}), plain)
    assert not torch.equal(states({"hidden_size": 128, "num_attention_heads": 4}), plain)


@pytest.mark.parametrize("spelling", ["shared.weight", "encoder.embed_tokens.weight"])
def test_t5_loads_with_either_name_of_its_embedding_and_agrees_with_transformers(t5, tmp_path, spelling):
    tensors = {name: value.contiguous() for name, value in t5.state_dict().items() if "embed_tokens" not in name}
    tensors[spelling] = tensors.pop("shared.weight")
    save_file(tensors, tmp_path / "t5.safetensors")
    loaded = load_t5(weight_header(tmp_path / "t5.safetensors"), dtype=torch.float32)
    ids = torch.tensor([[4, 5, 6, 1, 0, 0], [4, 1, 0, 0, 0, 0]])
    mask = ids > 0
    with torch.no_grad():
        for given in (None, mask):
            wanted = t5(input_ids=ids, attention_mask=None if given is None else given.long()).last_hidden_state
            assert torch.allclose(t5_states(loaded, ids, given), wanted, atol=1e-5)


def test_float8_weights_are_widened_and_scaled_ones_refused(t5, tmp_path):
    tensors = {name: value.to(torch.float8_e4m3fn) for name, value in t5.state_dict().items()}
    del tensors["encoder.embed_tokens.weight"]
    save_file(tensors, tmp_path / "t5.safetensors")
    loaded = load_t5(weight_header(tmp_path / "t5.safetensors"), dtype=torch.bfloat16)
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    assert torch.equal(loaded.state_dict()[name], tensors[name].to(torch.bfloat16))
    tensors["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "scaled.safetensors")
    with pytest.raises(UsageError, match="scaled 8-bit"):
        load_t5(weight_header(tmp_path / "scaled.safetensors"), dtype=torch.bfloat16)


def test_missing_tensors_are_named(t5, tmp_path):
    tensors = {name: value.contiguous() for name, value in t5.state_dict().items() if "embed_tokens" not in name}
    del tensors["encoder.final_layer_norm.weight"]
    save_file(tensors, tmp_path / "t5.safetensors")
    with pytest.raises(UsageError, match=r"encoder\.final_layer_norm\.weight"):
        load_t5(weight_header(tmp_path / "t5.safetensors"), dtype=torch.float32)
