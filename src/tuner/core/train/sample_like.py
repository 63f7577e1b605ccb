"""Drawing a picture again from the settings inside of it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.core.errors import UsageError
from tuner.core.train.folder import CONFIG
from tuner.core.train.pictures import read_settings
from tuner.core.train.prompts import Prompt

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.registry import Run

log = logging.getLogger(__name__)

TOLD = {
    "precision": ("compute", "adapter", "vae", "text_encoder"),
    "latents": ("tiling",),
    "text_encoder": ("max_tokens", "mask_padding", "zero_padding", "unconditional"),
    "quantize": ("exclude", "activations"),
    "cache": ("text", "dtype"),
}
"""Section to those of its keys that a picture depends on by more than the order of sums."""
PIECES, PIECE_BYTES = 32, 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Like:
    """A picture of `tuner sample`, or one that a run drew (``step`` is then the number of its updates)."""

    path: Path
    settings: Mapping[str, Any]
    prompt: Prompt

    @property
    def step(self) -> int | None:
        """Of a run's picture; 0 is its base model."""
        return self.settings.get("step")

    @property
    def run(self) -> Path | None:
        """The folder of the run that drew it while it trained, if the picture is still in its place."""
        folder = self.path.resolve().parent.parent.parent
        return folder if self.step and (folder / CONFIG).is_file() else None

    @property
    def ema(self) -> bool:
        return self.settings.get("weights") == "ema"

    @property
    def file(self) -> str | None:
        """Name of the file of the model's weights; None where the picture does not tell."""
        name: str | None = self.settings.get("model", {}).get("file")
        return name

    @property
    def strength(self) -> float:
        """Of the adapter that was training, in a run's picture."""
        return float(self.settings.get("adapter_strength", 1.0))

    def adapters(self, offered: Sequence[Path], others: Iterable[Path]) -> list[tuple[Path, float]]:
        """The adapters that the picture names, found by their bytes, at its strengths.

        others: are looked at when they are not all among those ``offered``. UsageError naming one that is not there, or
        an offered file that the picture was made without.
        """
        wanted = self.settings.get("adapters", self.settings.get("extra", []))
        missing, names = ({each[key] for each in wanted} for key in ("sha256", "file"))
        known: dict[str, Path] = {}
        for file in offered:
            digest = _digest(file)
            if digest not in missing:
                raise UsageError(
                    "the picture was made without this adapter",
                    where=f"{file}, --adapter",
                    why=f"{self.path.name} does not name these bytes",
                    fix="leave it out",
                )
            known.setdefault(digest, file)
        # Names first: files with the same bytes may have several, and large ones need not be read.
        for file in sorted(others, key=lambda path: path.name not in names):
            if not missing - known.keys():
                break
            known.setdefault(_digest(file), file)
        for each in wanted:
            if each["sha256"] not in known:
                raise UsageError(
                    f"the picture was made with {each['file']}, which is not here",
                    where=str(self.path),
                    why=f"no file has the SHA-256 {each['sha256']}",
                    fix="add --adapter FILE, or name the folder of its run",
                )
        return [(known[each["sha256"]], float(each["strength"])) for each in wanted]

    def check(self, run: Run, files: Sequence[Path]) -> None:
        """UsageError for another model; a warning for what else makes another picture of it. files: of the weights."""
        config, facts = run.config, run.facts
        if self.step is not None:
            return
        model = self.settings["model"]
        if (model["family"], model["flavour"]) != (facts.family, facts.flavour):
            raise UsageError(
                f"the picture was made with {model['family']} {model['flavour']}".rstrip(),
                where=str(self.path),
                why=f"this model is {facts.family} {facts.flavour}".rstrip(),
                fix="name the configuration of that model",
            )
        if model["fingerprint"] != fingerprint(files):
            log.warning("the weights are not those of %s then: the picture will differ", model["file"])
        then, now = self.settings["config"], config_told(config)
        both = {
            "model.merge": (self.settings.get("merged", []), run.manifest.get("merged", [])),
            "quantize": (self.settings.get("quantize", {}), config.quantize.methods()),
            **{key: (then.get(key), now.get(key)) for key in (*now, *(then.keys() - now.keys()))},
        }
        for key, (before, after) in both.items():
            if before != after:
                log.warning("%s was %s and is %s: the picture will differ", key, before, after)


def config_told(config: RunConfig) -> dict[str, Any]:
    """What a picture tells of the configuration besides its prompt: dotted key to value."""
    found = {}
    for section, keys in TOLD.items():
        values = getattr(config, section).model_dump(mode="json")
        found.update({f"{section}.{key}": values[key] for key in keys})
    return found


def fingerprint(files: Sequence[Path]) -> str:
    """Tells files of weights apart by their sizes and `PIECES` of their bytes: large files are not read in full."""
    digest = blake2b(digest_size=16)
    for path in files:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for piece in range(PIECES):
                file.seek(size * piece // PIECES)
                digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()


def read_like(path: Path) -> Like:
    """The settings in a picture. UsageError when it has none."""
    try:
        settings = read_settings(path)
    except OSError as error:
        raise UsageError("cannot read the picture", where=f"{path}, --like", why=error.strerror) from error
    names = [each.name for each in fields(Prompt)]
    given = {name: settings[name] for name in names if name in settings} if settings else {}
    try:
        assert settings is not None and ("step" in settings or {"model", "adapters", "config"} <= settings.keys())
        return Like(path=path, settings=settings, prompt=Prompt(**given))
    except (AssertionError, TypeError) as error:
        raise UsageError(
            "this picture does not say how it was made",
            where=f"{path}, --like",
            why="it has no settings that this program wrote, or was saved again by another",
        ) from error


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError("cannot read the adapter", where=str(path), why=error.strerror) from error
