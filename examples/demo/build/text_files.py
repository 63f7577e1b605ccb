"""The two small tokenizers and the random, frozen Qwen3 text encoder."""

from __future__ import annotations

import json
import math
import random
import string
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from . import pictures

QWEN_PAD = "<|endoftext|>"
QWEN_SPECIAL = (QWEN_PAD, "<|im_start|>", "<|im_end|>")
QWEN_VOCABULARY = 384
QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
T5_VOCABULARY = 256
WIDTH = 128
OTHER_WORDS = (
    "the of and with in at to is it no not two three small big large photo image old new light dark bright pale "
    "clean simple flat round style paint toy shape object thing scene next under above left right center good bad "
    "blurry sharp low high quality"
)


def corpus(count: int = 4000, seed: int = 7) -> list[str]:
    """Captions of known things, whole and partial, and the filler words: what the tokenizers are made for."""
    rng = random.Random(seed)
    captions = [pictures.caption(pictures.random_scene(rng), rng, partial=0.2) for _ in range(count)]
    return [*captions, *(OTHER_WORDS for _ in range(20))]


def write_qwen_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 384 ids in the files of Qwen's tokenizer; adds no special token; pads with id 381."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=QWEN_VOCABULARY - len(QWEN_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN_SPECIAL])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    first = tokenizer.token_to_id(QWEN_PAD)
    if tokenizer.get_vocab_size() != QWEN_VOCABULARY:
        raise RuntimeError(f"the corpus gave {tokenizer.get_vocab_size()} tokens instead of {QWEN_VOCABULARY}")
    added = {str(first + index): _token_entry(token) for index, token in enumerate(QWEN_SPECIAL)}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": added,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": QWEN_PAD,
            "unk_token": None,
            "model_max_length": 32768,
            "split_special_tokens": False,
        },
    )


def _token_entry(token: str) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": token, **flags}


def qwen_config() -> dict[str, Any]:
    """config.json of the tiny text encoder, the fields of a Qwen3 folder."""
    first = QWEN_VOCABULARY - len(QWEN_SPECIAL)
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": QWEN_VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 2,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": first,
        "eos_token_id": first + 2,
        "pad_token_id": first,
        "torch_dtype": "bfloat16",
    }


def write_qwen(folder: Path, seed: int = 11) -> None:
    """The text encoder folder: config, random weights (normal, 1/sqrt(fan in)) in bf16 and the tokenizer."""
    config = qwen_config()
    width, mlp, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    generator = torch.Generator().manual_seed(seed)
    tensors = {"model.embed_tokens.weight": torch.randn(QWEN_VOCABULARY, width, generator=generator)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes = {"q": (query, width), "k": (key, width), "v": (key, width), "o": (width, query)}
        shapes_mlp = {"gate": (mlp, width), "up": (mlp, width), "down": (width, mlp)}
        names = {f"self_attn.{name}_proj": shape for name, shape in shapes.items()}
        names |= {f"mlp.{name}_proj": shape for name, shape in shapes_mlp.items()}
        for name, shape in names.items():
            tensors[f"{prefix}{name}.weight"] = torch.randn(shape, generator=generator) / math.sqrt(shape[1])
        for name, size in {"input_layernorm": width, "post_attention_layernorm": width}.items():
            tensors[f"{prefix}{name}.weight"] = torch.ones(size)
        for name in ("q_norm", "k_norm"):
            tensors[f"{prefix}self_attn.{name}.weight"] = torch.ones(head)
    tensors["model.norm.weight"] = torch.ones(width)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.bfloat16().contiguous() for name, value in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    _write_json(folder / "config.json", config)
    write_qwen_tokenizer(folder)


def t5_pieces() -> list[tuple[str, float]]:
    """Pieces and scores: whole words -3, single characters -8; ids 0, 1, 2 are padding, end and unknown."""
    words: set[str] = set()
    for line in corpus():
        words |= set(line.replace(",", " ").split())
    marks = sorted(set(string.printable.strip()))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0)]
    pieces += [(f"\u2581{word}", -3.0) for word in sorted(words)]
    pieces += [(",", -3.0), *((mark, -8.0) for mark in marks if mark != ",")]
    if len(pieces) > T5_VOCABULARY:
        raise RuntimeError(f"{len(pieces)} pieces do not fit into {T5_VOCABULARY} rows")
    return pieces


def write_t5_tokenizer(folder: Path) -> None:
    """A hand-built unigram tokenizer in T5's files: appends id 1, pads with 0, unknown is 2."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.Unigram(t5_pieces(), unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<pad>", "</s>", "<unk>")])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 512, **special},
    )
    _write_json(folder / "special_tokens_map.json", special)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
