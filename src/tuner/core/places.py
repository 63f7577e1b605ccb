"""From a path or hub id in a configuration to files on this machine. No torch.

A place is a local file, a local folder, or a hub id ``owner/name`` that may go on with a path inside the repository
(``owner/name/folder/file.safetensors``). What is not here is fetched once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.core.errors import NotHereError, UsageError
from tuner.core.files import INDEX_SUFFIX, find_weights, weight_header

if TYPE_CHECKING:
    from tuner.core.config import ComponentSource

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?P<inside>(/[\w. -]+)*)")
WEIGHT_SUFFIXES = (".safetensors", ".sft", ".pth", ".pt", ".ckpt", ".bin", ".gguf")
PATTERNS = ("*.safetensors", "*.sft", "*.json", "*.txt", "*.model")
DENOISER_FOLDERS = ("transformer",)
_here_only: ContextVar[bool] = ContextVar("_here_only", default=False)


@contextmanager
def here_only() -> Iterator[None]:
    """Inside, nothing is fetched: what is not on this machine is a `NotHereError`."""
    token = _here_only.set(True)
    try:
        yield
    finally:
        _here_only.reset(token)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What one path of the configuration means: ``local`` is a file or folder that exists. ``where``: its key."""

    local: Path
    where: str

    @classmethod
    def of(
        cls,
        path: str,
        *,
        where: str,
        revision: str | None = None,
        download_dir: str | None = None,
        patterns: tuple[str, ...] = PATTERNS,
        ignore: tuple[str, ...] = (),
    ) -> Place:
        """Find ``path``, fetching what matches ``patterns`` and not ``ignore`` when it is a hub id.

        UsageError when there is no such place.
        """
        local = Path(path).expanduser()
        if local.exists():
            if revision is not None:
                raise _no_effect(where, "revision", f"{path} is on this machine, not on the hub")
            return cls(local=local, where=where)
        match = HUB_ID.fullmatch(path)
        if not match or _is_local(path):
            raise NotHereError("no such file or folder", where=f"{where}: {path}", fix=_nearest(local))
        inside = match["inside"].strip("/")
        if inside:
            patterns = (inside, f"{inside}/*")
            ignore = ()
        folder = fetch(
            match["repo"], revision=revision, download_dir=download_dir, patterns=patterns, where=where, ignore=ignore
        )
        local = folder / inside if inside else folder
        if not local.exists():
            raise UsageError(f"{match['repo']} has no {inside}", where=where, fix="look at the repository's file list")
        return cls(local=local, where=where)

    def folder(self, *names: str) -> Path | None:
        """The first of the named folders that exists in a diffusers layout around ``local``; None for a lone file."""
        base = self.local if self.local.is_dir() else self.local.parent
        inside = base.name in DENOISER_FOLDERS
        if self.local.is_file() and not inside:
            return None
        root = base.parent if inside else base
        return next((root / name for name in names if (root / name).is_dir()), None)

    def weights(self, *names: str, subfolder: str | None = None, variant: str | None = None) -> Path:
        """The weight file or shard index: in ``subfolder``, or in the first folder of ``names`` that exists."""
        if self.local.is_file():
            for key, value in (("subfolder", subfolder), ("variant", variant)):
                if value is not None:
                    raise _no_effect(self.where, key, f"{self.local.name} is one file")
            return self.local
        base = self.local / subfolder if subfolder else self.local
        if not subfolder:
            base = next((self.local / name for name in names if (self.local / name).is_dir()), self.local)
        if variant is not None:
            named = sorted((*base.glob(f"*.{variant}.safetensors"), *base.glob(f"*.safetensors.index.{variant}.json")))
            if len(named) != 1:
                raise UsageError(f"{len(named)} files of variant {variant!r}", where=str(base),
                                 fix="set model.variant to a variant that exists, or name the file")  # fmt: skip
            return named[0]
        return find_weights(base)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerPlaces:
    """Where the files of a tokenizer may be: ``tokenizer.json``, or ``pieces``, which serve as well taken together.

    name: as in ``model.tokenizers``. hub: the public repository with the files that the model was trained with.
    """

    name: str
    hub: str
    pieces: tuple[str, ...]

    def files(self, path: Path) -> tuple[Path, ...]:
        """The tokenizer's files that there are at ``path``, a folder or one of the files; () for no tokenizer."""
        names = ("tokenizer.json", *self.pieces)
        if path.is_file():
            return (path,) if path.suffix == ".json" or path.name in self.pieces else ()
        found = tuple(file for name in names if (file := path / name).is_file())
        complete = path / names[0] in found or len(found) == len(self.pieces)
        return found if complete else ()

    def find(self, source: ComponentSource | None, near: Iterable[Path], *, download_dir: str | None) -> Path:
        """What ``source`` names, else the first tokenizer of ``near``, else that of the hub, fetched once.

        UsageError when ``source`` holds no such tokenizer, or when the hub's is needed and cannot be had.
        """
        where, names = f"model.tokenizers.{self.name}.path", ("tokenizer.json", *self.pieces)
        if source is None:
            beside = next((path for path in near if self.files(path)), None)
            return beside or fetch(self.hub, revision=None, download_dir=download_dir, patterns=names, where=where)
        place = Place.of(source.path, where=where, revision=source.revision, download_dir=download_dir, patterns=names)
        path = place.local / source.subfolder if source.subfolder else place.local
        if not self.files(path):
            raise UsageError(f"no {self.name} tokenizer here", where=str(path),
                             why=f"it needs tokenizer.json, or {' and '.join(self.pieces)}",
                             fix=f"set {where} to the folder of its files")  # fmt: skip
        return path


def _no_effect(where: str, key: str, why: str) -> UsageError:
    """``where`` ends with ``path``; ``key`` stands beside it."""
    return UsageError(f"{where.removesuffix('path')}{key} has no effect", where=where, why=why, fix="take it out")


def _nearest(path: Path) -> str:
    """What to do about a path that does not exist: a similar name beside it, when there is one."""
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    similar = difflib.get_close_matches(path.name, beside, n=1)
    return f"did you mean {path.parent / similar[0]}?" if similar else "check the path"


def with_shards(path: Path) -> tuple[Path, ...]:
    """A weight file, or a shard index and its shards."""
    return (path, *weight_header(path).files) if path.name.endswith(INDEX_SUFFIX) else (path,)


def _is_local(path: str) -> bool:
    """Whether a path that does not exist was meant as a local one: by its suffix, or because its folder exists."""
    first = Path(path).parts[0]
    inside = path.count("/") > 1
    return path.startswith((".", "~")) or Path(first).exists() or (not inside and path.endswith(WEIGHT_SUFFIXES))


@cache
def fetch(
    repo: str,
    *,
    revision: str | None,
    download_dir: str | None,
    patterns: tuple[str, ...],
    where: str,
    ignore: tuple[str, ...] = (),
) -> Path:
    """A snapshot of the matching files of a hub repository; asks the hub once per process, then the local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    arguments: dict[str, Any] = {"revision": revision, "cache_dir": download_dir, "allow_patterns": list(patterns)}
    if _here_only.get():
        arguments["local_files_only"] = True
    if ignore:
        arguments["ignore_patterns"] = list(ignore)
    try:
        return Path(snapshot_download(repo, **arguments))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        options = "".join(f" --include '{pattern}'" for pattern in patterns)
        options += "".join(f" --exclude '{pattern}'" for pattern in ignore)
        options += f" --revision {revision}" if revision else ""
        options += f" --cache-dir {download_dir}" if download_dir else ""
        raise NotHereError(
            f"cannot fetch {repo} from the hub",
            where=where,
            why=str(error).splitlines()[0] or type(error).__name__,
            fix=f"on a machine with network run: hf download {repo}{options}; or set {where} to local files",
        ) from error
