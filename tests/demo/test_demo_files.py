"""The embedded demo model: real file layouts, small, with tokenizers that behave like the real ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import safe_open

from examples.demo.build import pictures
from examples.demo.build.captions import every_caption

DEMO = Path(__file__).parents[2] / "examples" / "demo"
MODELS = DEMO / "models"


def header(path: Path) -> dict[str, tuple[list[int], str]]:
    with safe_open(path, "pt") as file:
        return {key: (file.get_slice(key).get_shape(), file.get_slice(key).get_dtype()) for key in file.keys()}  # noqa: SIM118


def test_the_model_files_together_stay_below_12_megabytes() -> None:
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) <= 12_000_000


def test_the_denoiser_file_has_the_published_names_and_holds_the_adapter() -> None:
    tensors = header(MODELS / "anima_tiny.safetensors")
    assert all(key.startswith("net.") for key in tensors)
    assert {dtype for _, dtype in tensors.values()} == {"BF16"}
    assert tensors["net.x_embedder.proj.1.weight"][0] == [192, 68]
    assert tensors["net.final_layer.linear.weight"][0] == [64, 192]
    assert tensors["net.blocks.3.cross_attn.k_proj.weight"][0] == [192, 128]
    assert tensors["net.llm_adapter.embed.weight"][0] == [256, 128]
    assert "net.llm_adapter.blocks.1.cross_attn.o_proj.weight" in tensors


def test_the_vae_file_has_the_original_layout_with_empty_earlier_time_slices() -> None:
    path = MODELS / "vae.safetensors"
    tensors = header(path)
    assert len(tensors) == 194
    assert {dtype for _, dtype in tensors.values()} == {"F16"}
    assert tensors["encoder.conv1.weight"][0] == [12, 3, 3, 3, 3]
    assert tensors["conv2.weight"][0] == [16, 16, 1, 1, 1]
    with safe_open(path, "pt") as file:
        kernel = file.get_tensor("decoder.middle.0.residual.2.weight")
    assert kernel[:, :, :2].abs().max() == 0
    assert kernel[:, :, 2].abs().max() > 0


@pytest.fixture(scope="module")
def qwen() -> Iterator[object]:
    from transformers import AutoTokenizer

    yield AutoTokenizer.from_pretrained(MODELS / "qwen3")


@pytest.fixture(scope="module")
def t5() -> Iterator[object]:
    from transformers import AutoTokenizer

    yield AutoTokenizer.from_pretrained(MODELS / "t5")


def test_the_qwen_tokenizer_adds_nothing_and_knows_its_padding(qwen) -> None:
    assert qwen("").input_ids == []
    assert qwen.pad_token_id == 381
    ids = qwen("a red wug on gray, Ünïcode 日本").input_ids
    assert qwen.decode(ids) == "a red wug on gray, Ünïcode 日本"
    assert max(ids) < 381


def test_the_t5_tokenizer_appends_the_end_and_has_the_published_special_ids(t5) -> None:
    assert t5("").input_ids == [1]
    assert (t5.pad_token_id, t5.eos_token_id, t5.unk_token_id) == (0, 1, 2)
    assert t5("a red circle").input_ids[-1] == 1
    assert 2 in t5("日本").input_ids


def test_no_training_caption_needs_the_unknown_token_and_words_are_whole(t5) -> None:
    for caption in every_caption()[::50]:
        ids = t5(caption).input_ids
        assert 2 not in ids
        assert len(ids) == len(caption.split()) + caption.count(",") + 1


def test_the_new_word_is_spelt_with_pieces_that_no_training_caption_has(t5) -> None:
    spelt = set(t5(pictures.NEW_WORD).input_ids) - set(t5("").input_ids)
    assert 2 not in spelt
    known = {token for caption in every_caption() for token in t5(caption).input_ids}
    assert len(spelt - known) >= 3


def test_the_lora_pictures_are_24_and_16_of_the_new_thing_with_captions() -> None:
    for folder, count in {"wug": 24, "held_out": 16}.items():
        images = sorted((DEMO / "images" / folder).glob("*.png"))
        assert len(images) == count
        assert all(pictures.NEW_WORD in image.with_suffix(".txt").read_text() for image in images)
    known = sorted((DEMO / "images" / "known").glob("*.txt"))
    assert len(known) == 48
    assert not any(pictures.NEW_WORD in path.read_text() for path in known)
