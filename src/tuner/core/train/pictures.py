"""Pictures as files: PNGs that say how they were made, and contact sheets."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tuner.core.atomic import atomic_path

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

CHUNK = "tuner"
"""Name of the text chunk that holds the settings, as JSON."""


def to_image(pixels: Tensor) -> Image:
    """Pixels [3,H,W] float in -1..1 to an RGB picture."""
    from PIL import Image

    # Casting what is no number has no defined result.
    values = ((pixels.float().nan_to_num(-1).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).cpu().numpy())


def write_png(path: Path, pixels: Tensor, settings: dict[str, Any]) -> None:
    """Write a PNG with the settings that made it in its text chunk `CHUNK`."""
    from PIL.PngImagePlugin import PngInfo

    if not bool(torch.isfinite(pixels).all()):
        log.warning("%s: the model gave values that are no numbers, which are black; use another precision", path)
    info = PngInfo()
    info.add_text(CHUNK, json.dumps(settings, ensure_ascii=False))
    with atomic_path(path) as temporary:
        to_image(pixels).save(temporary, format="PNG", pnginfo=info)


def read_settings(path: Path) -> dict[str, Any] | None:
    """What `write_png` stored in the text chunk, None for a picture from elsewhere."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            settings = json.loads(image.info.get(CHUNK, "null"))
    except (UnidentifiedImageError, ValueError):
        return None
    return settings if isinstance(settings, dict) else None


def write_sheet(path: Path, rows: Sequence[str], columns: Sequence[tuple[str, Sequence[Path | None]]]) -> None:
    """Titled columns of pictures with a line of text below each row; None leaves a cell empty.

    Small pictures are enlarged so that a person sees them.
    """
    from PIL import Image, ImageDraw, ImageFont

    cell, gap, title = 224, 8, 28
    caption_height = 34
    font = ImageFont.load_default(14)
    width = gap + len(columns) * (cell + gap)
    height = title + len(rows) * (cell + caption_height)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (name, paths) in enumerate(columns):
        left = gap + column * (cell + gap)
        draw.text((left, 6), name, fill="black", font=font)
        for row, file in enumerate(paths):
            if file is None:
                continue
            with Image.open(file) as image:
                scale = cell / max(image.size)
                resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
                small = image.resize((round(image.width * scale), round(image.height * scale)), resample)
            sheet.paste(small, (left, title + row * (cell + caption_height)))
    for row, below in enumerate(rows):
        text = _shorten(below, draw, font, width - 2 * gap)
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
