"""What the wizard sees in a folder of pictures, and what it makes of it: training finds nothing to stop at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.fixtures.runs import make_pictures
from tuner.core.errors import UsageError
from tuner.core.wizard.answers import FileAsker
from tuner.core.wizard.pictures import ChosenPictures, choose_pictures
from tuner.core.wizard.questions import Interview


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "pictures"
    inside.mkdir()
    make_pictures(inside)
    return inside


def chosen(folder: Path, now: dict[str, Any] | None = None, **answers: Any) -> tuple[ChosenPictures, str]:
    """What is chosen, and everything that was told."""
    told: list[str] = []
    asker = FileAsker({"pictures": str(folder), **answers}, "answers.json", told.append)
    return choose_pictures(Interview(asker), folder.parent / "scratch", now=now), "\n".join(told)


def test_damage_behind_a_sound_header_is_seen_and_left_out(folder: Path) -> None:
    Image.effect_noise((64, 64), 90).convert("RGB").save(folder / "half.jpg", quality=95)
    whole = (folder / "half.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(whole[: len(whole) // 2])
    Image.effect_noise((64, 64), 90).convert("RGB").save(folder / "half.bmp")
    (folder / "half.bmp").write_bytes((folder / "half.bmp").read_bytes()[:900])
    found, told = chosen(folder, caption="-")
    assert found.data == {"on_corrupt": "skip", "on_missing": "skip"}
    assert "odd: half.jpg: the file is damaged" in told
    assert "odd: half.bmp: the file is damaged" in told
    assert found.pictures.images == 4


def test_a_caption_that_cannot_be_read_has_to_be_mended_because_nothing_can_leave_it_out(folder: Path) -> None:
    (folder / "1.txt").write_bytes("Käse".encode("latin-1"))
    (folder / "2.txt").unlink()
    (folder / "2.txt").mkdir()
    with pytest.raises(UsageError) as error:
        chosen(folder)
    assert f"{folder / '1.txt'}: the caption file is not UTF-8" in str(error.value)
    assert f"{folder / '2.txt'}: the caption file cannot be read" in str(error.value)


def test_empty_captions_lack_the_word_too(folder: Path) -> None:
    for path in folder.glob("*.txt"):
        path.write_text("", encoding="utf-8")
    found, _ = chosen(folder, trigger="mila")
    assert found.source["captions"] == {"allow_empty": True, "prefix": "mila,"}


def test_pictures_far_smaller_than_the_others_are_named(folder: Path) -> None:
    Image.new("RGB", (3, 2)).save(folder / "dot.png")
    assert "note: much smaller than the others: dot.png (3 x 2)" in chosen(folder, caption="a dot")[1]


def test_long_lists_end_with_how_many_more_there_are(folder: Path) -> None:
    for number in range(8):
        (folder / f"broken{number}.png").write_bytes(b"x")
    assert "odd: 3 more" in chosen(folder)[1]


def test_a_folder_without_any_usable_picture_says_what_is_wrong_with_them(folder: Path) -> None:
    for path in folder.glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UsageError, match="no picture can be used") as error:
        chosen(folder)
    assert "0.png: the file is empty" in str(error.value)


def test_many_pictures_are_looked_at_with_progress_where_somebody_waits(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tuner.core.wizard.pictures._MANY", 3)
    assert "looking at" not in chosen(folder)[1] + capsys.readouterr().out
    asker = FileAsker({"pictures": str(folder)}, "answers.json", lambda text: None, patient=True)
    choose_pictures(Interview(asker), folder.parent / "watched")
    assert "looking at the pictures: 4/4 images" in capsys.readouterr().out


def test_a_path_that_the_file_system_refuses_is_a_wrong_answer(folder: Path) -> None:
    with pytest.raises(UsageError, match="name too long"):
        chosen(folder / ("x" * 5000))


# --- a source that exists ---------------------------------------------------------------------------------------------


def test_subfolders_stay_taken(folder: Path) -> None:
    (folder / "more").mkdir()
    Image.new("RGB", (64, 64), (1, 2, 3)).save(folder / "more" / "a.png")
    now = {"id": "a", "path": str(folder), "recursive": True, "captions": {"fallback": "a dog"}}
    found, _ = chosen(folder, now)
    assert found.source == {"path": str(folder), "recursive": True, "captions": {"fallback": "a dog"}}


@pytest.mark.parametrize(
    "captions",
    [{"from": "filename"}, {"from": "fixed", "fixed": "a dog"}, {"extension": ".tags"}],
    ids=lambda captions: str(captions),
)
def test_captions_from_elsewhere_are_captions(captions: dict[str, Any], folder: Path) -> None:
    for path in folder.glob("*.txt"):
        path.rename(path.with_suffix(".tags"))
    found, told = chosen(folder, {"id": "a", "path": str(folder), "captions": captions})
    assert "4 pictures, 128 x 72 to 96 x 96; 4 with a caption" in told
    assert found.source["captions"] == captions


def test_captions_of_the_wrong_shape_are_asked_for_anew(folder: Path) -> None:
    assert chosen(folder, {"id": "a", "captions": "text"}, trigger="-")[0].source == {"path": str(folder)}
    with pytest.raises(UsageError, match="settings of the captions are wrong"):
        chosen(folder, {"id": "a", "captions": {"from": "nowhere"}})


def test_what_is_inherited_is_not_written_again_and_can_be_taken_back(folder: Path) -> None:
    effect = {"path": str(folder), "captions": {"prefix": "mila,", "extension": ".txt"}}
    for trigger, expected in (("mila", None), ("-", {"prefix": None}), ("zoe", {"prefix": "zoe,"})):
        asker = FileAsker({"pictures": str(folder), "trigger": trigger}, "answers.json", lambda text: None)
        now = {"id": "a", "path": str(folder)}
        found = choose_pictures(Interview(asker), folder.parent / "scratch", now=now, effect=effect)
        assert found.source.get("captions") == expected
