"""What plugins and notebooks may import from ``tuner``: adding a name is a decision, losing one breaks somebody."""

from __future__ import annotations

import subprocess
import sys

import pytest

import tuner

PUBLIC = {
    "Ask", "Batch", "Blocks", "DtypeRules", "ExtensionPlugin", "Field", "Item", "KeyFormat", "KeyMaps", "LoraRules",
    "ModelConfigBase", "ModelFacts", "ModelPlugin", "Models", "Network", "NoiseDefaults", "NoiseTarget", "ParamGroup",
    "Placement", "Rng", "SampleDefaults", "StoredFile", "StoredTensor", "TensorInfo", "TextEmbeds", "UsageError",
    "WeightMaps", "hookimpl", "open_model", "train",
}  # fmt: skip


def test_the_public_names_are_these() -> None:
    assert set(tuner.__all__) == PUBLIC
    assert set(dir(tuner)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(tuner, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'tuner' has no attribute 'nothing'"):
        tuner.nothing  # noqa: B018


def test_importing_the_package_and_its_plugin_types_imports_nothing_heavy() -> None:
    code = """
import sys, tuner
tuner.hookimpl, tuner.ModelPlugin, tuner.UsageError, tuner.Rng
sys.exit(any(name in sys.modules for name in ("torch", "pydantic", "rich", "numpy")))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
