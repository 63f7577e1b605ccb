"""Data settings go defaults -> set -> source: objects by key, the rest replaced, null back to the built-in default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.core.config.samples import build, minimal, refusal


def with_data(**data: Any) -> dict[str, Any]:
    return {"data": data}


def test_objects_are_merged_by_key_and_the_nearest_level_wins() -> None:
    config = build(
        **with_data(
            defaults={"captions": {"shuffle": True, "keep_first": 1, "prefix": "d"}, "repeats": 2, "resolution": 512},
            sets=[
                {
                    "captions": {"keep_first": 2, "prefix": "s"},
                    "sources": [
                        {"id": "a", "path": "a", "captions": {"prefix": "x"}},
                        {"id": "b", "path": "b", "repeats": 5},
                    ],
                },
                {"resolution": 768, "sources": [{"id": "c", "path": "c"}]},
            ],
        )
    )
    first, second = config.data.sets
    a, b = first.sources
    assert (a.captions.shuffle, a.captions.keep_first, a.captions.prefix, a.repeats) == (True, 2, "x", 2)
    assert (b.captions.keep_first, b.captions.prefix, b.repeats) == (2, "s", 5)
    assert second.sources[0].captions.keep_first == 1
    assert (first.resolution, second.resolution) == (((512, 512),), ((768, 768),))


def test_null_goes_back_to_the_built_in_default() -> None:
    config = build(
        **with_data(
            defaults={"captions": {"separator": ";", "prefix": "p"}, "repeats": 3, "augment": {"flip": True}},
            sets=[
                {
                    "augment": None,
                    "sources": [{"id": "a", "path": "a", "repeats": None, "captions": {"separator": None}}],
                }
            ],
        )
    )
    source = config.data.sets[0].sources[0]
    assert (source.captions.separator, source.captions.prefix, source.repeats) == (",", "p", 1)
    assert source.augment.flip is False


def test_lists_are_replaced() -> None:
    config = build(
        **with_data(
            defaults={"captions": {"replace": [{"find": "a"}, {"find": "b"}]}},
            sets=[{"sources": [{"id": "a", "path": "a", "captions": {"replace": [{"find": "c"}]}}]}],
        )
    )
    assert [each.find for each in config.data.sets[0].sources[0].captions.replace] == ["c"]


def test_a_set_takes_the_batch_size_of_the_training_and_gives_each_resolution_its_own() -> None:
    source = {"id": "a", "path": "a"}
    config = build(train={"batch_size": 3}, **with_data(sets=[{"sources": [source]}]))
    assert config.data.sets[0].tiers() == (((1024, 1024), 3),)
    config = build(**with_data(sets=[{"resolution": [1024, [832, 1216]], "batch_size": [2, 4], "sources": [source]}]))
    assert config.data.sets[0].tiers() == (((1024, 1024), 2), ((832, 1216), 4))
    config = build(**with_data(sets=[{"resolution": [1024, 512], "batch_size": 2, "sources": [source]}]))
    assert config.data.sets[0].tiers() == (((1024, 1024), 2), ((512, 512), 2))


def test_an_inherited_mistake_is_reported_once_where_it_was_written(tmp_path: Path) -> None:
    sources = [{"id": "a", "path": "a"}, {"id": "b", "path": "b"}]
    data = {"defaults": {"augment": {"flip": "yes"}}, "sets": [{"captions": {"from": "fixed"}, "sources": sources}]}
    message = refusal(minimal() | {"data": data}, tmp_path)
    assert message.count("expected true or false, got 'yes'") == 1
    assert message.endswith("at: DIR/c.json:1, data.defaults.augment.flip")
    del data["defaults"]
    message = refusal(minimal() | {"data": data}, tmp_path)
    assert message.count("needs captions.fixed") == 1
    assert "data.sets[0].captions.from" in message


def test_a_default_that_every_source_overrides_is_checked_too(tmp_path: Path) -> None:
    data = {"defaults": {"repeats": 0}, "sets": [{"sources": [{"id": "a", "path": "a", "repeats": 1}]}]}
    assert "data.defaults.repeats: expected a number at least 1, got 0" in refusal(minimal() | {"data": data}, tmp_path)


@pytest.mark.parametrize("defaults", [5, "x", [{"repeats": 2}]], ids=str)
def test_defaults_that_are_no_object_are_refused(defaults: Any, tmp_path: Path) -> None:
    data = {"defaults": defaults, "sets": [{"sources": [{"id": "a", "path": "a"}]}]}
    assert "data.defaults: expected an object" in refusal(minimal() | {"data": data}, tmp_path)


@pytest.mark.parametrize(
    ("given", "told"),
    [({"repeats": 0}, "repeats: expected a number at least 1"), ({"captions": 5}, "captions: expected an object")],
    ids=str,
)
def test_what_a_set_gives_is_checked_though_every_source_overrides_it(
    given: dict[str, Any], told: str, tmp_path: Path
) -> None:
    source = {"id": "a", "path": "a", "repeats": 1, "captions": {"prefix": "a"}}
    assert f"data.sets[0].{told}" in refusal(minimal() | {"data": {"sets": [given | {"sources": [source]}]}}, tmp_path)


def test_a_source_has_no_geometry(tmp_path: Path) -> None:
    data = {"sets": [{"sources": [{"id": "a", "path": "a", "resolution": 512}]}]}
    assert "unknown key 'resolution' in data.sets[0].sources[0]" in refusal(minimal() | {"data": data}, tmp_path)


def test_other_numbers_of_batch_sizes_are_refused(tmp_path: Path) -> None:
    data = {"sets": [{"resolution": [512, 768], "batch_size": [1, 2, 3], "sources": [{"id": "a", "path": "a"}]}]}
    assert "3 batch sizes for 2 resolutions" in refusal(minimal() | {"data": data}, tmp_path)
