"""What the core needs to know about Mosaic, from the header of its file. No torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tuner import (
    Blocks,
    DtypeRules,
    Field,
    KeyFormat,
    KeyMaps,
    LoraRules,
    ModelFacts,
    NoiseDefaults,
    SampleDefaults,
)

FACTOR, CHANNELS = 8, 192
BLOCK_LINEARS = ("qkv", "out", "query", "keys_values", "cross_out", "up", "down", "modulation")
TEXT_LINEARS = ("layers.0", "layers.2")


def files(config: Any) -> dict[str, tuple[Path, ...]]:
    """All weights are in one file; the autoencoder is code alone."""
    path = Path(config.model.path)
    return {"denoiser": (path,), "bytes": (path,), "vae": ()}


def detect(header: Mapping[str, Any]) -> str | None:
    """The flavour of a Mosaic file, None for any other."""
    if "denoiser.tiles.weight" not in header:
        return None
    width, blocks = sizes(header)
    return f"{blocks}x{width}"


def sizes(header: Mapping[str, Any]) -> tuple[int, int]:
    """(width, number of blocks)."""
    blocks = [name for name in header if re.fullmatch(r"denoiser\.blocks\.\d+\.qkv\.weight", name)]
    return header["denoiser.tiles.weight"].shape[0], len(blocks)


def facts(config: Any, header: Mapping[str, Any]) -> ModelFacts:
    """Facts of the model in a file of any size."""
    width, blocks = sizes(header)
    of = ("bytes",)
    return ModelFacts(
        family="mosaic",
        flavour=f"{blocks}x{width}",
        components=("denoiser", "bytes", "vae"),
        trainable=("denoiser", "bytes"),
        text_components=of,
        latent_channels=CHANNELS,
        spatial_factor=FACTOR,
        resolution_multiple=FACTOR,
        block_lists=(Blocks(path="blocks", count=blocks),),
        lora=LoraRules(
            include={"denoiser": (r"blocks\.\d+\..*",), "bytes": (r"layers\.\d+",)},
            exclude=(r".*\.modulation",),
            presets={"attention": ((r".*\.(qkv|out|query|keys_values|cross_out)", r"layers\.\d+"), ())},
            groups={"blocks": "blocks"},
        ),
        key_maps="tuner_mosaic.facts:MAPS",
        dtypes=DtypeRules(text="float32"),
        text_fields={
            "text": Field(shape=("L", width), of=of, trim="text_mask"),
            "text_mask": Field(shape=("L",), dtype="bool", of=of, trim="text_mask"),
        },
        max_tokens={"bytes": config.text_encoder.max_tokens.get("bytes", 200)},
        files={name: tuple(map(str, paths)) for name, paths in files(config).items()},
        noise=NoiseDefaults(timesteps="sigmoid", shift=1.0),
        sample=SampleDefaults(steps=25, cfg=3.0, shift=1.0, size=(128, 128), multiple=FACTOR),
        architecture="mosaic",
    )


def module_paths(keys: Collection[str]) -> dict[str, tuple[str, ...]]:
    """All linear layers, for as many blocks as the keys of an adapter name."""
    found = [int(match[1]) for key in keys if (match := re.search(r"blocks[._](\d+)[._]", key))]
    blocks = range(max(found, default=-1) + 1)
    return {"denoiser": tuple(f"blocks.{n}.{name}" for n in blocks for name in BLOCK_LINEARS), "bytes": TEXT_LINEARS}


MAPS = KeyMaps(
    formats=(
        KeyFormat(
            name="mosaic",
            prefixes={"denoiser": "denoiser.", "bytes": "bytes."},
            down=".lora_A.weight",
            up=".lora_B.weight",
            alpha=".alpha",
        ),
        KeyFormat(
            name="flat",
            prefixes={"denoiser": "lora_unet_", "bytes": "lora_te_"},
            separator="_",
            down=".lora_down.weight",
            up=".lora_up.weight",
            alpha=".alpha",
        ),
    ),
    default="mosaic",
    paths=module_paths,
)
