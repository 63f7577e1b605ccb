"""`ModelConformance`: one test class with everything that a model plugin must do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

# The assertions below are what an author reads: let pytest show the values in them.
for _name in ("compile_checks", "plugin_checks", "encoding_checks", "network_checks", "run_checks"):
    pytest.register_assert_rewrite(f"tuner.core.testing.{_name}")

from tuner.core.testing.bench import Bench  # noqa: E402
from tuner.core.testing.compile_checks import CompileChecks  # noqa: E402
from tuner.core.testing.encoding_checks import EncodingChecks  # noqa: E402
from tuner.core.testing.network_checks import NetworkChecks  # noqa: E402
from tuner.core.testing.plugin_checks import PluginChecks  # noqa: E402
from tuner.core.testing.run_checks import RunChecks  # noqa: E402


class ModelConformance(PluginChecks, EncodingChecks, NetworkChecks, RunChecks, CompileChecks):
    """Subclass it in a test module; pytest runs the rest. All on the CPU, in under a minute for a model of a few MB.

    plugin: the name the model is installed under. lr: a rate at which the tiny model learns one batch in 20 steps.
    round_trip: largest error of decoding encoded pixels, for codecs that can be exact even with random weights.
    compiler: what compiles the blocks; where this machine cannot run it, ``aot_eager`` stands in.
    """

    plugin: ClassVar[str] = ""
    lr: ClassVar[float] = 1e-2
    round_trip: ClassVar[float | None] = None
    compiler: ClassVar[str] = "eager"

    def tiny_config(self, tmp_path: Path) -> dict[str, Any]:
        """Write a tiny model below ``tmp_path``, once per class, and return settings with at least a ``model`` section.

        Further sections win over those of the kit.
        """
        raise TypeError(f"{type(self).__name__} must define tiny_config(self, tmp_path)")

    def full_size_config(self, tmp_path: Path) -> dict[str, Any]:
        """As `tiny_config`, of the public size; write the files with ``write_empty_weights``.

        The components that train are loaded from it on the meta device, to compare names, presets and counts. Without
        an override the tiny model stands in.
        """
        return self.tiny_config(tmp_path)

    @pytest.fixture
    def bench(self, tmp_path_factory: pytest.TempPathFactory) -> Bench:
        """The tiny model and all that is made from it, shared by the tests of the class."""
        return self._shared("_bench", tmp_path_factory, self.tiny_config)

    @pytest.fixture
    def full_size(self, tmp_path_factory: pytest.TempPathFactory) -> Bench:
        """The same for the full-size model, which is never loaded off the meta device."""
        return self._shared("_full_size", tmp_path_factory, self.full_size_config)

    def _shared(self, name: str, factory: pytest.TempPathFactory, settings: Callable[[Path], dict[str, Any]]) -> Bench:
        """Made at its first use and kept by the class: every test has an instance of its own."""
        if name not in type(self).__dict__:
            folder = factory.mktemp(f"{self.plugin}{name}")
            setattr(type(self), name, Bench(self.plugin, settings(folder), folder, self.lr))
        bench: Bench = type(self).__dict__[name]
        return bench
