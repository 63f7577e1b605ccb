"""The conformance kit: what every model plugin must do, as a test class to subclass.

    from tuner.core.testing import ModelConformance

    class TestMyModel(ModelConformance):
        plugin = "my-model"

        def tiny_config(self, tmp_path):
            return {"model": {"path": str(write_tiny_weights(tmp_path))}}

Names are imported when first used: only `ModelConformance` needs pytest.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.core.testing.conformance import ModelConformance as ModelConformance
    from tuner.core.testing.facts import fact_problems as fact_problems
    from tuner.core.testing.weights import write_empty_weights as write_empty_weights

_HOME = {"ModelConformance": "conformance", "fact_problems": "facts", "write_empty_weights": "weights"}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
