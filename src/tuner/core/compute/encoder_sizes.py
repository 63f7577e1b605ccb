"""Names and sizes of CLIP and T5 text encoders, and names of autoencoders, read from weight headers. No torch.

The modules are transformers' ``CLIPTextModelWithProjection`` and ``T5EncoderModel``; module names here are theirs. A
file may spell them bare, below a prefix of an all-in-one checkpoint, or as part of a whole CLIP.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tuner.core.errors import UsageError
from tuner.core.types import StoredTensor

if TYPE_CHECKING:
    from tuner.core.files import TensorInfo

CLIP_HEAD = 64
"""Width of a head in every public CLIP text encoder; no tensor of a file tells it."""
CLIP_PROJECTION = "text_projection.weight"
CLIP_PROBE = "text_model.embeddings.token_embedding.weight"
CLIP_UNUSED = re.compile(r"logit_scale|visual_projection\..*|vision_model\..*|.*\.position_ids|position_ids")
T5_PROBE = "encoder.block.0.layer.0.SelfAttention.q.weight"
T5_EMBEDDING, T5_SECOND_EMBEDDING = "shared.weight", "encoder.embed_tokens.weight"
T5_UNUSED = re.compile(r"decoder\..*|lm_head\..*|encoder\.embed_tokens\.weight|spiece_model")
SCALED = re.compile(r"(.*\.)?(scaled_fp8|scale_weight|weight_scale|scale_input|input_scale|weight_scale_2)")

Activation = Literal["quick_gelu", "gelu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipSizes:
    """projection: rows of the text projection, None when the file has none. positions: the token limit."""

    vocab: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    positions: int
    projection: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class T5Sizes:
    """buckets: rows of the table of relative positions."""

    vocab: int
    width: int
    layers: int
    heads: int
    head_dim: int
    mlp_width: int
    buckets: int


def under_prefix(names: Iterable[str], *prefixes: str) -> dict[str, str]:
    """Names below the first of ``prefixes`` that occurs: name without the prefix to name in the file; {} for none.

    The prefix is taken off each key by itself: other keys of an all-in-one file are passed over.
    """
    listed = list(names)
    for prefix in prefixes:
        found = {name.removeprefix(prefix): name for name in listed if name.startswith(prefix)}
        if found:
            return found
    return {}


def clip_names(names: Iterable[str]) -> dict[str, str]:
    """Module names to the names of a CLIP file, what a text encoder has no use for left out."""
    listed = list(names)
    prefix = next(
        (
            start
            for start in ("", "text_model.", "text_encoder.", "model.")
            if f"{start}text_model.embeddings.token_embedding.weight" in listed
        ),
        None,
    )
    if prefix is None:
        # Saved from a class that has no ``text_model`` level.
        bare = {name if name.startswith("text_projection") else f"text_model.{name}": name for name in listed}
    else:
        bare = {name.removeprefix(prefix): name for name in listed}
    bare = {f"{name}.weight" if name == "text_projection" else name: old for name, old in bare.items()}
    return {name: old for name, old in bare.items() if not CLIP_UNUSED.fullmatch(name.removeprefix("text_model."))}


def clip_settings(settings: Mapping[str, Any] | None, shapes: Mapping[str, TensorInfo]) -> Mapping[str, Any]:
    """A ``config.json`` that lies beside CLIP's weights, {} when it describes another model of a shared folder."""
    width = shapes[CLIP_PROBE].shape[-1] if CLIP_PROBE in shapes else None
    return settings if settings is not None and settings.get("hidden_size") == width else {}


def t5_names(names: Iterable[str]) -> dict[str, str]:
    """Module names to the names of a T5 file; a decoder and the second name of the embedding are left out."""
    listed = list(names)
    found = {name: name for name in listed if not T5_UNUSED.fullmatch(name)}
    if "shared.weight" not in found and "encoder.embed_tokens.weight" in listed:
        found["shared.weight"] = "encoder.embed_tokens.weight"
    return found


def encoder_tensors(component: str, keys: Mapping[str, str], kind: Literal["clip", "t5"]) -> dict[str, StoredTensor]:
    """Which tensors of a file are parameters of an encoder. keys: names without prefix to those of the file.

    {} for a file of something else.
    """
    names = clip_names(keys) if kind == "clip" else t5_names(keys)
    if (CLIP_PROBE if kind == "clip" else T5_PROBE) not in names:
        return {}
    found = {keys[bare]: StoredTensor(names=(f"{component}:{own}",)) for own, bare in names.items()}
    if kind == "t5" and T5_SECOND_EMBEDDING in keys:
        # Some files hold the embedding twice; both must say the same.
        found[keys[T5_SECOND_EMBEDDING]] = StoredTensor(names=(f"{component}:{T5_EMBEDDING}",))
    return found


def autoencoder_tensors(
    keys: Mapping[str, str], shapes: Mapping[str, TensorInfo], channels: int
) -> dict[str, StoredTensor]:
    """The tensors of a KL autoencoder with that many latent channels, each under its own name; {} for another file.

    keys: names without prefix to those of the file, the names in ``shapes``.
    """
    probe = keys.get("decoder.conv_in.weight")
    if probe is None or "encoder.conv_in.weight" not in keys or shapes[probe].shape[1:2] != (channels,):
        return {}
    return {key: StoredTensor(names=(f"vae:{name}",)) for name, key in keys.items()}


def clip_sizes(
    shapes: Mapping[str, TensorInfo], where: str = "", settings: Mapping[str, Any] | None = None
) -> ClipSizes:
    """Sizes from module names. settings: `clip_settings`, of which only the number of heads is used."""
    if CLIP_PROBE not in shapes:
        raise UsageError("this is not a CLIP text encoder", where=where or None, why=f"it has no {CLIP_PROBE}",
                         fix="name the text encoder's own file or folder")  # fmt: skip
    refuse_scaled(shapes, where)
    vocab, width = _shape(shapes, CLIP_PROBE, where)
    projection = shapes.get(CLIP_PROJECTION)
    return ClipSizes(
        vocab=vocab,
        width=width,
        layers=block_count(shapes, "text_model.encoder.layers", where),
        heads=int((settings or {}).get("num_attention_heads") or max(width // CLIP_HEAD, 1)),
        mlp_width=_shape(shapes, "text_model.encoder.layers.0.mlp.fc1.weight", where)[0],
        positions=_shape(shapes, "text_model.embeddings.position_embedding.weight", where)[0],
        projection=None if projection is None else projection.shape[0],
    )


def t5_sizes(shapes: Mapping[str, TensorInfo], where: str = "") -> T5Sizes:
    """Sizes of a gated T5 encoder (v1.1) from module names."""
    gate = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    if T5_PROBE not in shapes or gate not in shapes:
        raise UsageError("this is not a T5 v1.1 encoder", where=where or None,
                         why=f"it has no {T5_PROBE if T5_PROBE not in shapes else gate}",
                         fix="name the text encoder's own file or folder")  # fmt: skip
    refuse_scaled(shapes, where)
    vocab, width = _shape(shapes, "shared.weight", where)
    table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    buckets, heads = _shape(shapes, table, where)
    rows = _shape(shapes, T5_PROBE, where)[0]
    if rows % heads:
        raise UsageError(f"{rows} query rows do not divide into {heads} heads", where=where or None)
    return T5Sizes(
        vocab=vocab,
        width=width,
        layers=block_count(shapes, "encoder.block", where),
        heads=heads,
        head_dim=rows // heads,
        mlp_width=_shape(shapes, gate, where)[0],
        buckets=buckets,
    )


def encoder_kind(header: Mapping[str, TensorInfo]) -> Literal["clip", "t5"] | None:
    """Which of the two a file holds the text encoder of, None for any other file. Parts of an all-in-one file do not
    count."""
    if CLIP_PROBE in clip_names(header):
        return "clip"
    return "t5" if T5_PROBE in header else None


def is_autoencoder(header: Mapping[str, TensorInfo], channels: int) -> bool:
    """Whether a file holds a KL autoencoder alone, with so many latent channels; both spellings share these names."""
    last = header.get("encoder.conv_out.weight")
    return last is not None and "decoder.conv_in.weight" in header and last.shape[0] == 2 * channels


def refuse_scaled(names: Iterable[str], where: str = "") -> None:
    """Raise UsageError for weights whose scales are kept beside them: read as they are they would be wrong."""
    found = next((name for name in names if SCALED.fullmatch(name)), None)
    if found is not None:
        raise UsageError("these are scaled 8-bit weights", where=where or None, why=f"the file has {found}",
                         fix="use the BF16 or F16 file, or plain (unscaled) float8 weights")  # fmt: skip


def clip_modules(layers: int) -> tuple[str, ...]:
    """Every linear inside the layers of a CLIP text encoder of that depth, in the order of the forward pass."""
    inner = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")] + ["mlp.fc1", "mlp.fc2"]
    return tuple(f"text_model.encoder.layers.{index}.{name}" for index in range(layers) for name in inner)


def t5_modules(layers: int) -> tuple[str, ...]:
    """Every linear inside the blocks of a T5 encoder of that depth."""
    inner = [f"layer.0.SelfAttention.{name}" for name in ("q", "k", "v", "o")]
    inner += [f"layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")]
    return tuple(f"encoder.block.{index}.{name}" for index in range(layers) for name in inner)


def _shape(shapes: Mapping[str, TensorInfo], name: str, where: str) -> tuple[int, ...]:
    if name not in shapes:
        raise UsageError(f"the weights lack {name}", where=where or None, fix="use a complete file")
    return shapes[name].shape


def block_count(shapes: Iterable[str], root: str, where: str) -> int:
    """How many blocks ``root.N`` there are among names of tensors. UsageError when one between them lacks."""
    pattern = re.compile(rf"{re.escape(root)}\.(\d+)\.")
    numbers = {int(match[1]) for name in shapes if (match := pattern.match(name))}
    missing = sorted(set(range(max(numbers, default=0) + 1)) - numbers)
    if missing:
        raise UsageError(f"the weights lack {root}.{missing[0]}", where=where or None, fix="use a complete file")
    return len(numbers)
