"""Reading an image file's header, orientation and content hash: one read of the file, no pixel is kept."""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, IndexError, KeyError)
"""What Pillow raises for broken files, depending on the format."""

MODES = frozenset(
    {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "I;16", "I;16L", "I;16B", "I;16N"}
)
"""Pixel layouts with a known range, which is what a faithful conversion to 8-bit RGB needs."""

# Photos that people keep beside others and that Pillow cannot open: named instead of passed over. Raw files are listed
# because some open as their small preview.
FOREIGN = frozenset({".heic", ".heif", ".jxl", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".raf", ".rw2"})
_NOT_PICTURES = frozenset({".eps", ".ps", ".pdf", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr", ".wmf", ".emf"})
_ORIENTATION = 0x0112


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What one read of an image file tells.

    width and height have the EXIF orientation applied. decoded: whether every pixel was read, which is what proves a
    file whole. error is None for a usable file.
    """

    digest: str = ""
    width: int = 0
    height: int = 0
    mode: str = ""
    orientation: int = 1
    alpha: bool = False
    decoded: bool = False
    error: str | None = None


@cache
def image_extensions() -> frozenset[str]:
    """Lower-case extensions, with the dot, of files that are taken for images."""
    from PIL import Image

    ignore_pillow_warnings()
    Image.init()
    readable = {extension for extension, name in Image.registered_extensions().items() if name in Image.OPEN}
    return frozenset(readable - _NOT_PICTURES)


def ignore_pillow_warnings() -> None:
    """For this process: they name no file and come at every read, while what matters in them is an error here."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def probe(path: Path, *, decode: bool = False) -> Probe:
    """Hash and describe an image file. Never raises for the file's content; a broken file has ``error`` set.

    decode: read the pixels too, so that damage behind a sound header is found.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        return Probe(error=f"the file cannot be read: {error.strerror or error}")
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    if not data:
        return Probe(digest=digest, error="the file is empty")
    return _described(data, digest, decode=decode)


def probe_all(
    paths: Iterable[Path], workers: int, *, decode: bool = False, on_progress: Callable[[int], None] | None = None
) -> list[Probe]:
    """``probe`` of many files in order; hashing, reading and decoding release the interpreter: threads are enough.

    on_progress is called with 1 after each file.
    """
    found = []
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        for each in pool.map(partial(probe, decode=decode), paths):
            found.append(each)
            if on_progress is not None:
                on_progress(1)
    return found


def _described(data: bytes, digest: str, *, decode: bool) -> Probe:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            error = refusal(image)
            orientation = _orientation(image, data)
            width, height = _upright_size(image, orientation, data) if error is None else image.size
            found = Probe(
                digest=digest,
                width=width,
                height=height,
                mode=image.mode,
                orientation=orientation,
                alpha=has_alpha(image),
                decoded=decode and error is None,
                error=error,
            )
            if found.decoded:
                image.load()
        return found
    except Image.DecompressionBombError:
        return Probe(digest=digest, error="the image has too many pixels to be read safely")
    except UnidentifiedImageError:
        return Probe(digest=digest, error="the content is no image format that can be read")
    except READ_ERRORS as error:
        return Probe(digest=digest, error=f"the file is damaged: {error or type(error).__name__}")


def refusal(image: Image.Image) -> str | None:
    """Why an opened image cannot be converted to RGB faithfully, or None."""
    # Phones store a preview or depth map behind the picture of an MPO file; that is no animation.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        return f"it is animated or has several pages ({frames} frames): save the wanted frame as its own image"
    if image.mode in MODES or (image.mode == "I" and image.format == "PNG"):
        return None
    return f"pixel mode {image.mode} has no fixed range of values: save it as 8-bit or 16-bit"


def has_alpha(image: Image.Image) -> bool:
    """Whether the image has transparency, as a channel or as a marked colour."""
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info


def _orientation(image: Image.Image, data: bytes) -> int:
    if image.format == "PNG" and not any(mark in data for mark in (b"eXIf", b"Raw profile type", b"adobe.xmp")):
        # Asking Pillow would decode the whole picture to look for a chunk after the pixels.
        return 1
    value = image.getexif().get(_ORIENTATION, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright_size(image: Image.Image, orientation: int, data: bytes) -> tuple[int, int]:
    """Size with the orientation applied. Raises for a truncated file.

    Common formats are checked without decoding; a suspicion, and any other format, is settled by decoding.
    """
    from PIL import ImageOps

    if not _seems_complete(image.format, data):
        return ImageOps.exif_transpose(image).size
    return image.size if orientation < 5 else (image.height, image.width)


def _seems_complete(kind: str | None, data: bytes) -> bool:
    from PIL import Image

    if kind in ("JPEG", "MPO"):
        return data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")
    if kind == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 <= len(data)
    if kind == "PNG":
        with Image.open(io.BytesIO(data)) as image:
            image.verify()
        return True
    return False
