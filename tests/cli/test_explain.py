"""``tuner explain``: keys in words, conflicts as the checks have them, and the origin of every value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Project
from tuner.cli.main import COMMANDS, main
from tuner.core.config import RunConfig
from tuner.core.config.describe import choices
from tuner.core.explain.costs import COSTS
from tuner.core.explain.find import Keys
from tuner.core.explain.keys import READERS
from tuner.core.registry import Catalog


@pytest.fixture(autouse=True)
def in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def told(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["explain", *words]) == code
    streams = capsys.readouterr()
    return " ".join((streams.out + streams.err).split())


def key(capsys: pytest.CaptureFixture[str], word: str) -> dict[str, Any]:
    assert main(["explain", word, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    return found


def values(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, dict[str, Any]]:
    assert main(["explain", *words, "--json"]) == code
    return {each["key"]: each for each in json.loads(capsys.readouterr().out)["values"]}


def test_a_key_is_explained_with_type_default_commands_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "network.rank")
    for expected in (
        "Rank; from_file takes ranks",
        'type: integer at least 0 or "from_file"',
        "default: 16",
        "acts on: tuner train, tuner plan, tuner verify; has to stay when a run is resumed",
    ):
        assert expected in text


def test_the_conflicts_of_a_key_are_what_the_checks_say(capsys: pytest.CaptureFixture[str]) -> None:
    found = key(capsys, "memory.offload_activations")
    problems = {(tuple(each["values"]), each["problem"].split(":")[0]) for each in found["conflicts"]}
    both = ('"sync"', '"async"')
    assert problems == {(both, "needs memory.checkpointing 'block'"), (both, "does not work with memory.swap_blocks")}
    assert "data.sets[].crop.style" in key(capsys, "cache.latents")["needed_by"]
    (only,) = key(capsys, "checkpoint.keep_last")["conflicts"]
    assert only["problem"] == "has no effect without checkpoint.every"


def test_the_last_part_of_a_key_is_enough_and_may_mean_several(capsys: pytest.CaptureFixture[str]) -> None:
    assert key(capsys, "swap_blocks")["path"] == "memory.swap_blocks"
    assert main(["explain", "seed", "--json"]) == 0
    paths = [each["path"] for each in json.loads(capsys.readouterr().out)]
    assert paths == ["data.sets[].sources[].captions.variants.seed", "train.seed", "sample.seed", "validate.seed"]


@pytest.mark.parametrize(
    "word", ["repeats", "data.defaults.repeats", "data.sets[1].repeats", "data.sets.0.sources.2.repeats"]
)
def test_what_sources_inherit_is_explained_where_it_acts(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = key(capsys, word)
    assert found["path"] == "data.sets[].sources[].repeats"
    assert found["inherited"] == ["data.sets[].repeats", "data.defaults.repeats"]


def test_a_section_lists_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    inner = {each["key"]: each for each in key(capsys, "memory")["inner"]}
    assert inner["memory.swap_blocks"]["default"] == "0"
    assert key(capsys, "data")["inner"][-1]["key"] == "data.on_corrupt"
    inner = {each["key"]: each for each in key(capsys, "data.defaults")["inner"]}
    assert inner["data.defaults.repeats"]["meaning"] == (
        "For all of data.sets[].sources[]: How often each image comes in an epoch."
    )


def test_planned_and_inapplicable_keys_say_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert "is planned and not built yet; it is for: training on several GPUs" in told(capsys, "distributed")
    assert "does not apply here: it belongs to the text encoders" in told(capsys, "model.clip_skip")
    assert '"list" is planned' in told(capsys, "noise.timesteps")


def test_a_misspelt_key_is_met_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean network.rank" in told(capsys, "netwrok.rnak", code=2)
    assert "did you mean train.steps" in told(capsys, "TRAIN.STEPS", code=2)
    assert "explain what?" in told(capsys, code=2)


def test_models_tell_their_own_defaults_and_keys(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    found = key(capsys, "noise.timesteps")
    assert {each["model"] for each in found["models"]} >= {"flux", "sd3"}
    assert {each["default"] for each in found["models"] if each["model"] == "flux"} == {
        '"flux_shift" (dev), "sigmoid" (schnell, chroma)'
    }
    own = key(capsys, "model.sharpness")
    assert (own["only"], own["meaning"]) == (["cubist"], "A key of its own.")


def test_every_section_names_the_commands_that_read_it() -> None:
    assert set(READERS) == {field.alias or name for name, field in RunConfig.model_fields.items()}
    assert {name.split()[0] for names in READERS.values() for name in names} <= set(COMMANDS)


def test_every_value_has_its_origin(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNER__TRAIN__ACCUMULATE", "2")
    config = project.config(data={"defaults": {"repeats": 3}}, network={"rank": 8}, checkpoint={"every": 2})
    found = values(capsys, config, "--set", "train.seed=4")
    origins = {name: each["origin"] for name, each in found.items()}
    assert origins["network.rank"] == f"{config}:1"
    assert origins["data.sets[0].sources[0].repeats"] == f"{config}:1, data.defaults.repeats"
    assert origins["train.seed"] == "--set train.seed=4"
    assert origins["train.accumulate"] == "environment variable TUNER__TRAIN__ACCUMULATE"
    assert (origins["noise.timesteps"], found["noise.timesteps"]["value"]) == ("cubist small", "sigmoid")
    assert (origins["network.alpha"], found["network.alpha"]["value"]) == ("from network.rank", 8)
    assert origins["model.sharpness"] == "default of cubist"
    assert (origins["cache.dir"], origins["data.sets[0].sources[0].weight"]) == ("default", "default")
    assert (origins["checkpoint.every.steps"], origins["checkpoint.every.epochs"]) == (f"{config}:1", "default")
    assert origins["data.sets[0].batch_size"] == "from train.batch_size"
    assert "data.sets[0].weight" not in found


def test_what_was_measured_of_a_setting_is_told_as_the_documentation_has_it(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    text = told(capsys, "memory.checkpointing")
    assert 'measured cost: "block": a step takes 1.30 times as long as with everything kept; 0.46 instead of' in text
    assert "nothing has been measured on a GPU yet" in text
    assert "measured" not in told(capsys, "train.seed")
    config = project.config(memory={"checkpointing": "block", "swap_blocks": 0})
    found = values(capsys, config)
    assert [len(found[name]["measured"]) for name in ("memory.checkpointing", "memory.swap_blocks")] == [1, 0]
    assert "measured cost" in told(capsys, config, "memory")

    page = (Path(__file__).parents[2] / "docs/explanation/performance.md").read_text(encoding="utf-8")
    for path, costs in COSTS.items():
        for cost in costs:
            assert f" {cost.step:.2f}" in page
            assert cost.kept is None or all(f"{each:.3g}" in page for each in cost.kept)
            key = Keys(Catalog()).find(path)[0].key
            assert key is not None
            listed = choices(key.section, key.name)
            assert cost.value is None or cost.value in listed or not listed


def test_a_preset_is_an_origin_and_the_file_wins_over_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = {
        "model": {"family": "flux", "path": "away.safetensors"},
        "data": {"sets": [{"sources": [{"id": "a", "path": "images"}]}]},
        "network": {"rank": 8, "alpha": 4},
        "optimizer": {"lr": 1e-4}, "train": {"steps": 4}, "checkpoint": {"dir": "out"},
    }  # fmt: skip
    (tmp_path / "c.json").write_text(json.dumps(document), encoding="utf-8")
    found = values(capsys, "c.json", "--preset", "flux/lora")
    assert found["memory.checkpointing"]["origin"] == "preset flux/lora"
    assert found["network.rank"]["origin"] == "c.json:1"
    assert (found["network.alpha"]["default"], found["network.alpha"]["changed"]) == ("8.0", True)
    assert "is not here: defaults are those of the published dev" in told(capsys, "c.json", "train")


def test_only_what_was_changed_can_be_shown(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    config = project.config(network={"rank": 16, "alpha": 8})
    found = values(capsys, config, "--changed")
    assert "network.alpha" in found
    assert not {"network.rank", "log.level", "noise.timesteps"} & set(found)
    text = told(capsys, config, "network", "--changed")
    assert "network.alpha = 8.0" in text
    assert "train.steps" not in text


def test_problems_stand_beside_their_values(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    found = values(capsys, project.config(log={"dir": "x"}), code=2)
    assert "log.dir: has no effect" in found["log.dir"]["problems"][0]
    text = told(capsys, project.config(train={"steps": 0}), code=2)
    assert "train.steps: expected a number at least 1, got 0" in text
    assert "defaults are shown once the problems are solved" in text
