"""A model small enough to reason about, and data made by formula, for the tests of the data section."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tuner.core.config import RunConfig
from tuner.core.data.plan import DataPlan, expand_tiers, plan_data, plan_indices
from tuner.core.data.prepare import DataCaches, open_caches
from tuner.core.data.records import ImageRecord, SourceIndex
from tuner.core.data.text_cache import Progress
from tuner.core.errors import Problems
from tuner.core.types import DtypeRules, Field, LoraRules, ModelFacts, Models, NoiseDefaults, SampleDefaults, TextEmbeds

WIDTH = 4
FACTOR = 8


def toy_config(folder: Path, sets: list[dict[str, Any]], **sections: Any) -> RunConfig:
    """A valid configuration; ``data`` in ``sections`` adds keys beside the sets."""
    data = {"workers": {"scan": 0, "cache": 0}, **sections.pop("data", {}), "sets": sets}
    cache = {"dir": str(folder / "cache"), **sections.pop("cache", {})}
    raw = {
        "model": {"family": "toy", "path": "toy.safetensors"},
        "data": data,
        "cache": cache,
        "optimizer": {"name": "adamw", "lr": 1e-4},
        "train": {"steps": 10},
        "checkpoint": {"dir": str(folder / "out")},
    }
    return RunConfig.model_validate({**raw, **sections})


def toy_facts(folder: Path, **changes: Any) -> ModelFacts:
    """Facts of the toy model; its weight files lie in ``folder`` and are made on first use."""
    files = {}
    for name in ("vae", "encoder"):
        path = folder / f"{name}.safetensors"
        if not path.exists():
            path.write_bytes(name.encode())
        files[name] = (str(path),)
    values: dict[str, Any] = {
        "family": "toy",
        "flavour": "tiny",
        "components": ("encoder", "vae", "denoiser"),
        "trainable": ("denoiser", "encoder"),
        "text_components": ("encoder",),
        "latent_channels": 3,
        "spatial_factor": FACTOR,
        "resolution_multiple": FACTOR,
        "block_lists": (),
        "lora": LoraRules(include={}),
        "key_maps": "toy:MAPS",
        "dtypes": DtypeRules(),
        "text_fields": {
            "context": Field(shape=("L", WIDTH), of=("encoder",), trim="mask", floor=6),
            "mask": Field(shape=("L",), dtype="bool", of=("encoder",)),
            "pooled": Field(shape=(WIDTH,), of=("encoder",)),
        },
        "max_tokens": {"encoder": 16},
        "files": files,
        "noise": NoiseDefaults(timesteps="uniform", shift=1.0),
        "sample": SampleDefaults(steps=1, cfg=1.0, shift=1.0, size=(64, 64), multiple=8),
    }
    return ModelFacts(**{**values, **changes})


class ToyFacade:
    """Encodes by formula and remembers its calls. fail_after: so many forwards succeed. nan: latents are spoilt."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.forwards: list[tuple[int, ...]] = []
        self.loads: list[tuple[str, ...]] = []
        self.fail_after: int | None = None
        self.nan = False

    def load(self, *components: str) -> Models:
        self.loads.append(components)
        return Models()

    def _count(self) -> None:
        if self.fail_after is not None:
            if self.fail_after == 0:
                raise KeyboardInterrupt
            self.fail_after -= 1

    def encode_latents(self, models: Models, pixels: torch.Tensor, rng: Any) -> torch.Tensor:
        self._count()
        self.forwards.append(tuple(pixels.shape))
        latents = pixels[:, :, ::FACTOR, ::FACTOR].contiguous()
        if rng is not None:
            latents = latents + rng.normal(latents.shape)
        return latents * float("nan") if self.nan else latents

    def encode_text(self, models: Models, captions: Sequence[str], components: Sequence[str]) -> TextEmbeds:
        self._count()
        self.texts.extend(captions)
        words = [caption.split() for caption in captions]
        length = max(1, *(len(each) for each in words))
        context = torch.zeros(len(words), length, WIDTH)
        mask = torch.zeros(len(words), length, dtype=torch.bool)
        for row, each in enumerate(words):
            for place, word in enumerate(each):
                context[row, place] = word_vector(word)
                mask[row, place] = True
        return TextEmbeds(tensors={"context": context, "mask": mask, "pooled": context.sum(1)})


def word_vector(word: str) -> torch.Tensor:
    """Eighths between -16 and 16, so that bf16 holds them exactly."""
    digest = hashlib.blake2b(word.encode(), digest_size=WIDTH).digest()
    return torch.tensor([(byte - 128) / 8 for byte in digest])


def record(source: str, key: str, size: tuple[int, int], caption: str = "a toy") -> ImageRecord:
    """An image that exists in the plan only."""
    digest = hashlib.blake2b(f"{source}/{key}".encode(), digest_size=16).hexdigest()
    return ImageRecord(
        source=source,
        key=key,
        path=Path("nowhere") / key,
        digest=digest,
        width=size[0],
        height=size[1],
        mode="RGB",
        captions_raw=caption,
    )


def toy_plan(config: RunConfig, sizes: dict[str, list[tuple[int, int]]], multiple: int = FACTOR) -> DataPlan:
    """The plan of a configuration whose sources hold images of these sizes, without any file."""
    indices = {
        source: SourceIndex(
            source=source,
            root=Path("nowhere"),
            records=tuple(record(source, f"{number:03}.png", size) for number, size in enumerate(each)),
        )
        for source, each in sizes.items()
    }
    problems = Problems()
    tiers = expand_tiers(config.data, config.train.batch_size, multiple, problems)
    problems.raise_if_any()
    return plan_indices(config, tiers, indices)


def source(name: str, path: str | Path = "images", **settings: Any) -> dict[str, Any]:
    return {"id": name, "path": str(path), **settings}


@dataclass
class Rig:
    """A run's data section over real files, with the toy model."""

    config: RunConfig
    facts: ModelFacts
    facade: ToyFacade
    plan: DataPlan
    caches: DataCaches

    def fill(self) -> tuple[int, int]:
        """(captions, images) that were encoded."""
        return self.fill_text(), self.caches.fill_latents()

    def fill_text(self, on_progress: Progress | None = None) -> int:
        return self.caches.text.fill(self.caches.texts, on_progress) if self.caches.text else 0


def open_rig(folder: Path, sets: list[dict[str, Any]], facts: dict[str, Any] | None = None, **sections: Any) -> Rig:
    config = toy_config(folder, sets, **sections)
    described = toy_facts(folder, **(facts or {}))
    plan, facade = plan_data(config, described), ToyFacade()
    caches = open_caches(plan, config, described, facade, load=lambda components: facade.load(*components))
    return Rig(config, described, facade, plan, caches)


def one_set(*sources: dict[str, Any], **geometry: Any) -> list[dict[str, Any]]:
    """A set of small buckets."""
    return [{"resolution": 32, "batch_size": 2, "buckets": {"step": 8, "min": 8}, "sources": list(sources), **geometry}]


def write_images(folder: Path, sizes: Sequence[tuple[int, int]], mode: str = "RGB", name: str = "{:02}") -> Path:
    """Noise images 00.png, 01.png, ... with captions "tag00, red, big" and so on; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (width, height) in enumerate(sizes):
        stem = name.format(number)
        write_image(folder / f"{stem}.png", (width, height), number, mode)
        (folder / f"{stem}.txt").write_text(f"tag{stem}, red, big", encoding="utf-8")
    return folder


def write_image(path: Path, size: tuple[int, int], seed: int, mode: str = "RGB") -> None:
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    noise = random.Random(f"{seed}{mode}").randbytes(size[0] * size[1] * channels)
    Image.frombytes(mode, size, noise).save(path)
