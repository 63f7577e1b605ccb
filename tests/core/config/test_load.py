"""Settings come from file, environment and --set, in that order; relative paths start at the file's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.core.config.samples import build, minimal, refusal
from tuner.core.config import build_config, load_config
from tuner.core.config.document import split_path
from tuner.core.config.load import split_set
from tuner.core.errors import UsageError


def write(folder: Path, document: object, name: str = "c.json") -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document), encoding="utf-8")
    return file


def test_set_wins_over_the_environment_and_the_environment_over_the_file_and_the_file_over_a_preset(
    tmp_path: Path,
) -> None:
    file = write(tmp_path, minimal(network={"rank": 2, "dropout": 0.2}))
    preset = {"network": {"rank": 1, "dropout": 0.1, "alpha": 1}}
    env = {"TUNER__NETWORK__RANK": "3", "TUNER__TRAIN__SEED": "5", "PATH": "x", "TUNER_DEBUG_PLUGINS": "1"}
    raw = load_config(file, env=env, sets=["network.rank=4"], preset=preset)
    assert raw["network"] == {"rank": 4, "dropout": 0.2, "alpha": 1}
    assert raw["train"] == {"steps": 100, "seed": 5}


def test_set_takes_json_values_and_falls_back_to_text() -> None:
    assert split_set('a.b={"c": [1, true]}') == (("a", "b"), {"c": [1, True]})
    assert split_set("a.b=cosine") == (("a", "b"), "cosine")
    assert split_set("a.b=") == (("a", "b"), "")
    assert split_set("a=null") == (("a",), None)


def test_list_entries_are_addressed_by_brackets_or_dots() -> None:
    assert split_path("data.sets[0].sources[12].path") == ("data", "sets", 0, "sources", 12, "path")
    assert split_path("data.sets.0.path") == ("data", "sets", 0, "path")
    for wrong in ("", ".a", "a.", "a..b", "a[x]", "[0]", "a[0"):
        assert split_path(wrong) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimizer.lr", "cannot read --set 'optimizer.lr'"),
        ("=3", "cannot read --set '=3'"),
        ("data.sets[3].resolution=512", "there is no entry 3 in data.sets, which has 1"),
        ("optimizer.lr.x=1", "optimizer.lr is 0.0001, not an object"),
        ("train[0]=1", "train is not a list"),
    ],
)
def test_a_set_that_leads_nowhere_is_refused(text: str, expected: str, tmp_path: Path) -> None:
    assert expected in refusal(minimal(), tmp_path, sets=[text])


def test_an_override_that_fails_the_schema_is_blamed_on_the_override(tmp_path: Path) -> None:
    message = refusal(minimal(), tmp_path, sets=["train.steps=many"])
    assert message == "train.steps: expected a whole number, got 'many'\n  at: --set train.steps=many, train.steps"


def test_relative_paths_start_at_the_folder_of_the_file(tmp_path: Path) -> None:
    document = minimal(
        model={"vae": {"path": "vae.safetensors"}, "download_dir": "hub"},
        network={"init_from": "../old.safetensors"},
        sample={"prompts": "prompts.txt"},
    )
    document["data"]["sets"][0]["sources"][0]["mask"] = {"path": "masks"}
    config = build_config(load_config(write(tmp_path / "run", document), env={}))
    home = tmp_path / "run"
    assert config.model.path == str(home / "toy.safetensors")
    assert config.model.vae is not None
    assert config.model.vae.path == str(home / "vae.safetensors")
    assert config.model.download_dir == str(home / "hub")
    source = config.data.sets[0].sources[0]
    assert (source.path, source.mask.path) == (str(home / "images"), str(home / "masks"))  # type: ignore[union-attr]
    assert (config.cache.dir, config.checkpoint.dir) == (str(home / "cache"), str(home / "out" / "hero"))
    assert (config.network.init_from, config.sample.prompts) == (
        str(home / ".." / "old.safetensors"),
        str(home / "prompts.txt"),
    )
    assert config.checkpoint.resume == "none"


def test_relative_paths_of_overrides_start_at_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "run", minimal())
    raw = load_config(file, sets=["checkpoint.dir=here"], env={"TUNER__CACHE__DIR": "there"})
    assert (raw["checkpoint"]["dir"], raw["cache"]["dir"]) == (str(tmp_path / "here"), str(tmp_path / "there"))


def test_a_dict_starts_its_paths_at_base_dir(tmp_path: Path) -> None:
    assert load_config(minimal(), env={}, base_dir=tmp_path)["checkpoint"]["dir"] == str(tmp_path / "out" / "hero")


def test_hub_ids_are_left_alone_and_files_win_over_them(tmp_path: Path) -> None:
    for name in ("owner/name", "owner/name/sub/file.safetensors"):
        assert load_config(minimal(model={"path": name}), env={}, base_dir=tmp_path)["model"]["path"] == name
    for name in ("./owner/name", "folder/file.safetensors", "owner"):
        path = load_config(minimal(model={"path": name}), env={}, base_dir=tmp_path)["model"]["path"]
        assert Path(path).is_absolute()
    (tmp_path / "owner" / "name").mkdir(parents=True)
    found = load_config(minimal(model={"path": "owner/name"}), env={}, base_dir=tmp_path)["model"]["path"]
    assert found == str(tmp_path / "owner" / "name")


def test_the_model_of_the_command_line_fills_in_or_must_agree(tmp_path: Path) -> None:
    document = minimal()
    del document["model"]["family"]
    assert load_config(document, model="toy", env={})["model"]["family"] == "toy"
    assert "--model says 'other', the configuration says 'toy'" in refusal(minimal(), tmp_path, model="other")


def test_data_may_be_included_from_another_file_with_paths_of_its_own(tmp_path: Path) -> None:
    inner = {"sets": [{"sources": [{"id": "a", "path": "pictures"}]}], "prefetch": 5, "workers": {"load": 1}}
    write(tmp_path / "shared", inner, "data.json")
    document = minimal() | {"data": {"include": "shared/data.json", "prefetch": 1, "workers": {"scan": 3}}}
    config = build_config(load_config(write(tmp_path, document), env={}))
    assert config.data.sets[0].sources[0].path == str(tmp_path / "shared" / "pictures")
    assert (config.data.prefetch, config.data.workers.load, config.data.workers.scan) == (1, 1, 3)
    write(tmp_path / "shared", {"data": inner}, "data.json")
    assert build_config(load_config(write(tmp_path, document), env={})) == config


@pytest.mark.parametrize("text", ["data.include=other.json", 'data={"include": "other.json"}'])
def test_an_include_from_outside_a_file_is_refused_not_passed_over(text: str, tmp_path: Path) -> None:
    assert "data.include has an effect in a file only" in refusal(minimal(), tmp_path, sets=[text])
    with pytest.raises(UsageError, match="has an effect in a file only"):
        load_config(minimal(), env={"TUNER__DATA__INCLUDE": "other.json"})


@pytest.mark.parametrize(
    ("name", "content", "program"),
    [
        ("sets.toml", "[[datasets]]\nresolution = 512\n", "sd-scripts"),
        ("sets.json", '{"general": {}, "datasets": [{"resolution": 512}]}', "sd-scripts"),
        ("sets.json", '[{"id": "a", "type": "local", "instance_data_dir": "a"}]', "simpletuner"),
    ],
)
def test_data_sets_of_other_programs_are_recognised_and_the_command_is_named(
    name: str, content: str, program: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    command = f"tuner config import {program} DIR/{name}"
    assert command in refusal(minimal() | {"data": {"include": name}}, tmp_path)
    with pytest.raises(UsageError, match="this file is for another program"):
        load_config(tmp_path / name, env={})


def test_problems_of_an_included_file_name_that_file(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text('{\n "sets": [],\n "prefech": 1}', encoding="utf-8")
    message = refusal(minimal() | {"data": {"include": "data.json"}}, tmp_path)
    assert "unknown key 'prefech' in data\n  at: DIR/data.json:3, data.prefech" in message
    assert "data.sets: expected at least 1 entries, got a list of 0\n  at: DIR/data.json:2, data.sets" in message


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("missing.json", None, "the configuration file does not exist"),
        (".", None, "the configuration must be a file, this is a folder"),
        ("list.json", b"[]", "the configuration must be a JSON object"),
        ("latin.json", b'{"a": "\xe9"}', "the configuration is not UTF-8 text"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name: str, content: bytes | None, expected: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=expected) as caught:
        load_config(tmp_path / name, env={})
    assert str(tmp_path) in str(caught.value)


def test_the_smallest_configuration_is_complete() -> None:
    config = build()
    assert (config.network.rank, config.train.batch_size, config.schedule.name) == (16, 1, "constant_with_warmup")
