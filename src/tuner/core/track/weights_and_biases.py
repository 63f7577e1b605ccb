"""Weights & Biases as a tracker: ``log.to`` = ``wandb``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.core.errors import UsageError
from tuner.core.track.events import read_events

if TYPE_CHECKING:
    from tuner.core.config import LogConfig

WANDB = "wandb"


class WeightsAndBiases:
    """One run there for one run folder; a resumed run goes on in it."""

    def __init__(self, folder: Path, run_dir: Path, config: LogConfig, settings: Mapping[str, Any]) -> None:
        """folder: where its files go. settings: what to tell of the configuration."""
        import wandb

        wanted = {
            "project": config.project or "tuner",
            "name": config.run or run_dir.name,
            "dir": str(folder),
            "config": dict(settings),
            "id": identity(run_dir),
            "resume": "allow",
            "allow_val_change": True,
            # Live progress belongs to the terminal.
            "settings": wandb.Settings(console="off"),
        }
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(**(wanted | dict(config.args.get(WANDB, {}))))
        except TypeError as error:
            raise UsageError(
                "Weights & Biases does not take these arguments", where="log.args.wandb", why=str(error)
            ) from error
        except wandb.errors.Error as error:
            raise UsageError(
                "Weights & Biases did not start",
                where="log.to",
                why=str(error),
                fix="log in with `wandb login`, or set WANDB_MODE=offline",
            ) from error
        self._image = wandb.Image

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


def identity(run_dir: Path) -> str:
    """A name for the run of a folder that stays when it is resumed: from the place and the time it began."""
    events = run_dir / "events.jsonl"
    began = next((str(event.get("time")) for event in read_events(events)), "") if events.is_file() else ""
    return hashlib.blake2b(f"{run_dir.resolve()} {began}".encode(), digest_size=8).hexdigest()
