"""The extensions of a run, called at its milestones."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Extensions:
    """Calls every extension that the configuration lists, in that order."""

    names: tuple[str, ...]
    _hooks: Any

    def wrapping(self, hook: str) -> tuple[str, ...]:
        """Names and versions of the extensions that wrap a model hook, and so may change what it gives."""
        return tuple(each.plugin_name for each in getattr(self._hooks, hook).get_hookimpls() if each.wrapper)

    def on_run_start(self, run: Any) -> None:
        self._hooks.on_run_start(run=run)

    def on_step_end(self, step: int, metrics: Mapping[str, float]) -> None:
        self._hooks.on_step_end(step=step, metrics=metrics)

    def on_checkpoint(self, step: int, paths: Sequence[Path]) -> None:
        self._hooks.on_checkpoint(step=step, paths=paths)

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        self._hooks.on_run_end(summary=summary)

    def extra_metrics(self, step: int, taken: Collection[str] = ()) -> dict[str, float]:
        """Numbers of all extensions; a name that is in ``taken`` or comes twice is an error."""
        return _joined("extra_metrics", self._hooks.extra_metrics(step=step), taken)

    def extra_metadata(self, taken: Collection[str] = ()) -> dict[str, str]:
        """Strings of all extensions for exported files; a key that is in ``taken`` or comes twice is an error."""
        return _joined("extra_metadata", self._hooks.extra_metadata(), taken)


def _joined(hook: str, parts: Sequence[Mapping[str, Any]], taken: Collection[str]) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if key in joined or key in taken:
                raise UsageError(
                    f"two sources give {key!r} through {hook}",
                    where="extensions",
                    fix="leave one of the extensions out",
                )
            joined[key] = value
    return joined
