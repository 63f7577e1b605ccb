"""Builds the demo's model and data from nothing: `python -m examples.demo.build.build`.

On two CPU cores the real build takes about an hour; `--smoke` runs every part for a few steps in seconds. Parts that
exist in `--out` are made again, except those named by `--keep`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tuner.plugins.anima.latents import build as build_plugin_vae

from ..reader import load_reader
from . import pictures, text_files
from .captions import CaptionTable, encode_captions, every_caption
from .denoiser import Recipe, train_denoiser
from .judge import contact_sheet, samples_of, score
from .lora_data import write_lora_data
from .net import TinyNet, parameter_count, predict
from .train_reader import accuracy, save_reader, train_reader
from .vae import psnr, random_pixels, to_original, train_vae

log = logging.getLogger(__name__)

PARTS = ("text", "reader", "vae", "denoiser", "data")
HERE = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Lengths of the trainings; each stops at its steps or its seconds, whichever comes first."""

    reader_steps: int = 3000
    vae_steps: int = 2000
    vae_seconds: float = 1800.0
    pictures: int = 12000
    denoiser_steps: int = 4000
    denoiser_seconds: float = 5400.0


SMOKE = Plan(reader_steps=3, vae_steps=3, vae_seconds=60.0, pictures=24, denoiser_steps=3, denoiser_seconds=60.0)


def load_vae(path: Path) -> nn.Module:
    """The VAE file as the anima plugin runs it, float32."""
    tensors = load_file(path)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    return build_plugin_vae(tensors.items(), shapes, dtype=torch.float32, where=str(path))


@torch.no_grad()
def encode_pictures(vae: nn.Module, scenes: list[pictures.Scene]) -> Tensor:
    """Latents [N, 16, 8, 8] of the drawn scenes, with the weights of the saved file."""
    latents = []
    for start in range(0, len(scenes), 100):
        pixels = torch.from_numpy(pictures.pixels(scenes[start : start + 100]))
        latents.append(vae.encode(pixels.float().div_(127.5).sub_(1)))
    return torch.cat(latents)


def build_vae(models: Path, plan: Plan) -> dict[str, float]:
    """Train the VAE, save it in the original layout, report its quality on fresh pictures."""
    vae = train_vae(seconds=plan.vae_seconds, steps=plan.vae_steps, count=min(4000, plan.pictures), batch=8)
    save_file(to_original(vae), models / "vae.safetensors", metadata={"format": "pt"})
    return {"vae_psnr_db": round(psnr(vae, random_pixels(min(256, plan.pictures), 99)), 2)}


def caption_table(models: Path) -> CaptionTable:
    """All captions of the base training, encoded."""
    return encode_captions(every_caption(), models / "qwen3", models / "t5")


def build_denoiser(out: Path, plan: Plan) -> dict[str, float]:
    """Train denoiser and adapter on latents of the saved VAE; sample the known grid with the saved weights."""
    models = out / "models"
    vae, table, reader = (
        load_vae(models / "vae.safetensors"),
        caption_table(models),
        load_reader(out / "reader.safetensors"),
    )
    rng = random.Random(1)
    scenes = [pictures.random_scene(rng) for _ in range(plan.pictures)]
    latents = encode_pictures(vae, scenes)
    torch.manual_seed(0)
    net = TinyNet()
    log.info("denoiser and adapter: %d weights", parameter_count(net))
    grid = pictures.known_grid() if plan is not SMOKE else pictures.known_grid()[::40]

    def report(average: nn.Module, step: int) -> None:
        log.info("step %d: %s", step, score(reader, samples_of(average, vae, table, grid), grid))

    recipe = Recipe(steps=plan.denoiser_steps, seconds=plan.denoiser_seconds)
    average = train_denoiser(net, predict, latents, scenes, table, recipe, report)
    assert isinstance(average, TinyNet)
    average.save(models / "anima_tiny.safetensors")
    return judge_base(out, grid)


def judge_base(out: Path, grid: list[pictures.Scene]) -> dict[str, float]:
    """Accuracies of samples of the saved model; writes `base_samples.png`."""
    models = out / "models"
    vae, table, reader = (
        load_vae(models / "vae.safetensors"),
        caption_table(models),
        load_reader(out / "reader.safetensors"),
    )
    pixels = samples_of(TinyNet.load(models / "anima_tiny.safetensors"), vae, table, grid, seed=6)
    contact_sheet(pixels).quantize(128).save(out / "base_samples.png", optimize=True)
    return {
        f"samples_{name}": round(value, 3) for name, value in dataclasses.asdict(score(reader, pixels, grid)).items()
    }


def build(out: Path, plan: Plan, keep: tuple[str, ...] = ()) -> dict[str, float]:
    """Make every part that is not in `keep`; returns and saves the numbers in `numbers.json`."""
    models, numbers_path = out / "models", out / "numbers.json"
    models.mkdir(parents=True, exist_ok=True)
    numbers = json.loads(numbers_path.read_text(encoding="utf-8")) if numbers_path.exists() else {}
    if "text" not in keep:
        text_files.write_qwen(models / "qwen3")
        text_files.write_t5_tokenizer(models / "t5")
    if "reader" not in keep:
        reader = train_reader(steps=plan.reader_steps, count=plan.pictures)
        save_reader(reader, out / "reader.safetensors")
        names = ("reader_shape", "reader_colour", "reader_background")
        numbers |= dict(zip(names, (round(value, 3) for value in accuracy(reader)), strict=True))
    if "vae" not in keep:
        numbers |= build_vae(models, plan)
    if "denoiser" not in keep:
        numbers |= build_denoiser(out, plan)
    if "data" not in keep:
        write_lora_data(out / "images")
    numbers_path.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    return numbers


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="folder to build into")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    parser.add_argument("--keep", nargs="*", choices=PARTS, default=(), help="parts to leave as they are")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.smoke and options.out.resolve() == HERE.resolve():
        parser.error("--smoke would overwrite the trained model: give --out")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    print(json.dumps(build(options.out, SMOKE if options.smoke else Plan(), tuple(options.keep)), indent=2))


if __name__ == "__main__":
    main()
