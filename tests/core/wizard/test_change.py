"""Changing a configuration: comments that are no longer true go, what is the user's stays."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.runs import make_pictures
from tests.fixtures.tiny_anima import make_tiny_anima
from tests.fixtures.tiny_flux import make_tiny_flux
from tuner.core.config.jsonc import parse
from tuner.core.data.probe import probe_all
from tuner.core.errors import UsageError
from tuner.core.registry import Catalog
from tuner.core.wizard.answers import FileAsker
from tuner.core.wizard.change import configure_existing
from tuner.core.wizard.create import configure_new
from tuner.core.wizard.questions import Interview
from tuner.core.wizard.writing import write


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_tiny_anima(folder / "anima")
    make_tiny_flux(folder / "flux")
    return folder


@pytest.fixture
def config(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration as the wizard writes it."""
    (tmp_path / "pictures").mkdir()
    make_pictures(tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.json"
    given = {"pictures": "pictures", "trigger": "mila", "goal": "character", "size": 64, "prompt": "a dog"}
    write(configure_new(asked(model(models, "flux") | given | {"card": "12GB"})[0], Catalog(), path, scratch(path)))
    return path


def model(models: Path, family: str) -> dict[str, Any]:
    tokenizers = {"anima": {"t5": "t5"}, "flux": {"clip_l": "clip_tokenizer", "t5": "t5_tokenizer"}}[family]
    places = {f"model.tokenizers.{name}": str(models / family / place) for name, place in tokenizers.items()}
    return {"models": str(models / family), **places}


def asked(answers: dict[str, Any]) -> tuple[Interview, list[str]]:
    told: list[str] = []
    return Interview(FileAsker(answers, "answers.json", told.append)), told


def scratch(path: Path) -> Path:
    return path.parent / "scratch"


def changed(path: Path, answers: dict[str, Any]) -> tuple[str, str]:
    """The new text, and what was told."""
    interview, told = asked(answers)
    outcome = configure_existing(interview, Catalog(), path, scratch(path))
    interview.asker.finish()
    return outcome.text, "\n".join(told)


@pytest.mark.parametrize("trigger", ["mila", "-"])
def test_every_picture_is_read_once(
    trigger: str, config: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def probe(paths: list[Path], *given: Any, **more: Any) -> list[Any]:
        read.extend(path.name for path in paths)
        return probe_all(paths, *given, **more)

    monkeypatch.setattr("tuner.core.data.index.probe_all", probe)
    pictures = [f"{number}.png" for number in range(4)]
    for name in pictures:  # a file that was written just now is read again in any case
        os.utime(tmp_path / "pictures" / name, (1e9, 1e9))
    given = {"pictures": "pictures", "trigger": trigger, "goal": "style", "card": "cpu", "prompt": "-", "size": 64}
    configure_new(asked(model(models, "flux") | given)[0], Catalog(), tmp_path / "other.json", tmp_path / "once")
    assert read == pictures
    read.clear()
    interview, _ = asked({"change": ["pictures", "goal"], "goal": "style", "card": "cpu"})
    configure_existing(interview, Catalog(), config, tmp_path / "twice")
    assert read == pictures


GOAL = {"change": ["goal"], "goal": "style"}


def test_the_planner_starts_afresh_for_another_card_and_the_head_follows(config: Path) -> None:
    config.unlink()
    given = {"models": "someone/some-model", "family": "flux", "pictures": "pictures", "goal": "character"}
    interview, _ = asked(given | {"size": 1024, "card": "4090", "memory": "16GB", "prompt": "-"})
    write(configure_new(interview, Catalog(), config, scratch(config)))
    before = config.read_text(encoding="utf-8")
    assert parse(before, "before").value.keys() & {"memory", "quantize"}
    assert "// Preset balanced: " in before
    text, _ = changed(config, GOAL | {"card": "h200", "preset": "quick"})
    assert not parse(text, "after").value.keys() & {"memory", "quantize"}
    assert "// Preset balanced" not in text
    assert "// Preset quick: " in text
    assert "less than without" not in text


def test_what_followed_from_the_last_size_and_card_follows_the_new_ones(config: Path) -> None:
    size = {"size": 256, "card": "cpu"}
    config.write_text(changed(config, GOAL | size)[0], encoding="utf-8")
    document = parse(config.read_text(encoding="utf-8"), "x").value
    assert document["data"]["sets"][0]["buckets"] == {"step": 16, "min": 128}
    assert (document["precision"], document["sample"]["size"]) == ({"compute": "fp32"}, 256)
    text, _ = changed(config, GOAL | {"size": 64, "card": "12GB"})
    document = parse(text, "after").value
    assert document["data"]["sets"][0]["buckets"] == {"step": 16, "min": 32}
    assert ("precision" in document, document["sample"]["size"]) == (False, 64)
    drawn, _ = changed(config, GOAL | {"change": ["goal", "prompt"], "size": 64, "card": "12GB", "prompt": "-"})
    assert "sample" not in parse(drawn, "after").value
    config.write_text(text.replace("// finer steps than usual, for small pictures", "// mine"), encoding="utf-8")
    text, _ = changed(config, GOAL | {"size": 1024, "card": "12GB"})
    document = parse(text, "after").value
    assert document["data"]["sets"][0]["buckets"] == {"step": 16, "min": 32}
    assert "size" not in document["sample"]


def test_levers_of_the_users_own_stay(config: Path) -> None:
    document = parse(config.read_text(encoding="utf-8"), "x").value | {"quantize": {"denoiser": "int8"}}
    config.write_text(json.dumps(document, indent=2), encoding="utf-8")
    text, _ = changed(config, GOAL | {"card": "4090"})
    assert parse(text, "after").value["quantize"] == {"denoiser": "int8"}


def test_what_was_said_about_the_old_model_and_pictures_goes(config: Path, models: Path) -> None:
    text, _ = changed(config, {"change": ["model"], **model(models, "anima")})
    assert "// recognised as anima" in text
    assert "flux" not in text
    assert "// Preset" not in text
    text, _ = changed(config, {"change": ["pictures"]})
    assert ("// Preset" in text, "// recognised as flux dev" in text) == (False, True)
    text, _ = changed(config, {"change": ["prompt"], "prompt": "a cat"})
    assert "// Preset balanced: " in text
    assert '// drawn at each of these steps, and by the base model to compare\n    "prompts": ["a cat"]' in text


@pytest.mark.parametrize("prompts", [["a dog", "a cat"], "prompts.txt"], ids=str)
def test_several_prompts_stay_unless_one_takes_their_place(prompts: Any, config: Path) -> None:
    document = parse(config.read_text(encoding="utf-8"), "x").value
    document["sample"]["prompts"] = prompts
    config.write_text(json.dumps(document, indent=2), encoding="utf-8")
    assert changed(config, {"change": ["prompt"]})[0] == config.read_text(encoding="utf-8")
    text, _ = changed(config, {"change": ["prompt"], "prompt": "a cow"})
    assert parse(text, "after").value["sample"]["prompts"] == ["a cow"]


def test_without_a_prompt_nothing_that_needs_one_is_left(config: Path) -> None:
    document = parse(config.read_text(encoding="utf-8"), "x").value
    document["sample"] |= {"negative": "blurry", "sampler": "heun"}
    document["attention"] = {"sample_backend": "math"}
    config.write_text(json.dumps(document, indent=2), encoding="utf-8")
    text, told = changed(config, {"change": ["prompt"], "prompt": "-"})
    assert not {"sample", "attention"} & set(parse(text, "after").value)
    assert "problems" not in told


def test_what_is_wrong_besides_is_told(config: Path) -> None:
    config.write_text(
        config.read_text(encoding="utf-8").replace('"steps"', '"sed": 1, "steps"').replace('"rank": 16', '"rank": "x"'),
        encoding="utf-8",
    )
    _, told = changed(config, {"change": ["prompt"], "prompt": "a cat"})
    assert "problems that stay" in told
    assert "unknown key 'sed'" in told
    assert "network.rank" in told


def test_captions_of_the_whole_configuration_are_known(config: Path) -> None:
    document = parse(config.read_text(encoding="utf-8"), "x").value
    del document["data"]["sets"][0]["sources"][0]["captions"]
    document["data"]["defaults"] = {"captions": {"from": "filename", "prefix": "zoe,"}}
    config.write_text(json.dumps(document, indent=2), encoding="utf-8")
    text, told = changed(config, {"change": ["pictures"]})
    assert "4 with a caption" in told
    assert text == config.read_text(encoding="utf-8")


def test_a_file_of_something_else_is_left_alone(config: Path) -> None:
    before = '{"version": "1.0", "model": {"vocab": {}}, "decoder": null}'
    config.write_text(before, encoding="utf-8")
    with pytest.raises(UsageError, match="no configuration of this program"):
        changed(config, {"change": ["prompt"], "prompt": "a cat"})
    assert config.read_text(encoding="utf-8") == before


def test_a_configuration_that_names_no_model_is_known_as_such(config: Path) -> None:
    document = parse(config.read_text(encoding="utf-8"), "x").value
    del document["model"]["family"]
    config.write_text(json.dumps(document), encoding="utf-8")
    interview, told = asked({"change": ["prompt"], "prompt": "a cat"})
    assert configure_existing(interview, Catalog(), config, scratch(config)).names_model is False
    assert not any("problems" in each for each in told)


def test_permissions_stay_and_a_read_only_file_is_refused_at_once(config: Path) -> None:
    config.chmod(0o600)
    interview, _ = asked({"change": ["prompt"], "prompt": "a cat"})
    write(configure_existing(interview, Catalog(), config, scratch(config)))
    assert config.stat().st_mode & 0o777 == 0o600
    config.chmod(0o400)
    with pytest.raises(UsageError, match="must not be changed"):
        changed(config, {})


@pytest.mark.parametrize(
    ("place", "value", "part"),
    [
        (("checkpoint",), [], "goal"),
        (("checkpoint", "dir"), [1], "name"),
        (("cache",), True, "goal"),
        (("data", "defaults"), 5, "goal"),
        (("data", "sets", 0, "sources", 0, "captions"), "x", "pictures"),
    ],
    ids=str,
)
def test_values_of_the_wrong_kind_are_no_obstacle_to_changing_others(
    place: tuple[str | int, ...], value: Any, part: str, config: Path
) -> None:
    document = parse(config.read_text(encoding="utf-8"), "x").value
    inside = document
    for name in place[:-1]:
        inside = inside[name]
    inside[place[-1]] = value
    config.write_text(json.dumps(document), encoding="utf-8")
    answers = {"goal": GOAL | {"card": "cpu"}, "name": {"name": "second"}, "pictures": {}}[part]
    text, _ = changed(config, answers | {"change": [part]})
    assert parse(text, "after").value != document
