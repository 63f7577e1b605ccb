"""Pixels of one image: read, turned upright, made RGB, resized, cropped, mirrored. Pure, and fit for workers."""

from __future__ import annotations

import io
import logging
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tuner.core.data.augment import shift_color
from tuner.core.data.probe import READ_ERRORS, has_alpha, refusal
from tuner.core.data.records import Fit, ImageRecord, Size
from tuner.core.errors import UsageError
from tuner.core.rng import Rng

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

log = logging.getLogger(__name__)

BACKGROUND = "white"
"""What transparent pixels are laid over. With the alpha channel as mask, the colour under it is kept instead."""


def load_pixels(
    record: ImageRecord, fit: Fit, *, resize: str = "auto", crop: tuple[int, int] | None = None, flip: bool = False,
    color: Rng | None = None, mask: str | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Pixels [3,H,W] float32 in -1..1, and the mask [H,W] float32 in 0..1 or None when ``mask`` is None.

    resize: a name of ``data.resize``. crop: (left, top) in the resized image, None for the centre. flip: mirror left to
    right. color: names the draw of a colour change, None for none. mask: ``alpha`` for the image's own alpha channel
    (ones where it has none), ``file`` for the R channel of ``record.mask_path``.

    Raises UsageError, which names the file, when it cannot be decoded or is not what was indexed.
    """
    image = open_upright(record.path)
    if image.size != record.size:
        found = f"{image.size[0]}x{image.size[1]} instead of {record.width}x{record.height}"
        raise UsageError("an image changed after it was indexed", where=str(record.path), why=found, fix="start again")
    left, top = fit.crop if crop is None else crop
    box = (left, top, left + fit.bucket[0], top + fit.bucket[1])
    rgb, alpha = to_rgb(image, keep_hidden=mask == "alpha")
    pixels = _to_tensor(_placed(rgb, fit.resized, box, resize, flip)).permute(2, 0, 1).contiguous() / 255.0
    if color is not None:
        pixels = shift_color(pixels, color)
    weights = _mask_image(record, alpha, mask)
    if weights is not None:
        return pixels * 2.0 - 1.0, _to_tensor(_placed(weights, fit.resized, box, resize, flip)) / 255.0
    if mask is not None:
        return pixels * 2.0 - 1.0, torch.ones(fit.bucket[1], fit.bucket[0])
    return pixels * 2.0 - 1.0, None


def _mask_image(record: ImageRecord, alpha: Image.Image | None, mask: str | None) -> Image.Image | None:
    if mask != "file":
        return alpha if mask == "alpha" else None
    if record.mask_path is None:
        raise UsageError("an image has no mask file", where=record.name)
    return to_rgb(open_upright(record.mask_path), keep_hidden=True)[0].getchannel("R")


def open_upright(path: Path) -> Image.Image:
    """A decoded image with its EXIF orientation applied. Raises UsageError, which names the file."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            error = refusal(image)
            if error is None:
                image.load()
                return ImageOps.exif_transpose(image)
    except Image.DecompressionBombError:
        error = "the image has too many pixels to be read safely"
    except UnidentifiedImageError:
        error = "the content is no image format that can be read"
    except READ_ERRORS as problem:
        error = str(problem) or type(problem).__name__
    raise UsageError(
        "an image cannot be used",
        where=str(path),
        why=error,
        fix='repair or remove it, or set data.on_corrupt to "skip"',
    )


def to_rgb(image: Image.Image, *, keep_hidden: bool = False) -> tuple[Image.Image, Image.Image | None]:
    """8-bit RGB, and the alpha channel (8-bit grey) of an image with transparency.

    keep_hidden: keep the colour under transparent pixels instead of laying them over white.
    """
    from PIL import Image

    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.float32) / 257.0
        image = Image.fromarray(np.clip(levels + 0.5, 0, 255).astype(np.uint8))
    if not has_alpha(image):
        return image.convert("RGB"), None
    layered = image.convert("RGBA")
    alpha = layered.getchannel("A")
    if keep_hidden:
        return layered.convert("RGB"), alpha
    ground = Image.new("RGBA", layered.size, BACKGROUND)
    return Image.alpha_composite(ground, layered).convert("RGB"), alpha


def _placed(image: Image.Image, resized: Size, box: tuple[int, int, int, int], method: str, flip: bool) -> Image.Image:
    from PIL import Image

    if image.size != resized:
        image = image.resize(resized, _resampling(image.size, resized, method))
    image = image.crop(box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image


def _resampling(size: Size, resized: Size, method: str) -> Image.Resampling:
    """Pillow's filter for a method; its box filter is the mean over an area when shrinking."""
    from PIL.Image import Resampling

    shrinking = resized[0] < size[0] and resized[1] < size[1]
    if method == "auto":
        return Resampling.BOX if shrinking else Resampling.LANCZOS
    if method == "area":
        return Resampling.BOX if shrinking else Resampling.BILINEAR
    return Resampling[method.upper()]


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image, dtype=np.float32))
