"""Which plugins this user installed, so that they can be put back after an upgrade replaced the environment."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tuner.core.atomic import write_json
from tuner.core.errors import UsageError


def config_folder() -> Path:
    """The user's folder for this program; ``TUNER_CONFIG_DIR`` overrides it."""
    if folder := os.environ.get("TUNER_CONFIG_DIR"):
        return Path(folder)
    if sys.platform == "win32":
        return Path(os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming") / "tuner"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "tuner"
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "tuner"


class PluginRecord:
    """``plugins.json`` of the user's folder: package to the requirement, path or address it was installed from."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or config_folder() / "plugins.json"

    def read(self) -> dict[str, str]:
        """Empty when nothing was recorded yet. UsageError when the file cannot be understood: it is not overwritten."""
        try:
            plugins = json.loads(self.path.read_text(encoding="utf-8"))["plugins"]
            return {str(package): str(wanted) for package, wanted in plugins.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                "the record of installed plugins cannot be read",
                where=str(self.path),
                why=f"{type(error).__name__}: {error}",
                fix="repair the file, or move it away",
            ) from error

    def add(self, plugins: dict[str, str]) -> None:
        self._write(self.read() | plugins)

    def remove(self, *packages: str) -> None:
        self._write({package: wanted for package, wanted in self.read().items() if package not in packages})

    def _write(self, plugins: dict[str, str]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"plugins": dict(sorted(plugins.items()))})
