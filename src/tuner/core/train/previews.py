"""Pictures during training: the same prompts, seeds and noise every time, with the base model's column first.

Sampling draws from its own streams and leaves the training's random numbers alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tuner.core.adapters.network import adapter_eval, adapter_strength, trained
from tuner.core.atomic import atomic_path
from tuner.core.compute.attention import attending
from tuner.core.flow import apply_cfg, euler_sample, euler_sigmas
from tuner.core.train.folder import RunFolder
from tuner.core.train.prompts import Prompt
from tuner.core.types import ModelFacts, Models, Network, TextEmbeds

if TYPE_CHECKING:
    from PIL.Image import Image

    from tuner.core.registry.facade import ModelFacade

MAX_COLUMNS = 6
SHEET = "sheet.png"
SUFFIXES = ("", "_ema")
"""Ends of picture names, in the order of the columns of one step."""

EncodeTexts = Callable[[Sequence[str]], TextEmbeds]
WithVae = Callable[[], Models]
OnImage = Callable[[], object]
Look = tuple[str, Callable[[], AbstractContextManager[None]]]
"""A kind of weights: what its pictures have at the end of their names, and a context in which the model has them."""


@dataclass(frozen=True, slots=True)
class Preview:
    """Written files of one preview; ``sheet`` is None without prompts."""

    step: int
    images: tuple[Path, ...]
    sheet: Path


class Previewer:
    """Samples the prompts with the adapter in its present state and writes PNGs and a contact sheet.

    load_vae is called after all latents of a preview are done, and what it returned is released at once: the image
    autoencoder takes memory only while pictures are decoded.
    """

    def __init__(
        self,
        *,
        model: ModelFacade,
        models: Models,
        network: Network,
        facts: ModelFacts,
        folder: RunFolder,
        prompts: Sequence[Prompt],
        encode_texts: EncodeTexts,
        load_vae: WithVae,
        device: torch.device,
        kernel: str | None = None,
    ) -> None:
        """kernel: of attention in samples; None for the one that trains."""
        self.model, self.models, self.network, self.facts = model, models, network, facts
        self.folder, self.prompts, self.device = folder, tuple(prompts), device
        self.encode_texts, self.load_vae, self.kernel = encode_texts, load_vae, kernel

    def run(self, step: int, looks: Sequence[Look], on_image: OnImage | None = None) -> Preview:
        """Sample after ``step`` updates, once with each kind of weights. The base pictures are made with the first
        preview and kept in the run folder. ``on_image`` is called after each of the `images_due`.
        """
        folder = self.folder.samples / f"step-{step:06d}"
        base = self._base(on_image)
        present = []
        for suffix, weights in looks:
            with weights():
                images = self._render(folder, step, strength=1.0, suffix=suffix, on_image=on_image)
            present.append((_title(step, suffix), images))
        write_sheet(folder / SHEET, self.prompts, [*base, *self._earlier(step, len(present)), *present])
        return Preview(step, tuple(path for _, images in present for path in images), folder / SHEET)

    def draw_base(self, on_image: OnImage | None = None) -> None:
        """Make the base pictures now, while the weights are still the base model's own."""
        self._render(self._base_folder(), 0, strength=1.0, on_image=on_image)

    def _base(self, on_image: OnImage | None) -> list[tuple[str, list[Path]]]:
        """The column of the base, if it can be had: fully trained weights have none for prompts that are new."""
        folder = self._base_folder()
        if trained(self.network).has_base:
            return [("base", self._render(folder, 0, strength=0.0, on_image=on_image))]
        paths = self._paths(folder)
        return [("base", paths)] if all(path.is_file() for path in paths) else []

    def images_due(self, looks: Sequence[Look]) -> int:
        """How many pictures the next preview has to sample."""
        missing = sum(not path.is_file() for path in self._paths(self._base_folder()))
        return len(looks) * len(self.prompts) + (missing if trained(self.network).has_base else 0)

    def _base_folder(self) -> Path:
        # Named by the prompts, so that a resumed run with other prompts does not reuse old pictures.
        described = json.dumps([asdict(prompt) for prompt in self.prompts], sort_keys=True)
        return self.folder.samples / f"base-{hashlib.blake2b(described.encode(), digest_size=4).hexdigest()}"

    def _render(
        self, target: Path, step: int, *, strength: float, suffix: str = "", on_image: OnImage | None
    ) -> list[Path]:
        paths = self._paths(target, suffix)
        # The base model never changes: what is there of it stays.
        wanted = [number for number, path in enumerate(paths) if strength > 0 or not path.is_file()]
        if not wanted:
            return paths
        latents = []
        for number in wanted:
            latents.append(self.sample(self.prompts[number], strength=strength))
            if on_image is not None:
                on_image()
        with torch.no_grad():
            decoder = self.load_vae()
            for number, value in zip(wanted, latents, strict=True):
                pixels = self.model.decode_latents(decoder, value.to(self.device))[0]
                write_png(paths[number], pixels, self._settings(self.prompts[number], step, suffix))
            decoder.release("vae")
        return paths

    @torch.no_grad()
    def sample(self, prompt: Prompt, *, strength: float = 1.0) -> Tensor:
        """Latents [1,C,h,w] float32 on the CPU, with the adapter at ``strength``; 0 is the base model."""
        factor = self.facts.spatial_factor
        shape = (1, self.facts.latent_channels, prompt.height // factor, prompt.width // factor)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(prompt.seed)).to(self.device)
        guidance = None if prompt.guidance is None else torch.full((1,), prompt.guidance, device=self.device)
        # Texts too are encoded at this strength: the text side may be adapted as well.
        with adapter_eval(self.network), adapter_strength(self.network, strength):
            positive = self.encode_texts([prompt.text])
            negative = self.encode_texts([prompt.negative]) if prompt.cfg > 1 else None

            def velocity(noisy: Tensor, sigmas: Tensor) -> Tensor:
                pred = self.model.predict(self.models, noisy, sigmas, positive, guidance)
                if negative is None:
                    return pred
                return apply_cfg(pred, self.model.predict(self.models, noisy, sigmas, negative, guidance), prompt.cfg)

            sigmas = euler_sigmas(prompt.steps, prompt.shift, self.facts.sample.schedule)
            with attending(self.kernel):
                return euler_sample(velocity, noise, sigmas).cpu()

    def _paths(self, folder: Path, suffix: str = "") -> list[Path]:
        return [folder / f"{number:03d}{suffix}.png" for number in range(len(self.prompts))]

    def _earlier(self, step: int, present: int) -> list[tuple[str, list[Path]]]:
        """The most recent columns of the same prompts before ``step`` that are complete, so many that ``present`` more
        and the base fit on the sheet.
        """
        found: list[tuple[int, str, list[Path]]] = []
        for folder in self.folder.samples.glob("step-*"):
            number = folder.name.removeprefix("step-")
            if not number.isdigit() or int(number) >= step:
                continue
            for suffix in SUFFIXES:
                paths = self._paths(folder, suffix)
                if self._shows_these_prompts(paths, int(number), suffix):
                    found.append((int(number), suffix, paths))
        recent = sorted(found)[-(MAX_COLUMNS - 1 - present) :]
        return [(_title(number, suffix), paths) for number, suffix, paths in recent]

    def _shows_these_prompts(self, paths: Sequence[Path], step: int, suffix: str) -> bool:
        """Whether the pictures are there and were made from these prompts: a resumed run may have others."""
        return all(
            path.is_file() and read_settings(path) == self._settings(prompt, step, suffix)
            for path, prompt in zip(paths, self.prompts, strict=True)
        )

    @staticmethod
    def _settings(prompt: Prompt, step: int, suffix: str) -> dict[str, Any]:
        return {"step": step, **({"weights": suffix.removeprefix("_")} if suffix else {}), **asdict(prompt)}


def _title(step: int, suffix: str) -> str:
    """Heading of a column: ``step 100`` or ``step 100 ema``."""
    return f"step {step}{suffix.replace('_', ' ')}"


def to_image(pixels: Tensor) -> Image:
    """Pixels [3,H,W] float in -1..1 to an RGB picture."""
    from PIL import Image

    values = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).cpu().numpy())


def write_png(path: Path, pixels: Tensor, settings: dict[str, Any]) -> None:
    """Write a PNG with the settings that made it in its text chunk ``tuner``."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("tuner", json.dumps(settings, ensure_ascii=False))
    with atomic_path(path) as temporary:
        to_image(pixels).save(temporary, format="PNG", pnginfo=info)


def read_settings(path: Path) -> dict[str, Any] | None:
    """What `write_png` stored in the text chunk, None for a picture from elsewhere."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            settings = json.loads(image.info.get("tuner", "null"))
    except (UnidentifiedImageError, ValueError):
        return None
    return settings if isinstance(settings, dict) else None


def write_sheet(path: Path, prompts: Sequence[Prompt], columns: Sequence[tuple[str, Sequence[Path]]]) -> None:
    """One row per prompt, one titled column per preview; small pictures are enlarged so that a person sees them."""
    from PIL import Image, ImageDraw, ImageFont

    cell, gap, title = 224, 8, 28
    caption_height = 34
    font = ImageFont.load_default(14)
    width = gap + len(columns) * (cell + gap)
    height = title + len(prompts) * (cell + caption_height)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (name, paths) in enumerate(columns):
        left = gap + column * (cell + gap)
        draw.text((left, 6), name, fill="black", font=font)
        for row, file in enumerate(paths):
            with Image.open(file) as image:
                scale = cell / max(image.size)
                resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
                small = image.resize((round(image.width * scale), round(image.height * scale)), resample)
            sheet.paste(small, (left, title + row * (cell + caption_height)))
    for row, prompt in enumerate(prompts):
        text = _shorten(prompt.text, draw, font, width - 2 * gap)
        draw.text((gap, title + row * (cell + caption_height) + cell + 6), text, fill="black", font=font)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def _shorten(text: str, draw: Any, font: Any, width: int) -> str:
    """``text`` cut to ``width`` pixels, with a mark where it was cut."""
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "..."
