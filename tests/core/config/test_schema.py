"""The schema is what editors see: described keys, JSON names, no surprises; intervals and shares read as documented."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

import tuner
from tests.core.config.samples import build
from tuner.core.config import EveryFields, ModelConfigBase, RunConfig, steps_of
from tuner.core.config.data import DefaultsConfig
from tuner.core.config.messages import _models


def sections(schema: type[BaseModel]) -> dict[str, type[BaseModel]]:
    found = {schema.__name__: schema}
    for field in schema.model_fields.values():
        for inner in _models(field.annotation):
            found |= sections(inner)
    return found


@pytest.mark.parametrize("name", sorted(sections(RunConfig)))
def test_every_section_is_frozen_strict_and_every_key_described(name: str) -> None:
    schema = sections(RunConfig)[name]
    assert schema.model_config["frozen"]
    assert schema.model_config["extra"] == "forbid"
    for key, field in schema.model_fields.items():
        assert field.description, f"{name}.{key} has no description"


SOURCES = Path(tuner.__file__).parent
NOT_READ = {"DataConfig.defaults"}
"""Followed while the document is read."""


def test_every_key_is_read_by_the_program() -> None:
    # A name is no proof of an effect, but a key that no line outside the schema names surely has none.
    code = "\n".join(
        path.read_text(encoding="utf-8")
        for path in SOURCES.rglob("*.py")
        if not path.is_relative_to(SOURCES / "core" / "config")
    )
    # Defaults have the keys of sets and sources, which are looked at by themselves.
    schemas = sections(RunConfig).items() - {("DefaultsConfig", DefaultsConfig)}
    unread = {
        f"{name}.{key}"
        for name, schema in schemas
        for key in schema.model_fields
        if not re.search(rf"\.{key}\b|\"{key}\"", code)
    }
    assert unread <= NOT_READ


def test_json_schema_uses_json_names() -> None:
    schema = RunConfig.model_json_schema()
    assert "validate" in schema["properties"]
    assert "validation" not in schema["properties"]
    captions = schema["$defs"]["CaptionsConfig"]["properties"]
    assert "from" in captions
    assert json.dumps(schema)


def test_every_takes_a_number_a_share_or_an_object() -> None:
    assert build(checkpoint={"every": 250}).checkpoint.every == EveryFields(steps=250)
    assert build(checkpoint={"every": "10%"}).checkpoint.every == EveryFields(steps="10%")
    every = {"epochs": 2, "minutes": 30}
    assert build(checkpoint={"every": every}).checkpoint.every == EveryFields(epochs=2, minutes=30)


@pytest.mark.parametrize(
    ("count", "total", "expected"), [(7, 100, 7), ("5%", 2000, 100), ("0.5%", 1000, 5), ("7%", 100, 7)]
)
def test_a_share_of_the_steps_is_exact(count: int | str, total: int, expected: int) -> None:
    assert steps_of(count, total) == expected


def test_the_configuration_is_frozen() -> None:
    config = build()
    with pytest.raises(ValueError, match="frozen"):
        config.train.seed = 3  # type: ignore[misc]


def test_importing_the_configuration_imports_no_torch() -> None:
    code = "import sys, tuner.core.config; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_keys_that_a_model_has_no_use_for_are_refused() -> None:
    class OneFile(ModelConfigBase):
        unused = ("variant", "vae")

    assert OneFile(family="toy", path="a", variant=None).variant is None
    with pytest.raises(ValidationError, match="variant and vae: of no use to this model"):
        OneFile(family="toy", path="a", variant="fp16", vae={"path": "b"})
