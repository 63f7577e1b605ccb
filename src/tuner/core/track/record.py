"""What a run left behind, read from its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.core.track.events import read_events, without_redone


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a run folder holds, as far as it is there."""

    folder: Path
    events: list[dict[str, Any]]
    ledger: dict[str, Any]
    config: dict[str, Any]
    manifest: dict[str, Any]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]

    def last(self, kind: str) -> dict[str, Any]:
        found = self.of(kind)
        return found[-1] if found else {}

    def state(self) -> str:
        """How the latest start of the run ended."""
        ends = [event for event in self.events if event["kind"] in ("run_start", "run_end")]
        return str(ends[-1].get("reason", "no end recorded")) if ends else "no end recorded"

    @property
    def name(self) -> str:
        """What the run calls itself, else its folder."""
        return str(self.last("run_start").get("run") or self.folder.name)

    @property
    def steps(self) -> int:
        """The last step that was recorded."""
        return max((event["step"] for event in self.of("step")), default=0)

    @property
    def seconds(self) -> float:
        """Time in training steps."""
        return sum(event.get("seconds") or 0.0 for event in self.of("step"))

    @property
    def speed(self) -> float | None:
        """Images per second, the median over the steps."""
        speeds = sorted(event["images_per_second"] for event in self.of("step") if event.get("images_per_second"))
        return float(speeds[len(speeds) // 2]) if speeds else None

    @property
    def memory(self) -> int | None:
        """Bytes on the device at the peak, where the steps tell them."""
        return max((event.get("memory_bytes") or 0 for event in self.of("step")), default=0) or None

    def inside(self, name: Any) -> Path | None:
        """The named file, if it exists and lies in the folder."""
        if not isinstance(name, str):
            return None
        path = (self.folder / name).resolve()
        return path if path.is_relative_to(self.folder.resolve()) and path.is_file() else None


def read_run(run_dir: Path) -> RunRecord:
    """Everything of a run folder that views of it need; what is missing is empty."""
    return RunRecord(
        run_dir,
        without_redone(read_events(run_dir / "events.jsonl")),
        _read_json(run_dir / "data.json"),
        _read_json(run_dir / "config.resolved.json"),
        _read_json(run_dir / "manifest.json"),
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {"unreadable": f"{path.name} is not JSON"}
    return value if isinstance(value, dict) else {}
