"""The embedded demo model was really trained: its VAE keeps pictures and its samples follow their captions."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import nn

from examples.demo.build import pictures
from examples.demo.build.build import load_vae
from examples.demo.build.captions import encode_captions
from examples.demo.build.judge import samples_of, score
from examples.demo.build.net import TinyNet
from examples.demo.reader import Reader, load_pictures, load_reader

DEMO = Path(__file__).parents[2] / "examples" / "demo"
MODELS = DEMO / "models"


@pytest.fixture(scope="module")
def reader() -> Reader:
    return load_reader()


@pytest.fixture(scope="module")
def vae() -> nn.Module:
    return load_vae(MODELS / "vae.safetensors")


def drawn(count: int, seed: int) -> tuple[list[pictures.Scene], torch.Tensor]:
    rng = random.Random(seed)
    scenes = [pictures.random_scene(rng, (*pictures.SHAPES, pictures.NEW_WORD)) for _ in range(count)]
    return scenes, torch.from_numpy(pictures.pixels(scenes)).float().div(127.5).sub(1)


def test_the_reader_reads_fresh_pictures(reader: Reader) -> None:
    scenes, pixels = drawn(400, seed=4321)
    assert score(reader, pixels, scenes).all >= 0.97


def test_the_reader_calls_a_picture_without_a_clean_object_other(reader: Reader) -> None:
    circle, star = (
        pictures.pixels([pictures.Scene(shape, "red", "white", radius=21)]) for shape in ("triangle", "cross")
    )
    mixed = torch.from_numpy(circle).float().lerp(torch.from_numpy(star).float(), 0.5).div(127.5).sub(1)
    assert reader.read(mixed)[0].shape == "other"


def test_the_reader_sees_the_new_thing_in_the_lora_pictures(reader: Reader) -> None:
    pixels = load_pictures(sorted((DEMO / "images").glob("[wh]*/*.png")))
    assert sum(reading.shape == "wug" for reading in reader.read(pixels)) >= 39


@torch.no_grad()
def test_pictures_survive_the_vae(vae: nn.Module, reader: Reader) -> None:
    scenes, pixels = drawn(100, seed=99)
    latents = vae.encode(pixels)
    assert abs(latents.mean()) < 0.1
    assert abs(latents.std() - 1) < 0.1
    again = vae.decode(latents)
    assert 10 * torch.log10(4 / (again - pixels).square().mean()) >= 33
    assert score(reader, again, scenes).all >= 0.97


def test_samples_of_the_base_follow_their_captions(vae: nn.Module, reader: Reader) -> None:
    scenes = pictures.known_grid()[::3]
    captions = ["", *map(pictures.caption, scenes)]
    table = encode_captions(captions, MODELS / "qwen3", MODELS / "t5")
    net = TinyNet.load(MODELS / "anima_tiny.safetensors")
    result = score(reader, samples_of(net, vae, table, scenes, seed=8, steps=14), scenes)
    assert min(result.shape, result.colour, result.background, result.all) >= 0.8
