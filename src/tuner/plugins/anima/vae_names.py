"""Names of the VAE's tensors in both layouts, and the layers that its file must hold. No torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

UNUSED = re.compile(r".*\.time_conv\..*")
"""Layers between frames: never reached by a single image."""
RENAMES = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"^encoder\.down_blocks\.", "encoder.downsamples."),
    (r"\.norm1\.", ".residual.0."),
    (r"\.conv1\.(?=(weight|bias)$)(?<=\d\.conv1\.)", ".residual.2."),
    (r"\.norm2\.", ".residual.3."),
    (r"\.conv2\.(?=(weight|bias)$)(?<=\d\.conv2\.)", ".residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
)
"""Diffusers' names to the original ones, applied in order; the decoder's stages are renumbered by `_decoder_stage`."""
UP_BLOCK = re.compile(r"^decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.")
RESIDUAL = ("residual.0.gamma", "residual.2.weight", "residual.2.bias", "residual.3.gamma", "residual.6.weight",
            "residual.6.bias")  # fmt: skip
ATTENTION = ("norm.gamma", "to_qkv.weight", "to_qkv.bias", "proj.weight", "proj.bias")


def original_name(key: str) -> str:
    """The original name of a key in diffusers' layout."""
    for pattern, replacement in RENAMES:
        key = re.sub(pattern, replacement, key)
    return UP_BLOCK.sub(_decoder_stage, key)


def _decoder_stage(match: re.Match[str]) -> str:
    group, kind, index = int(match[1]), match[2], int(match[3])
    return f"decoder.upsamples.{4 * group + (3 if kind == 'upsamplers' else index)}."


def names(keys: Iterable[str]) -> dict[str, str]:
    """Original names to the names in the file, for both layouts (the original one is known by ``conv1.bias``)."""
    keys = list(keys)
    original = "conv1.bias" in keys
    return {key if original else original_name(key): key for key in keys}


def expected_names(found: Collection[str]) -> set[str]:
    """Original names of all tensors of the VAE that ``found`` is of; its number of stages is read from ``found``."""
    expected = {f"{layer}.{leaf}" for layer in ("conv1", "conv2") for leaf in ("weight", "bias")}
    for part, stages in (("encoder", "downsamples"), ("decoder", "upsamples")):
        expected |= {f"{part}.{layer}.{leaf}" for layer in ("conv1", "head.2") for leaf in ("weight", "bias")}
        expected |= {f"{part}.head.0.gamma"} | {f"{part}.middle.1.{leaf}" for leaf in ATTENTION}
        expected |= {f"{part}.middle.{index}.{leaf}" for index in (0, 2) for leaf in RESIDUAL}
        expected |= _stage_names(f"{part}.{stages}", found)
    return expected


def _stage_names(root: str, found: Collection[str]) -> set[str]:
    pattern = re.compile(rf"{re.escape(root)}\.(\d+)\.([a-z_]+)\..*")
    kinds: dict[int, set[str]] = {}
    for name in found:
        if match := pattern.fullmatch(name):
            kinds.setdefault(int(match[1]), set()).add(match[2])
    expected = set()
    for index in range(max(kinds, default=-1) + 1):
        kind = kinds.get(index, {"residual"})
        leaves: list[str] = list(RESIDUAL) if "residual" in kind else ["resample.1.weight", "resample.1.bias"]
        leaves += ["shortcut.weight", "shortcut.bias"] if "shortcut" in kind else []
        expected |= {f"{root}.{index}.{leaf}" for leaf in leaves}
    return expected
