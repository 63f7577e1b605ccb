"""A plugin's `Ask` marks become questions, and the answers its section, without a line about the plugin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.core.registry.conftest import site  # noqa: F401  # the same installed toys
from tests.core.registry.toys import Site, write_header
from tuner.core.errors import UsageError
from tuner.core.registry import Catalog
from tuner.core.wizard.answers import FileAsker
from tuner.core.wizard.models import choose_model
from tuner.core.wizard.questions import Interview

CONFIG = '''
from typing import Annotated, Literal
from pydantic import Field
from tuner import Ask, ModelConfigBase
from tuner.core.config import ComponentSource

class Config(ModelConfigBase):
    """A toy."""
    unused = ("text_encoders",)
    sharpness: Annotated[float, Ask(question="How sharp?")] = Field(1.0, gt=0)
    """A key of its own."""
    palette: Annotated[Literal["warm", "cold"], Ask(question="Which colours?")] = "warm"
    """Another."""
    varnish: Annotated[bool, Ask(question="With varnish?")] = False
    """A third."""
    grain: Annotated[float | None, Field(gt=0), Ask(question="How grainy?")] = None
    """May be left out."""
    light: Annotated[Literal["left", "right"] | None, Ask(question="From where does light come?")] = None
    """May be left out, too."""
    sizes: Annotated[tuple[int, ...], Ask(question="Which sizes?")] = (8, 16)
    """A list."""
    gloss: Annotated[dict[Literal["sky", "sea"], float], Ask(question="How glossy is the {name}?")] = Field(
        default_factory=dict
    )
    """Numbers by name."""
    frame: Annotated[ComponentSource | None, Ask(question="Where is the frame?", when="missing")] = None
    """A part."""
    brushes: Annotated[
        dict[str, ComponentSource], Ask(question="Where is the brush {name}?", when="missing", optional=("fan",))
    ] = Field(default_factory=dict)
    """Parts."""
    signed: bool = False
    """Never asked for."""
'''
FILES = """

def files(config):
    for name in ("flat", "round"):
        if name not in config.model.brushes:
            raise UsageError(f"no brush {name}", where=f"model.brushes.{name}.path")
    if config.model.frame is None:
        raise UsageError("no frame", where="model.frame.path")
    weight_header(config.model.frame.path)
    return {"denoiser": (Path(config.model.path),)}

def recognise(header):
    return tuple(key for key in ("frame", "brushes.flat", "brushes.round", "brushes.fan") if f"{key}.x" in header)
"""


@pytest.fixture
def folder(site: Site, tmp_path: Path) -> Path:  # noqa: F811
    site.model("cubist")
    package = site.folder / "toy_cubist"
    (package / "config.py").write_text(CONFIG, encoding="utf-8")
    facts = (
        (package / "facts.py").read_text(encoding="utf-8").replace("from tuner import", "from tuner import UsageError,")
    )
    start, end = facts.index("def files("), facts.index("def detect(")
    facts = f"from tuner.core.files import weight_header\n{facts[:start]}{FILES}\n{facts[end:]}"
    (package / "facts.py").write_text(facts, encoding="utf-8")
    plugin = (package / "plugin.py").read_text(encoding="utf-8")
    plugin = plugin.replace("key_maps=", 'recognise="toy_cubist.facts:recognise", key_maps=')
    (package / "plugin.py").write_text(plugin, encoding="utf-8")
    inside = tmp_path / "models"
    (inside / "deep").mkdir(parents=True)
    write_header(inside / "weights.safetensors", "cubist.weight")
    write_header(inside / "deep" / "flat.safetensors", "brushes.flat.x")
    write_header(inside / "deep" / "a.safetensors", "brushes.round.x")
    write_header(inside / "deep" / "round.safetensors", "brushes.round.x")
    write_header(inside / "fan.safetensors", "brushes.fan.x")
    return inside


PLAIN = {"model.gloss.sky": 0.5, "model.gloss.sea": 1}


def section(folder: Path, **answers: Any) -> tuple[dict[str, Any], FileAsker, list[str]]:
    """The model's section, relative to the folder; who was asked; what was told."""
    told: list[str] = []
    asker = FileAsker({"models": str(folder), **PLAIN, **answers}, "answers.json", told.append)
    chosen = choose_model(Interview(asker), Catalog())
    assert chosen.facts is not None
    asker.finish()
    return json.loads(json.dumps(chosen.section).replace(f"{folder}/", "")), asker, told


def test_marked_keys_are_asked_for_in_order_and_defaults_stay_out(folder: Path) -> None:
    frame = write_header(folder.parent / "frame.safetensors", "anything")
    found, asker, told = section(
        folder, **{"model.frame": str(frame), "model.palette": "cold", "model.brushes.fan": "-"}
    )
    assert found == {
        "family": "cubist",
        "path": "weights.safetensors",
        "palette": "cold",
        "gloss": {"sky": 0.5, "sea": 1.0},
        # the one file there is for it, and of two the one whose name fits
        "brushes": {"flat": {"path": "deep/flat.safetensors"}, "round": {"path": "deep/round.safetensors"}},
        "frame": {"path": str(frame)},
    }
    assert asker.asked == [
        "models", "model.sharpness", "model.palette", "model.varnish", "model.grain", "model.light", "model.sizes",
        "model.gloss.sky", "model.gloss.sea", "model.brushes.round", "model.frame", "model.brushes.fan",
    ]  # fmt: skip
    assert any("brushes.flat: " in each for each in told)


def test_what_a_model_can_do_without_is_offered(folder: Path) -> None:
    frame = write_header(folder.parent / "frame.safetensors", "anything")
    found, _, _ = section(folder, **{"model.frame": str(frame), "model.sharpness": 2, "model.varnish": True})
    assert found["brushes"]["fan"] == {"path": "fan.safetensors"}
    assert (found["sharpness"], found["varnish"]) == (2.0, True)


def test_lists_numbers_by_name_and_what_may_be_left_out_are_asked_for(folder: Path) -> None:
    frame = write_header(folder.parent / "frame.safetensors", "anything")
    given = {"model.frame": str(frame), "model.sizes": "[4, 8]", "model.grain": 0.25, "model.light": "left"}
    found, _, told = section(folder, **given)
    assert (found["sizes"], found["grain"], found["light"]) == ([4, 8], 0.25, "left")
    assert any("How glossy is the sea? 1" in each for each in told)
    found, _, _ = section(folder, **{"model.frame": str(frame), "model.grain": "-"})
    assert not {"sizes", "grain", "light"} & set(found)


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ({"model.grain": 0}, "greater than 0"),
        ({"model.light": "up"}, "there are left, right, -"),
        ({"model.sizes": "[1.5]"}, "valid integer"),
        ({"model.gloss.sea": "wet"}, "valid number"),
        ({"model.sharpness": 0}, "greater than 0"),
        ({"model.sharpness": "very"}, "valid number"),
        ({"model.palette": "cool"}, "did you mean 'cold'?"),
        ({"model.frame": "nowhere.safetensors"}, "no such file or folder"),
        ({"model.frame": "text.safetensors"}, "not a safetensors file"),
    ],
)
def test_an_answer_that_the_plugin_would_refuse_is_refused_at_once(
    folder: Path, answers: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.parent / "text.safetensors").write_text("{}", encoding="utf-8")
    monkeypatch.chdir(folder.parent)
    with pytest.raises(UsageError) as error:
        section(folder, **answers)
    assert told in str(error.value)


def test_weights_of_no_installed_model_are_told_with_what_is_installed(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_header(other / "x.safetensors", "something.weight")
    with pytest.raises(UsageError) as error:
        section(other)
    assert "no model that an installed plugin knows" in str(error.value)
    assert "1 weight files were read" in str(error.value)
    assert "cubist" in str(error.value)
