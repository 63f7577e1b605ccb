"""What names a cache entry: everything that can change its values, and nothing else."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.core.atomic import write_json
from tuner.core.data.cache import CacheKey
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.types import ModelFacts

HASHES = "identities.json"
"""File of a cache folder that remembers the hashes of weight files."""
_CHUNK = 1 << 20
_SETTLED_NS = 2_000_000_000
_LARGE = 500_000_000

logger = logging.getLogger(__name__)


class FileHashes:
    """Content hashes of weight files, remembered by (path, size, modification time), so 4 GB are read once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._told = False
        self._known: dict[str, dict[str, Any]] = {}
        try:
            loaded = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            # A file that is absent, torn or foreign only costs hashing again.
            loaded = {}
        if isinstance(loaded, dict):
            self._known = loaded

    def digest(self, file: Path) -> str:
        """blake2b-128 of a file's bytes, as hex. Raises UsageError when it cannot be read."""
        name = str(file.resolve())
        try:
            stat = file.stat()
            known = self._known.get(name)
            if known and (known.get("size"), known.get("mtime_ns")) == (stat.st_size, stat.st_mtime_ns):
                return str(known["digest"])
            if stat.st_size > _LARGE:
                logger.info("reading %s (%.1f GB) once, to know it again by its content", file, stat.st_size / 1e9)
            digest = _hash_file(file)
        except OSError as error:
            raise UsageError("cannot read a model file", where=str(file), why=error.strerror) from error
        # A file this young may change again without a new time stamp.
        if stat.st_mtime_ns + _SETTLED_NS < time.time_ns():
            self._known[name] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "digest": digest}
            self._remember()
        return digest

    def changed(self) -> list[Path]:
        """Remembered files whose bytes are others although size and time are the same; they are forgotten."""
        found = []
        for name, known in list(self._known.items()):
            file = Path(name)
            try:
                stat = file.stat()
                same = (known.get("size"), known.get("mtime_ns")) == (stat.st_size, stat.st_mtime_ns)
                if same and _hash_file(file) != known.get("digest"):
                    found.append(file)
                    del self._known[name]
            except (OSError, AttributeError):
                continue
        if found:
            self._remember()
        return found

    def _remember(self) -> None:
        try:
            write_json(self.path, self._known)
        except OSError as error:
            if not self._told:
                logger.warning("cannot write %s (%s): the next start hashes the model files again", self.path, error)
            self._told = True


def component_identity(files: Sequence[Path], hashes: FileHashes) -> str:
    """Identifies a component by the names and bytes of its files; folders stand for all files below them."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(_expanded(files), key=lambda path: path.name):
        digest.update(f"{file.name}\x1f{hashes.digest(file)}\x1e".encode())
    return digest.hexdigest()


def component_identities(facts: ModelFacts, components: Iterable[str], cache_dir: Path) -> dict[str, str]:
    """Identity of each named component, from the files that the plugin declares for it.

    A component that is declared with no file is code alone; the family's name in every key stands for it.
    """
    hashes = FileHashes(cache_dir / HASHES)
    identities = {}
    for component in components:
        files = facts.files.get(component)
        if files is None:
            raise UsageError(
                f"the encodings of {component} cannot be cached",
                why=f"model {facts.family} does not say which files make this component",
                fix='set cache.latents and cache.text to "off", or report this to the author of the model plugin',
            )
        identities[component] = component_identity([Path(file) for file in files], hashes)
    return identities


def latent_key(
    *, image: str, resize: str, resized: tuple[int, int], crop: tuple[int, int], size: tuple[int, int], flip: bool,
    background: str, vae: Mapping[str, Any], dtype: str,
) -> CacheKey:  # fmt: skip
    """Key of one image's latents.

    image: digest of the file's bytes. resized: size in pixels before the crop. crop: left, top. size: width, height of
    the crop. background: what transparent pixels are laid over. vae: identity, dtype and options of the VAE, and how
    the posterior is read. dtype: of the stored latents.
    """
    ingredients = {
        "image": image, "exif": "applied", "resize": resize, "resized": list(resized), "crop": list(crop),
        "size": list(size), "flip": flip, "background": background, "vae": dict(vae), "dtype": dtype,
    }  # fmt: skip
    return CacheKey.of("latents", ingredients)


def mask_key(
    *, mask: str, resize: str, resized: tuple[int, int], crop: tuple[int, int], size: tuple[int, int], flip: bool,
    factor: int,
) -> CacheKey:  # fmt: skip
    """Key of a mask reduced to latent size. mask: its kind (``alpha`` or ``file``) and the digest of that file."""
    ingredients = {
        "mask": mask, "exif": "applied", "resize": resize, "resized": list(resized), "crop": list(crop),
        "size": list(size), "flip": flip, "factor": factor,
    }  # fmt: skip
    return CacheKey.of("mask", ingredients)


def text_key(*, text: str, encoders: Mapping[str, Any], dtype: str) -> CacheKey:
    """Key of one final caption. encoders: identities, dtypes, token limits and padding rules of what encodes it."""
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return CacheKey.of("text", {"text": digest, "encoders": dict(encoders), "dtype": dtype})


def _hash_file(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _expanded(files: Iterable[Path]) -> list[Path]:
    found: dict[Path, None] = {}
    for path in files:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if not file.is_dir():
                found[file] = None
    return list(found)
