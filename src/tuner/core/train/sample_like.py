"""Drawing a picture again from the settings inside of it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from hashlib import file_digest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.core.errors import UsageError
from tuner.core.train.pictures import read_settings
from tuner.core.train.prompts import Prompt

if TYPE_CHECKING:
    from tuner.core.registry import Run

log = logging.getLogger(__name__)


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
    def ema(self) -> bool:
        return self.settings.get("weights") == "ema"

    @property
    def strength(self) -> float:
        """Of the adapter that was training, in a run's picture."""
        return float(self.settings.get("adapter_strength", 1.0))

    def adapters(self, files: Iterable[Path]) -> list[tuple[Path, float]]:
        """The adapters that the picture names, found by their bytes among ``files``, at its strengths.

        UsageError naming one that is not there.
        """
        wanted = self.settings.get("adapters", self.settings.get("extra", []))
        if not wanted:
            return []
        known: dict[str, Path] = {}
        for file in files:
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

    def check(self, run: Run, file: str) -> None:
        """UsageError for another model; a warning for what else makes another picture of it. file: of the weights."""
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
        both = {
            "the file of the weights": (model["file"], file),
            "model.merge": (self.settings.get("merged", []), run.manifest.get("merged", [])),
            "precision.compute": (self.settings["compute"], config.precision.compute),
            "quantize": (self.settings.get("quantize", {}), config.quantize.methods()),
        }
        for key, (then, now) in both.items():
            if now != then:
                log.warning("%s was %s and is %s: the picture will differ", key, then, now)


def read_like(path: Path) -> Like:
    """The settings in a picture. UsageError when it has none."""
    try:
        settings = read_settings(path)
    except OSError as error:
        raise UsageError("cannot read the picture", where=f"{path}, --like", why=error.strerror) from error
    names = [each.name for each in fields(Prompt)]
    given = {name: settings[name] for name in names if name in settings} if settings else {}
    try:
        assert settings is not None and ("step" in settings or {"model", "adapters", "compute"} <= settings.keys())
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
