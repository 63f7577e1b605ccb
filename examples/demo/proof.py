"""The proof at the end of the demo: what the LoRA changed in samples and on held-out pictures.

Independent of the trainer: the exported file is merged into the tiny net by hand, pictures are made with the build
script's sampler and judged by the reader, which has never seen a sample of the model.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .build import pictures
from .build.build import load_vae
from .build.captions import CaptionTable, encode_captions
from .build.judge import Score, samples_of, score
from .build.net import TinyNet, predict
from .build.pictures import BACKGROUNDS, COLOURS, NEW_WORD, Scene
from .reader import Reader, load_pictures, load_reader

HERE = Path(__file__).parent
SIGMAS = (0.2, 0.4, 0.6, 0.8, 0.9)
PREFIX = "diffusion_model."


@dataclass(frozen=True)
class Check:
    """One line of the table: what was measured, what it must be, and whether it is."""

    name: str
    value: str
    wanted: str
    passed: bool


@dataclass(frozen=True)
class HeldOut:
    """Paired loss, LoRA minus base, over held-out pictures: mean, its 95 % interval, and with shuffled captions."""

    delta: float
    low: float
    high: float
    shuffled: float


def merged(net: TinyNet, path: Path) -> tuple[TinyNet, int]:
    """A copy of `net` with the LoRA file (ComfyUI names) added to its weights, and the number of changed modules."""
    tensors = load_file(path)
    result = copy.deepcopy(net)
    modules = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    used = {f"{name}.lora_{side}.weight" for name in modules for side in "AB"}
    used |= {f"{name}.alpha" for name in modules} & tensors.keys()
    if not modules or used != tensors.keys():
        raise SystemExit(f"{path} holds keys that are no LoRA in ComfyUI's names: {sorted(tensors.keys() - used)[:3]}")
    for name in modules:
        inner = name.removeprefix(PREFIX)
        adapter = inner.removeprefix("llm_adapter.")
        linear = (result.denoiser if adapter == inner else result.adapter).get_submodule(adapter)
        down, up = tensors[f"{name}.lora_A.weight"].float(), tensors[f"{name}.lora_B.weight"].float()
        alpha = tensors.get(f"{name}.alpha")
        scale = 1.0 if alpha is None else float(alpha) / len(down)
        with torch.no_grad():
            linear.weight += scale * up @ down
    return result, len(modules)


def new_grid() -> list[Scene]:
    """The new thing in every colour on every background."""
    return [Scene(NEW_WORD, colour, background) for colour in COLOURS for background in BACKGROUNDS]


@torch.no_grad()
def held_out(base: nn.Module, tuned: nn.Module, vae: nn.Module, table: CaptionTable, folder: Path) -> HeldOut:
    """Losses at the same noise and sigmas with and without the LoRA; bootstrap over pictures."""
    images = sorted(folder.glob("*.png"))
    captions = [image.with_suffix(".txt").read_text(encoding="utf-8").strip() for image in images]
    latents = vae.encode(load_pictures(images))
    count = len(captions)
    # A rotation by a third of the set gives every picture another one's caption.
    other = captions[count // 3 :] + captions[: count // 3]

    def losses(net: nn.Module, texts: Sequence[str]) -> Tensor:
        generator = torch.Generator().manual_seed(31)
        rows = []
        for sigma in SIGMAS:
            noise = torch.randn(latents.shape, generator=generator)
            velocity = predict(
                net, torch.lerp(latents, noise, sigma), torch.full((count,), sigma), table.pick(list(texts))
            )
            rows.append((velocity - (noise - latents)).square().mean((1, 2, 3)))
        return torch.stack(rows).mean(0)

    before = losses(base, captions)
    delta, shuffled = losses(tuned, captions) - before, losses(tuned, other) - before
    picks = torch.randint(count, (2000, count), generator=torch.Generator().manual_seed(32))
    low, high = torch.quantile(delta[picks].mean(1), torch.tensor([0.025, 0.975])).tolist()
    return HeldOut(float(delta.mean()), low, high, float(shuffled.mean()))


def checks(
    new_before: float, new: Score, new_share: float, known_before: Score, known: Score, loss: HeldOut
) -> list[Check]:
    """The demo's promises."""
    kept = known.all / max(known_before.all, 1e-9)
    lowest = min(known_before.shape, known_before.colour, known_before.background)
    return [
        Check("base: shape, colour, background follow the caption", f"{lowest:.0%} or more", ">= 80 %", lowest >= 0.8),
        Check(f"base: a {NEW_WORD} where one was asked for", f"{new_before:.0%}", "<= 10 %", new_before <= 0.1),
        Check(f"LoRA: a {NEW_WORD} where one was asked for", f"{new_share:.0%}", ">= 70 %", new_share >= 0.7),
        Check("LoRA: and in the right colour on the right background", f"{new.all:.0%}", "", True),
        Check("known captions all right, before and after", f"{known_before.all:.0%}, {known.all:.0%}", "", True),
        Check("known captions kept", f"{kept:.0%}", ">= 90 %", kept >= 0.9),
        Check(
            "held-out loss, LoRA - base",
            f"{loss.delta:+.3f} [{loss.low:+.3f}, {loss.high:+.3f}]",
            "interval below 0",
            loss.high < 0,
        ),
        Check("the same with shuffled captions", f"{loss.shuffled:+.3f}", "worse", loss.shuffled > loss.delta),
    ]


def sheet(rows: Sequence[tuple[str, Tensor]], captions: Sequence[Sequence[str]], path: Path, zoom: int = 2) -> None:
    """Rows of pictures with the row's name at the left and, above each pair of rows, the captions."""
    from PIL import Image, ImageDraw

    left, top, edge = 60, 30, 64 * zoom
    columns = len(rows[0][1])
    image = Image.new("RGB", (left + columns * edge, len(captions) * top + len(rows) * edge), "white")
    pencil = ImageDraw.Draw(image)
    y = 0
    for index, (name, pixels) in enumerate(rows):
        if index % 2 == 0:
            for column, caption in enumerate(captions[index // 2]):
                first, _, second = caption.partition(" on ")
                pencil.text((left + column * edge + 4, y + 2), f"{first}\non {second}", fill="black")
            y += top
        pencil.text((6, y + edge // 2 - 6), name, fill="black")
        arrays = pixels.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
        for column, array in enumerate(arrays):
            tile = Image.fromarray(array).resize((edge, edge), Image.Resampling.BICUBIC)
            image.paste(tile, (left + column * edge, y))
        y += edge
    image.quantize(128).save(path, optimize=True)


def find_lora(folder: Path) -> Path:
    """The final adapter file of a run folder."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise SystemExit(f"{folder} should hold one final .safetensors file and holds {len(files)}")
    return files[0]


def prove(
    lora: Path, sheet_path: Path, *, seeds: Sequence[int] = (41, 42), reader: Reader | None = None
) -> list[Check]:
    """Measure everything and write the contact sheet."""
    models, reader = HERE / "models", reader or load_reader()
    vae = load_vae(models / "vae.safetensors")
    base = TinyNet.load(models / "anima_tiny.safetensors")
    tuned, count = merged(base, lora)
    print(f"{lora.name}: {count} modules merged")
    known, new = pictures.known_grid(), new_grid()
    texts = [image.read_text(encoding="utf-8").strip() for image in sorted((HERE / "images/held_out").glob("*.txt"))]
    captions = ["", *map(pictures.caption, [*known, *new]), *texts]
    table = encode_captions(list(dict.fromkeys(captions)), models / "qwen3", models / "t5")

    def draw(net: nn.Module, scenes: list[Scene]) -> Tensor:
        return torch.cat([samples_of(net, vae, table, scenes, seed=seed) for seed in seeds])

    new_pixels = {name: draw(net, new) for name, net in (("base", base), ("LoRA", tuned))}
    known_pixels = {
        name: samples_of(net, vae, table, known, seed=seeds[0]) for name, net in (("base", base), ("LoRA", tuned))
    }
    # A walk through the grid that meets every colour, background and shape.
    shown_new, shown_known = [0, 9, 14, 19, 20, 13, 11, 16, 22, 3], [0, 17, 34, 45, 62, 71, 84, 93, 107, 118]
    sheet(
        [(name, pixels[shown_new]) for name, pixels in new_pixels.items()]
        + [(name, pixels[shown_known]) for name, pixels in known_pixels.items()],
        [[pictures.caption(new[i]) for i in shown_new], [pictures.caption(known[i]) for i in shown_known]],
        sheet_path,
    )
    wanted = new * len(seeds)
    share = {name: score(reader, pixels, wanted).shape for name, pixels in new_pixels.items()}
    return checks(
        share["base"],
        score(reader, new_pixels["LoRA"], wanted),
        share["LoRA"],
        score(reader, known_pixels["base"], known),
        score(reader, known_pixels["LoRA"], known),
        held_out(base, tuned, vae, table, HERE / "images/held_out"),
    )


def main(arguments: list[str] | None = None) -> int:
    """`verify.py RUN_FOLDER`: print the table; 1 when a promise is not kept."""
    parser = argparse.ArgumentParser(description="Check what the demo's LoRA learned.")
    parser.add_argument("run", type=Path, help="folder of the demo run, or a LoRA file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the matrices are too small for more to pay
    lora = find_lora(options.run) if options.run.is_dir() else options.run
    sheet_path = lora.with_name("before_after.png")
    results = prove(lora, sheet_path)
    width = max(len(check.name) for check in results)
    for check in results:
        mark = ("ok" if check.passed else "MISSED") if check.wanted else ""
        print(f"{check.name:<{width}}  {check.value:>26}  {check.wanted:<16}  {mark}")
    print(f"before and after: {sheet_path}")
    print(f"LoRA: {lora}")
    return 0 if all(check.passed for check in results) else 1
