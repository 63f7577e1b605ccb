"""The thorough look decodes every file and tells everything about all sources at once."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from tests.core.data.pictures import pattern, picture
from tuner.core.config import DataConfig
from tuner.core.data.inspect import DataReport, broken_files, inspect_data


def inspect(tmp_path: Path, *sources: dict, decode: bool = True) -> DataReport:
    entries = [{"id": entry["path"], **entry, "path": str(tmp_path / entry["path"])} for entry in sources]
    data = DataConfig.model_validate({"sets": [{"sources": entries}], "workers": {"scan": 2}})
    return inspect_data(data, tmp_path / "cache", decode=decode)


def test_sizes_captions_and_copies_are_told_for_every_source(tmp_path):
    picture(tmp_path / "one" / "a.png", 20, 10, caption="a")
    picture(tmp_path / "one" / "b.png", 40, 30, seed=1)
    picture(tmp_path / "two" / "copy.png", 20, 10, caption="a")
    empty = {"captions": {"on_missing": "empty"}}
    report = inspect(tmp_path, {"path": "one", **empty}, {"path": "two"})
    assert not report.problems
    one, two = report.sources
    assert (one.images, one.smallest, one.largest, one.without_caption) == (2, (20, 10), (40, 30), ("b.png",))
    assert two.images == 1
    assert report.duplicates == (("one/a.png", "two/copy.png"),)
    assert report.leaks == ()
    assert report.warnings() == [
        "the same image several times: one/a.png, two/copy.png",
        "one: 1 of 2 images have an empty caption",
    ]


def test_captions_of_which_only_the_first_line_is_used_are_told(tmp_path):
    picture(tmp_path / "one" / "a.png", caption="first\n\nsecond")
    picture(tmp_path / "one" / "b.png", caption="only\n", seed=1)
    [warning] = inspect(tmp_path, {"path": "one"}).warnings()
    assert warning.startswith("one: only the first line is used of 1 captions that have more")
    assert inspect(tmp_path, {"path": "one", "captions": {"lines": "random"}}).warnings() == []


def test_one_file_in_two_sources_is_no_copy_but_may_leak_into_validation(tmp_path):
    picture(tmp_path / "one" / "a.png", caption="a")
    twice = inspect(tmp_path, {"path": "one"}, {"path": "one", "id": "again"})
    assert twice.duplicates == ()
    held_out = inspect(tmp_path, {"path": "one"}, {"path": "one", "id": "held", "role": "validation"})
    assert held_out.leaks == ("held/a.png is also one/a.png",)
    assert held_out.warnings() == ["held out and trained on: held/a.png is also one/a.png"]


def test_damage_that_only_decoding_shows_is_found(tmp_path):
    path = tmp_path / "one" / "a.webp"
    picture(path, 300, 200, caption="a")
    picture(tmp_path / "one" / "ok.png", caption="b")
    data = bytearray(path.read_bytes())
    data[100:] = bytes(len(data) - 100)
    path.write_bytes(bytes(data))
    assert not inspect(tmp_path, {"path": "one"}, decode=False).problems
    problems = inspect(tmp_path, {"path": "one"}).problems
    assert [problem.where for problem in problems] == [str(path)]


def test_problems_of_all_sources_come_together(tmp_path):
    picture(tmp_path / "one" / "a.png")
    (tmp_path / "two").mkdir()
    Image.fromarray(pattern(8, 8)).save(tmp_path / "two" / "b.png")
    report = inspect(tmp_path, {"path": "one"}, {"path": "two"}, {"path": "three"})
    assert [problem.what for problem in report.problems] == [
        "an image has no caption",
        "an image has no caption",
        f"the folder {tmp_path / 'three'} does not exist",
    ]
    assert [source.images for source in report.sources] == [0, 0, 0]


def test_decoding_tells_how_far_it_is(tmp_path):
    for number in range(3):
        picture(tmp_path / "one" / f"{number}.png", caption="a")
    paths = sorted((tmp_path / "one").glob("*.png"))
    told: list[tuple[int, int]] = []
    assert broken_files(paths, 2, lambda done, total: told.append((done, total))) == []
    assert told == [(1, 3)] * 3
