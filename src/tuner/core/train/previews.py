"""Pictures during training: the same prompts, seeds and noise every time, with the base model's column first.

Sampling draws from its own streams and leaves the training's random numbers alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tuner.core.adapters.network import adapter_eval, adapter_strength, trained
from tuner.core.train.folder import RunFolder
from tuner.core.train.pictures import read_settings, write_png, write_sheet
from tuner.core.train.prompts import Prompt
from tuner.core.train.sampling import draw_latents
from tuner.core.types import ModelFacts, Models, Network, TextEmbeds

if TYPE_CHECKING:
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
        extra: Callable[[], AbstractContextManager[None]] = nullcontext,
        extra_told: Sequence[Mapping[str, Any]] = (),
        strength: float = 1.0,
    ) -> None:
        """kernel: of attention in samples; None for the one that trains. extra: a context in which further adapters
        act; extra_told: what pictures say about them. strength: of the adapter that trains."""
        self.model, self.models, self.network, self.facts = model, models, network, facts
        self.folder, self.prompts, self.device = folder, tuple(prompts), device
        self.encode_texts, self.load_vae, self.kernel = encode_texts, load_vae, kernel
        self.extra, self.extra_told = extra, [dict(each) for each in extra_told]
        self.strength = strength

    def run(self, step: int, looks: Sequence[Look], on_image: OnImage | None = None) -> Preview:
        """Sample after ``step`` updates, once with each kind of weights. The base pictures are made with the first
        preview and kept in the run folder. ``on_image`` is called after each of the `images_due`.
        """
        folder = self.folder.samples / f"step-{step:06d}"
        base = self._base(on_image)
        present = []
        for suffix, weights in looks:
            with weights():
                images = self._render(folder, step, strength=self.strength, suffix=suffix, on_image=on_image)
            present.append((_title(step, suffix), images))
        rows = [prompt.text for prompt in self.prompts]
        write_sheet(folder / SHEET, rows, [*base, *self._earlier(step, len(present)), *present])
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
        described = json.dumps([*(asdict(prompt) for prompt in self.prompts), *self.extra_told], sort_keys=True)
        return self.folder.samples / f"base-{hashlib.blake2b(described.encode(), digest_size=4).hexdigest()}"

    def _render(
        self, target: Path, step: int, *, strength: float, suffix: str = "", on_image: OnImage | None
    ) -> list[Path]:
        paths = self._paths(target, suffix)
        # The base model never changes: what is there of it stays.
        wanted = [number for number, path in enumerate(paths) if strength != 0 or not path.is_file()]
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
                write_png(paths[number], pixels, self._settings(self.prompts[number], step, suffix, strength))
            decoder.release("vae")
        return paths

    @torch.no_grad()
    def sample(self, prompt: Prompt, *, strength: float = 1.0) -> Tensor:
        """Latents [1,C,h,w] float32 on the CPU, with the adapter at ``strength``; 0 is the base model."""
        # Texts too are encoded at this strength: the text side may be adapted as well.
        with adapter_eval(self.network), adapter_strength(self.network, strength), self.extra():
            positive = self.encode_texts([prompt.text])
            negative = self.encode_texts([prompt.negative]) if prompt.cfg > 1 else None
            return draw_latents(
                self.model, self.models, prompt, positive, negative, device=self.device, kernel=self.kernel
            )

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
            path.is_file() and read_settings(path) == self._settings(prompt, step, suffix, self.strength)
            for path, prompt in zip(paths, self.prompts, strict=True)
        )

    def _settings(self, prompt: Prompt, step: int, suffix: str, strength: float) -> dict[str, Any]:
        weights: dict[str, Any] = {"weights": suffix.removeprefix("_")} if suffix else {}
        # The base model's pictures have no adapter in them.
        weights |= {"adapter_strength": strength} if strength not in (0.0, 1.0) else {}
        return {"step": step, **weights, **asdict(prompt), **({"extra": self.extra_told} if self.extra_told else {})}


def _title(step: int, suffix: str) -> str:
    """Heading of a column: ``step 100`` or ``step 100 ema``."""
    return f"step {step}{suffix.replace('_', ' ')}"
