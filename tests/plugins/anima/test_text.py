"""Adapter, encoder and tokenizers against the reference's numbers, and the speed-ups that must not change them.

Golden data: executions of kohya-ss/sd-scripts on tiny random models, float32, CPU (tests/golden/anima).
"""

from __future__ import annotations

import logging
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.fixtures.tiny_anima import CHARACTERS, T5_WORDS
from tests.helpers import golden, golden_path
from tuner.core.compute.weights import assign, read_tensors
from tuner.core.errors import UsageError
from tuner.core.files import safetensors_header
from tuner.plugins.anima.sizes import adapter_names, adapter_sizes, encoder_names, encoder_sizes
from tuner.plugins.anima.text import CaptionTokenizer, LLMAdapter, build_encoder, encode_states, load_tokenizer

PARITY = 3e-5
TOKENIZER_FILES = "TUNER_TEST_TOKENIZERS"
"""Environment variable: a folder with the public tokenizer files in ``qwen3`` and ``t5``."""


@pytest.fixture(scope="module")
def adapter() -> LLMAdapter:
    header = safetensors_header(golden_path("anima/adapter_weights.safetensors"))
    header = header.renamed(adapter_names(header))
    with torch.device("meta"):
        module = LLMAdapter(adapter_sizes(header))
    assign(module, read_tensors(header), dtype=torch.float32)
    return module


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    data = golden("anima/adapter_forward.safetensors")
    return {
        "source": data["source_hidden_states"],
        "source_mask": data["source_attention_mask"].bool(),
        "ids": data["t5_input_ids"],
        "mask": data["t5_attention_mask"].bool(),
        "out": data["out"],
        "out_unpadded_item1": data["out_unpadded_item1"],
    }


def run(adapter: LLMAdapter, inputs: dict[str, Tensor], rows: slice = slice(None)) -> Tensor:
    return adapter(*(inputs[name][rows] for name in ("source", "source_mask", "ids", "mask")))


def test_adapter_equals_the_reference(adapter: LLMAdapter, inputs: dict[str, Tensor]) -> None:
    out = run(adapter, inputs)
    assert (out - inputs["out"]).abs().max() <= PARITY
    assert (out[1:2, :9] - inputs["out_unpadded_item1"]).abs().max() <= PARITY


def test_padding_rows_of_the_context_are_exactly_zero(adapter: LLMAdapter, inputs: dict[str, Tensor]) -> None:
    assert not run(adapter, inputs)[~inputs["mask"]].any()


def test_a_row_without_source_tokens_is_finite_with_finite_gradients(
    adapter: LLMAdapter, inputs: dict[str, Tensor]
) -> None:
    source = inputs["source"].clone().requires_grad_(True)
    out = adapter(source, torch.zeros_like(inputs["source_mask"]), inputs["ids"], inputs["mask"])
    out.sum().backward()
    assert out.isfinite().all()
    assert source.grad is not None
    assert not source.grad.any()


def test_a_row_is_the_same_alone_and_beside_longer_ones(adapter: LLMAdapter, inputs: dict[str, Tensor]) -> None:
    together = run(adapter, inputs)
    for row in range(3):
        alone = run(adapter, inputs, slice(row, row + 1))
        assert (alone - together[row]).abs().max() <= 5e-6


def test_source_states_behind_the_mask_do_not_matter(adapter: LLMAdapter, inputs: dict[str, Tensor]) -> None:
    # The full fine-tuning path of sd-scripts lets this padding take part.
    changed = {**inputs, "source": inputs["source"] + 100.0 * ~inputs["source_mask"][..., None]}
    assert (run(adapter, changed) - run(adapter, inputs)).abs().max() <= 1e-6


def test_only_the_longest_valid_length_is_computed(adapter: LLMAdapter, inputs: dict[str, Tensor]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def flops(padding: int) -> int:
        padded = {
            "source": nn.functional.pad(inputs["source"][1:2], (0, 0, 0, padding)),
            "source_mask": nn.functional.pad(inputs["source_mask"][1:2], (0, padding)),
            "ids": nn.functional.pad(inputs["ids"][1:2], (0, padding)),
            "mask": nn.functional.pad(inputs["mask"][1:2], (0, padding)),
        }
        with FlopCounterMode(display=False) as counter:
            assert run(adapter, padded).shape[1] == 20 + padding
        return int(counter.get_total_flops())

    assert flops(0) == flops(300)


def test_an_embedding_of_another_width_goes_through_the_in_projection() -> None:
    from tuner.plugins.anima.sizes import AdapterSizes

    sizes = AdapterSizes(
        vocab=16, embed_width=24, width=32, source_width=48, out_width=40, layers=1, heads=2, mlp_width=64
    )
    module = LLMAdapter(sizes)
    assert {"in_proj.weight", "in_proj.bias"} <= set(module.state_dict())
    read_back = adapter_sizes({name: _Shape(value) for name, value in module.state_dict().items()})  # type: ignore[misc]
    assert read_back == sizes
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert module(torch.zeros(1, 3, 48), mask, torch.ones(1, 3, dtype=torch.int64), mask).shape == (1, 3, 40)


class _Shape:
    def __init__(self, value: Tensor) -> None:
        self.shape = tuple(value.shape)


# --- Qwen3 ------------------------------------------------------------------------------------------------------------


def encoder(settings: dict[str, Any]) -> nn.Module:
    header = safetensors_header(golden_path("anima/qwen3_weights.safetensors"))
    header = header.renamed(encoder_names(header))
    return build_encoder(read_tensors(header), encoder_sizes(header), settings, dtype=torch.float32)


@pytest.fixture(scope="module")
def qwen3() -> nn.Module:
    return encoder({})


def test_encoder_equals_the_reference(qwen3: nn.Module) -> None:
    data = golden("anima/text_encode.safetensors")
    states = encode_states(qwen3, data["input_ids"], data["attention_mask"].bool())
    assert (states - data["prompt_embeds"]).abs().max() <= 2e-5


def test_a_caption_is_encoded_the_same_alone_and_beside_longer_ones(qwen3: nn.Module) -> None:
    data = golden("anima/text_encode.safetensors")
    alone = encode_states(qwen3, data["input_ids"][1:2, :6], data["attention_mask"][1:2, :6].bool())
    assert (alone - data["prompt_embeds"][1:2, :6]).abs().max() <= 2e-5


def test_encoder_is_frozen_and_in_eval_mode_and_keeps_its_angles_in_float32(qwen3: nn.Module) -> None:
    header = safetensors_header(golden_path("anima/qwen3_weights.safetensors"))
    header = header.renamed(encoder_names(header))
    low = build_encoder(read_tensors(header), encoder_sizes(header), {}, dtype=torch.bfloat16)
    assert not low.training
    assert not any(parameter.requires_grad for parameter in low.parameters())
    assert {buffer.dtype for buffer in low.buffers()} == {torch.float32}
    assert {parameter.dtype for parameter in low.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "settings",
    [{"rope_theta": 500.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}],
    ids=["old", "new"],
)
def test_the_rotary_base_of_a_config_file_is_honoured_in_both_spellings(
    qwen3: nn.Module, settings: dict[str, Any]
) -> None:
    # transformers 5 moved the key.
    data = golden("anima/text_encode.safetensors")
    other = encode_states(encoder(settings), data["input_ids"], data["attention_mask"].bool())
    usual = encode_states(encoder({"rope_theta": 1e6}), data["input_ids"], data["attention_mask"].bool())
    assert torch.equal(usual, encode_states(qwen3, data["input_ids"], data["attention_mask"].bool()))
    assert (other - usual).abs().max() > 1e-3


def test_an_output_head_in_the_file_is_ignored() -> None:
    header = {"model.norm.weight": 0, "lm_head.weight": 0, "model.layers.0.self_attn.rotary_emb.inv_freq": 0}
    assert encoder_names(header) == {"norm.weight": "model.norm.weight"}


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizers(tiny: dict[str, Any]) -> dict[str, CaptionTokenizer]:
    return {
        "qwen3": load_tokenizer("qwen3", Path(tiny["text_encoders"]["qwen3"]["path"])),
        "t5": load_tokenizer("t5", Path(tiny["tokenizers"]["t5"]["path"])),
    }


def test_an_empty_caption_has_no_qwen3_token_and_one_t5_token(tokenizers: dict[str, CaptionTokenizer]) -> None:
    assert tokenizers["qwen3"].ids([""]) == [[]]
    assert tokenizers["t5"].ids([""]) == [[1]]
    ids, mask = tokenizers["qwen3"]([""], 512)
    assert ids.shape == mask.shape == (1, 1)
    assert not mask.any()


def test_rows_are_padded_on_the_right_to_the_longest_caption_only(tokenizers: dict[str, CaptionTokenizer]) -> None:
    ids, mask = tokenizers["t5"](["a photo of a red cat", "a cat", ""], 512)
    assert ids.tolist() == [[4, 5, 6, 4, 7, 12, 1], [4, 12, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]]
    assert mask.sum(1).tolist() == [7, 3, 1]
    assert mask[1].tolist() == [True] * 3 + [False] * 4


def test_cut_t5_captions_keep_their_end_token(tokenizers: dict[str, CaptionTokenizer]) -> None:
    ids, mask = tokenizers["t5"](["a photo of a red cat"], 4)
    assert ids.tolist() == [[4, 5, 6, 1]]
    assert mask.all()


def test_cut_captions_are_counted_and_reported(tiny: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    # sd-scripts cuts captions over the limit in silence.
    tokenizer = load_tokenizer("t5", Path(tiny["tokenizers"]["t5"]["path"]))
    with caplog.at_level(logging.WARNING):
        tokenizer(["a cat"], 3)
        assert not caplog.records
        for _ in range(12):
            tokenizer(["a photo of a red cat", "a cat"], 4)
    assert tokenizer.cut == 12
    assert [record.getMessage() for record in caplog.records] == [
        "1 caption(s) so far exceed 4 T5 tokens and were cut",
        "10 caption(s) so far exceed 4 T5 tokens and were cut",
    ]


def test_lengths_count_tokens_before_cutting(tokenizers: dict[str, CaptionTokenizer]) -> None:
    assert tokenizers["t5"].lengths(["a photo of a red cat", ""]) == [7, 1]
    assert tokenizers["qwen3"].lengths(["red", ""]) == [1, 0]


def test_special_tokens_are_never_added(tokenizers: dict[str, CaptionTokenizer]) -> None:
    ids = tokenizers["qwen3"].ids(["red"])[0]
    assert tokenizers["qwen3"].pad_id not in ids


@pytest.mark.skipif(TOKENIZER_FILES not in os.environ, reason=f"{TOKENIZER_FILES} does not name the public tokenizers")
def test_the_public_tokenizers_give_the_reference_ids() -> None:
    folder = Path(os.environ[TOKENIZER_FILES])
    qwen3, t5 = load_tokenizer("qwen3", folder / "qwen3"), load_tokenizer("t5", folder / "t5")
    for case in golden("anima/tokenizer_ids.json"):
        assert qwen3.ids([case["text"]]) == [case["qwen3"]]
        assert t5.ids([case["text"]]) == [case["t5"]]
    assert qwen3.pad_id == 151643


def piece(text: str, score: float) -> bytes:
    """One vocabulary entry of a sentencepiece model, as its protocol buffer spells it."""
    content = text.encode()
    inner = bytes([0x0A, len(content)]) + content + b"\x15" + struct.pack("<f", score) + b"\x18\x01"
    return bytes([0x0A, len(inner)]) + inner


def test_a_bare_sentencepiece_model_serves_as_t5_tokenizer(
    tokenizers: dict[str, CaptionTokenizer], tmp_path: Path
) -> None:
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    vocabulary += [(f"▁{word}", -3.0) for word in T5_WORDS] + [(character, -8.0) for character in CHARACTERS]
    (tmp_path / "spiece.model").write_bytes(b"".join(piece(*entry) for entry in vocabulary))
    captions = ["a photo of a red cat, 日本", "", "blue square xyz"]
    for path in (tmp_path, tmp_path / "spiece.model"):
        assert load_tokenizer("t5", path).ids(captions) == tokenizers["t5"].ids(captions)


@pytest.mark.parametrize("content", [b"\x0a\xff\xff", b"", b"\x0f" * 9, b"\x0a\x02\x0a\x00"])
def test_another_file_is_no_sentencepiece_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(UsageError, match="not a sentencepiece model"):
        load_tokenizer("t5", tmp_path)
