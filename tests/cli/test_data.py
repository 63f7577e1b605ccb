"""``tuner data inspect``: what is odd about pictures and captions is told, and nothing of the user's is changed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tests.cli.conftest import Project
from tuner.cli.main import main


@pytest.fixture(autouse=True)
def in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def inspect(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    assert main(["data", "inspect", *words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def blocks(seed: int, size: tuple[int, int] = (320, 320)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.NEAREST)


@pytest.fixture
def images(project: Project) -> Path:
    """Sharp pictures, a blurred copy, a copy in another format, a copy of the file, and odd ones."""
    folder = project.folder / "images"
    for number in range(3):
        blocks(number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"hero, smile, number {number}", encoding="utf-8")
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    blocks(1).save(folder / "again.jpg", quality=85)
    blocks(7, (320, 64)).filter(ImageFilter.GaussianBlur(12)).save(folder / "blur.png")
    Image.new("RGB", (32, 32), "red").save(folder / "tiny.png")
    Image.new("CMYK", (64, 64), "red").save(folder / "print.jpg")
    Image.new("RGBA", (64, 64), (9, 9, 9, 20)).save(folder / "glass.png")
    for name in ("copy", "again", "blur", "tiny", "print", "glass"):
        (folder / f"{name}.txt").write_text(f"hero, {name}", encoding="utf-8")
    return folder


def named(found: dict[str, Any], kind: str) -> list[str]:
    return [each["image"] for each in found["remarks"].get(kind, [])]


def test_odd_pictures_are_listed_by_kind(project: Project, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect(capsys, project.config())
    assert named(found, "small") == ["a/tiny.png"]
    assert found["remarks"]["small"][0]["detail"] == "32x32 for 64x64, 2.00 times"
    assert named(found, "blurred") == ["a/blur.png"]
    assert named(found, "mode") == ["a/print.jpg"]
    assert named(found, "transparent") == ["a/glass.png"]
    assert set(named(found, "flat")) == {"a/tiny.png", "a/print.jpg", "a/glass.png"}
    assert named(found, "stretched") == ["a/blur.png"]


def test_the_same_file_and_the_same_picture_are_told_apart(
    project: Project, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = inspect(capsys, project.config())
    assert found["same_files"] == [["a/0.png", "a/copy.png"]]
    assert found["alike"] == [["a/1.png", "a/again.jpg"]]


def test_captions_are_counted(project: Project, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (report,) = inspect(capsys, project.config())["captions"]
    assert report["tags"][:2] == [["hero", 9], ["smile", 3]]
    assert (report["shared"], report["longest"], report["texts"]) == (["hero"], [21, "2.png"], 9)
    assert main(["data", "inspect", project.config()]) == 0
    out = capsys.readouterr().out
    assert "most common of 11: hero 9, smile 3" in out
    assert "no problems found" in out


def test_broken_files_and_missing_captions_are_problems(
    project: Project, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (images / "2.png").read_bytes()
    (images / "2.png").write_bytes(whole[: len(whole) // 2])
    (images / "1.txt").unlink()
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(images / "film.gif", save_all=True, append_images=frames[1:])
    (images / "film.txt").write_text("hero", encoding="utf-8")
    found = inspect(capsys, project.config(), code=2)
    text = json.dumps(found["problems"])
    for expected in ("2.png", "a/1.png", "film.gif", "animated or has several pages"):
        assert expected in text
    assert found["plan"] is None
    assert main(["data", "inspect", project.config()]) == 2
    assert "buckets and contact sheets come once these problems are solved" in capsys.readouterr().err


def test_every_bucket_gets_contact_sheets_and_nothing_is_written_over(
    project: Project, images: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = project.config(data={"defaults": {"repeats": 2}})
    found = inspect(capsys, config, "--sheet", "sheets")
    buckets = {row["bucket"] for row in found["plan"]["buckets"]}
    names = {Path(path).name for path in found["sheets"]}
    assert names == {f"set0-64x64-bucket{bucket}-1.jpg" for bucket in buckets}
    with Image.open(found["sheets"][0]) as sheet:
        assert sheet.width % 192 == 0
    assert main(["data", "inspect", config, "--sheet", "sheets"]) == 2
    assert "a file is in the way of a contact sheet" in capsys.readouterr().err
    assert main(["data", "inspect", config, "--sheet", str(images / "sheets")]) == 2
    assert "the sheets would be taken for its images" in capsys.readouterr().err


def test_the_users_files_stay_as_they_are(project: Project, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def state() -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in images.iterdir()}

    before = state()
    inspect(capsys, project.config(), "--sheet", "sheets")
    assert state() == before


def test_long_lists_are_cut_short_unless_all_is_asked_for(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    folder = project.folder / "images"
    for number in range(12):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(folder / f"more{number}.png")
        (folder / f"more{number}.txt").write_text("a square", encoding="utf-8")
    assert main(["data", "inspect", project.config()]) == 0
    out = capsys.readouterr().out
    assert "15 pictures: almost one colour" in out
    assert "and 7 more: --all" in out
    assert main(["data", "inspect", project.config(), "--all"]) == 0
    assert "--all" not in capsys.readouterr().out
