"""The index finds every image with its size, caption and mask, trusts unchanged files, and names everything wrong."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from pathlib import Path

import pytest
from PIL import Image

from tests.core.data.pictures import OLD_NS, age, data_config, pattern, picture
from tuner.core.data.index import scan_source
from tuner.core.data.probe import probe_all
from tuner.core.data.records import SourceIndex


def scan(folder: Path, cache: Path | None = None, *, verify: str = "stat", **source) -> SourceIndex:
    data = data_config(folder, **source)
    return scan_source(data.sets[0].sources[0], cache or folder.parent / "cache", data=data, verify=verify)


def told(index: SourceIndex) -> str:
    return "\n".join(str(problem) for problem in index.problems)


def keys(index: SourceIndex) -> list[str]:
    return [record.key for record in index.records]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    return path


def test_images_are_sorted_with_size_hash_and_caption(folder):
    picture(folder / "b.png", 20, 10, caption="two")
    picture(folder / "a.jpg", 30, 40, caption="one")
    picture(folder / "sub" / "c.webp", caption="three")
    (folder / "notes.md").write_text("no picture")
    (folder / ".hidden.png").write_bytes(b"junk")
    flat = scan(folder)
    assert told(flat) == ""
    assert [(r.key, r.width, r.height, r.captions_raw) for r in flat.records] == [
        ("a.jpg", 30, 40, "one"),
        ("b.png", 20, 10, "two"),
    ]
    assert len({record.digest for record in flat.records}) == 2
    assert len(flat.records[0].digest) == 32
    assert keys(scan(folder, recursive=True)) == ["a.jpg", "b.png", "sub/c.webp"]


def test_names_in_any_script_and_equal_stems_are_kept_apart(folder):
    picture(folder / "写真 é.png", caption="unicode")
    picture(folder / "same.png", caption="shared")
    picture(folder / "same.jpg", 30, 30)
    index = scan(folder)
    assert told(index) == ""
    assert keys(index) == ["same.jpg", "same.png", "写真 é.png"]
    assert [record.captions_raw for record in index.records] == ["shared", "shared", "unicode"]


def test_a_link_loop_is_walked_once_and_a_dead_link_is_named(folder):
    picture(folder / "sub" / "a.png", caption="a")
    (folder / "sub" / "again").symlink_to(folder, target_is_directory=True)
    assert keys(scan(folder, recursive=True)) == ["sub/a.png"]
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    assert "link to nothing" in told(scan(folder, recursive=True))
    skipping = scan(folder, recursive=True, on_missing="skip")
    assert told(skipping) == ""
    assert [(skip.key, skip.reason) for skip in skipping.skipped] == [("gone.png", "the file is a link to nothing")]


def test_unchanged_files_are_trusted_and_changed_ones_read_again(folder):
    for name in "abc":
        picture(folder / f"{name}.png", seed=ord(name), caption=name)
    assert scan(folder).hashed == 3
    second = scan(folder)
    assert second.hashed == 0
    picture(folder / "b.png", 50, 60)
    os.utime(folder / "b.png", ns=(OLD_NS + 1, OLD_NS + 1))
    third = scan(folder)
    assert third.hashed == 1
    assert third.records[1].size == (50, 60)
    assert third.records[0] == second.records[0]


def test_full_verification_reads_files_whose_size_and_time_did_not_change(folder):
    picture(folder / "a.bmp", seed=1, caption="a")
    before = scan(folder)
    picture(folder / "a.bmp", seed=2)
    assert scan(folder).records == before.records
    full = scan(folder, verify="full")
    assert full.records[0].digest != before.records[0].digest
    assert scan(folder).records == full.records


def test_a_file_that_changed_just_now_is_not_trusted_yet(folder):
    picture(folder / "a.bmp", seed=1, caption="a")
    os.utime(folder / "a.bmp")
    first = scan(folder)
    picture(folder / "a.bmp", seed=2)
    os.utime(folder / "a.bmp")
    assert scan(folder).records[0].digest != first.records[0].digest


def test_a_removed_image_leaves_the_index(folder):
    picture(folder / "a.png", caption="a")
    picture(folder / "b.png", caption="b")
    scan(folder)
    (folder / "b.png").unlink()
    assert keys(scan(folder)) == ["a.png"]
    stored = next((folder.parent / "cache" / "index").glob("*.sqlite"))
    with sqlite3.connect(stored) as db:
        rows = db.execute("SELECT key FROM files").fetchall()
    db.close()
    assert rows == [("image:a.png",)]


@pytest.mark.parametrize("damage", [b"this is no database, " * 400, b""])
def test_a_damaged_index_is_made_anew(folder, damage, caplog):
    picture(folder / "a.png", caption="a")
    before = scan(folder)
    stored = next((folder.parent / "cache" / "index").glob("*.sqlite"))
    stored.write_bytes(damage)
    again = scan(folder)
    assert again.records == before.records
    assert again.hashed == 1
    assert ("made anew" in caplog.text) == bool(damage)
    assert scan(folder).hashed == 0


def test_an_index_of_another_format_is_made_anew(folder):
    picture(folder / "a.png", caption="a")
    scan(folder)
    stored = next((folder.parent / "cache" / "index").glob("*.sqlite"))
    db = sqlite3.connect(stored)
    db.execute("PRAGMA user_version = 99")
    db.commit()
    db.close()
    assert scan(folder).hashed == 1
    assert scan(folder).hashed == 0


def test_several_scans_at_once_agree(folder):
    for number in range(12):
        picture(folder / f"{number:02d}.png", seed=number, caption=str(number))
    found: list[SourceIndex] = []
    threads = [threading.Thread(target=lambda: found.append(scan(folder))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(index.records == found[0].records and not index.problems for index in found)
    assert scan(folder).hashed == 0


def test_nothing_is_written_beside_the_images(folder):
    picture(folder / "a.png", caption="a")
    before = sorted(folder.iterdir())
    folder.chmod(0o555)
    try:
        assert told(scan(folder)) == ""
    finally:
        folder.chmod(0o755)
    assert sorted(folder.iterdir()) == before


def test_a_cache_folder_that_cannot_be_written_costs_only_time(folder, caplog):
    picture(folder / "a.png", caption="a")
    blocked = folder.parent / "file"
    blocked.write_text("no folder")
    assert keys(scan(folder, blocked)) == ["a.png"]
    assert "cannot be written" in caplog.text


def test_a_folder_that_is_missing_or_empty_is_told_with_the_reason(folder):
    assert "does not exist" in told(scan(folder / "typo"))
    file = folder / "file.txt"
    file.write_text("")
    assert "is not a folder" in told(scan(file))
    assert "has no images" in told(scan(folder))
    picture(folder / "sub" / "a.png", caption="a")
    assert "subfolders are read only with recursive" in told(scan(folder))


def test_all_problems_of_a_source_come_at_once(folder):
    picture(folder / "good.png", caption="good")
    picture(folder / "no_caption.png")
    picture(folder / "empty.png", caption=" \n")
    (folder / "zero.png").write_bytes(b"")
    (folder / "junk.jpg").write_bytes(b"junk" * 50)
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 40)
    text = told(scan(folder))
    assert "s/zero.png\n  why: the file is empty" in text
    assert "s/junk.jpg\n  why: the content is no image format that can be read" in text
    assert "phone.heic\n  why: .heic files cannot be read" in text
    assert "an image has no caption\n  at: s/no_caption.png\n  why: there is no no_caption.txt beside it" in text
    assert "the caption file is empty\n  at: " in text
    assert len(scan(folder).problems) == 5


def test_broken_images_can_be_skipped_and_are_listed(folder):
    picture(folder / "good.png", caption="good")
    (folder / "zero.png").write_bytes(b"")
    index = scan(folder, on_corrupt="skip")
    assert told(index) == ""
    assert keys(index) == ["good.png"]
    assert [(skip.key, skip.reason) for skip in index.skipped] == [("zero.png", "the file is empty")]
    (folder / "good.png").unlink()
    assert "every image of the source was skipped" in told(scan(folder, on_corrupt="skip"))


def test_damage_behind_a_sound_header_is_skipped_even_when_the_index_knew_the_file(folder):
    picture(folder / "good.png", caption="good")
    path = picture(folder / "hollow.webp", 300, 200, caption="hollow")
    data = path.read_bytes()
    path.write_bytes(data[:100] + bytes(len(data) - 100))
    age(path)
    assert scan(folder).hashed == 2
    assert keys(scan(folder)) == ["good.png", "hollow.webp"]
    index = scan(folder, on_corrupt="skip")
    assert keys(index) == ["good.png"]
    [skip] = index.skipped
    assert skip.key == "hollow.webp" and "damaged" in skip.reason
    assert scan(folder, on_corrupt="skip").hashed == 1, "the good one is decoded once, the damaged one each time"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_a_truncated_image_is_found_without_keeping_pixels(folder, kind):
    path = picture(folder / f"cut.{kind.lower()}", 200, 150, caption="cut")
    assert told(scan(folder)) == ""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    index = scan(folder)
    assert "s/cut." in told(index)
    assert not index.records


def test_bytes_after_a_jpeg_do_not_make_it_broken(folder):
    path = picture(folder / "motion.jpg", 64, 48, caption="a")
    path.write_bytes(path.read_bytes() + b"\xff\xda extra bytes of a phone's video \xff\xda")
    assert told(scan(folder)) == ""


def test_animated_images_and_float_pixels_are_refused_by_name(folder):
    frames = [Image.fromarray(pattern(16, 16, seed)) for seed in (0, 100)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "moving.png", save_all=True, append_images=frames[1:])
    Image.new("F", (16, 16), 0.5).save(folder / "float.tiff")
    text = told(scan(folder, captions={"on_missing": "empty"}))
    assert "s/moving.gif\n  why: it is animated or has several pages (2 frames)" in text
    assert "s/moving.png\n  why: it is animated or has several pages (2 frames)" in text
    assert "s/float.tiff\n  why: pixel mode F has no fixed range" in text


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_sizes_have_the_orientation_applied(folder, extension, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(folder / f"turned.{extension}", 24, 16, caption="x", exif=exif)
    record = scan(folder).records[0]
    assert record.size == ((16, 24) if orientation == 6 else (24, 16))


def test_captions_come_from_the_named_extension_or_the_fallback(folder):
    picture(folder / "a.b.png")
    (folder / "a.b.caption").write_text("\ufefffrom file\r\nsecond", encoding="utf-8")
    picture(folder / "none.png")
    index = scan(folder, captions={"extension": "caption", "fallback": "sks"})
    assert [record.captions_raw for record in index.records] == ["from file\nsecond", "sks"]


def test_missing_captions_follow_the_setting(folder):
    picture(folder / "a.png", caption="a")
    picture(folder / "b.png")
    assert "captions.on_missing" in told(scan(folder))
    empty = scan(folder, captions={"on_missing": "empty"})
    assert [record.captions_raw for record in empty.records] == ["a", ""]
    skipping = scan(folder, captions={"on_missing": "skip"})
    assert keys(skipping) == ["a.png"]
    assert [(skip.key, skip.reason) for skip in skipping.skipped] == [("b.png", "no caption")]


def test_empty_caption_files_are_taken_when_allowed(folder):
    picture(folder / "a.png", caption="")
    assert "the caption file is empty" in told(scan(folder))
    assert scan(folder, captions={"allow_empty": True}).records[0].captions_raw == ""


def test_a_caption_that_is_not_utf8_is_named(folder):
    picture(folder / "a.png")
    (folder / "a.txt").write_bytes("é".encode("latin-1"))
    assert "the caption file is not UTF-8" in told(scan(folder))


def test_captions_of_the_import_rule_are_loaded_as_there(folder):
    picture(folder / "a.png", caption="  first \n\n second ")
    rule = {"rule": "sd_scripts"}
    assert scan(folder, captions=rule).records[0].captions_raw == "first"
    assert scan(folder, captions={**rule, "lines": "random"}).records[0].captions_raw == "first\nsecond"


def test_captions_from_the_file_name_or_one_text(folder):
    picture(folder / "a_red_fox.png")
    assert scan(folder, captions={"from": "filename"}).records[0].captions_raw == "a red fox"
    assert scan(folder, captions={"from": "fixed", "fixed": ""}).records[0].captions_raw == ""


def test_face_coordinates_in_the_name_are_read_and_may_miss_in_the_caption_name(folder):
    picture(folder / "my_girl_10_8_6_4.png")
    (folder / "my_girl.txt").write_text("face")
    record = scan(folder).records[0]
    assert record.face == (10, 8, 6, 4)
    assert record.captions_raw == "face"
    picture(folder / "plain.png", caption="x")
    assert scan(folder).records[1].face is None


def table(folder: Path, content: object, name: str = "captions.json", **captions) -> SourceIndex:
    path = folder.parent / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return scan(folder, recursive=True, captions={"from": "metadata", "metadata": str(path), **captions})


def test_a_killed_scan_goes_on_from_what_it_stored(folder, monkeypatch):
    for number in range(5):
        picture(folder / f"{number}.png", seed=number, caption="x")
    read: list[str] = []

    def probe_or_die(paths, workers, *, decode, on_progress):
        if len(read) >= 4:
            raise KeyboardInterrupt
        read.extend(path.name for path in paths)
        return probe_all(paths, workers, decode=decode, on_progress=on_progress)

    monkeypatch.setattr("tuner.core.data.index.CHUNK", 2)
    monkeypatch.setattr("tuner.core.data.index.probe_all", probe_or_die)
    with pytest.raises(KeyboardInterrupt):
        scan(folder)
    read.clear()
    index = scan(folder)
    assert (read, index.hashed, len(index.records)) == (["4.png"], 1, 5)


def test_captions_from_a_table_match_whole_keys_only(folder):
    picture(folder / "img1.png")
    picture(folder / "img10.png")
    picture(folder / "sub" / "img1.png")
    content = {
        "img1": {"caption": "one"},
        "img10.png": {"caption": "ten", "tags": "t1, t2"},
        str(folder / "sub" / "img1.png"): {"tags": ["x", "y"]},
    }
    index = table(folder, content)
    assert told(index) == ""
    assert [record.captions_raw for record in index.records] == ["one", "ten, t1, t2", "x, y"]
    assert "s/img10.png" in told(table(folder, {"img1": "one", "sub/img1": "sub"}))


def test_tags_of_a_table_go_to_every_line_that_may_be_drawn(folder):
    picture(folder / "a.png")
    content = {"a": {"caption": "l1\nl2", "tags": "t"}}
    assert table(folder, content, lines="random").records[0].captions_raw == "l1, t\nl2, t"
    assert table(folder, content, lines="join").records[0].captions_raw == "l1\nl2, t"
    assert table(folder, content, lines="random", rule="sd_scripts").records[0].captions_raw == "l1,t\nl2,t"


def test_an_empty_tags_column_means_no_tags(folder):
    picture(folder / "a.png")
    path = folder.parent / "captions.json"
    path.write_text(json.dumps({"a": {"caption": "c", "tags": "t"}}), encoding="utf-8")
    index = scan(folder, captions={"from": "metadata", "metadata": {"path": str(path), "tags_column": ""}})
    assert [record.captions_raw for record in index.records] == ["c"]


def test_a_json_line_may_hold_separators_that_are_no_line_breaks(folder):
    picture(folder / "a.png")
    text = "one\u2028two\x85three"
    rows = json.dumps({"image_path": "a.png", "caption": text}, ensure_ascii=False)
    assert table(folder, rows, "captions.jsonl").records[0].captions_raw == text


def test_captions_from_json_lines(folder):
    picture(folder / "a.png")
    rows = '{"image_path": "a.png", "caption": "A"}\n\n'
    assert table(folder, rows, "captions.jsonl").records[0].captions_raw == "A"
    broken = told(table(folder, rows + "{", "captions.jsonl"))
    assert "line 3" in broken
    assert 'entry 1 names no image: expected a text under "image_path"' in told(table(folder, [{"file": "a"}]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": {"caption": 3}}, '"caption" is not a text'),
        ({"a": {"text": "x"}}, 'the entry has no "caption" or "tags"'),
        ({"a": 5}, "an entry is a text or an object"),
        ("[1]", "entry 1 names no image"),
        ("3", "expected a JSON object"),
        ("{", "does not have the right form"),
        ([{"image_path": "a", "caption": "x"}, {"image_path": "./a", "caption": "y"}], "two entries for one image"),
    ],
)
def test_a_table_that_cannot_be_used_is_told(folder, content, message):
    picture(folder / "a.png")
    assert message in told(table(folder, content))


def test_a_table_may_list_images_that_are_not_there_only_when_they_may_be_skipped(folder):
    picture(folder / "a.png")
    path = folder.parent / "captions.json"
    path.write_text(json.dumps({"a": "A", "gone": "G"}))
    captions = {"from": "metadata", "metadata": str(path)}
    assert "there is no such image" in told(scan(folder, captions=captions))
    skipping = scan(folder, captions=captions, on_missing="skip")
    assert told(skipping) == ""
    assert [skip.key for skip in skipping.skipped] == ["gone"]
    missing = told(scan(folder, captions={"from": "metadata", "metadata": str(path.with_name("no.json"))}))
    assert "the metadata file cannot be read" in missing


def test_masks_are_matched_by_stem_and_hashed(folder):
    picture(folder / "a.png", caption="a")
    mask = folder / "masks"
    picture(mask / "a.jpg", 48, 32)
    index = scan(folder, recursive=True, mask={"path": str(mask)})
    assert told(index) == ""
    assert keys(index) == ["a.png"]
    assert index.records[0].mask_path == mask / "a.jpg"
    assert index.records[0].mask_digest
    assert scan(folder, mask={"path": str(mask)}).hashed == 0
    picture(mask / "a.jpg", 48, 32, seed=3)
    age(mask / "a.jpg")
    changed = scan(folder, mask={"path": str(mask)}, verify="full").records[0]
    assert changed.mask_digest != index.records[0].mask_digest
    assert changed.digest == index.records[0].digest


def test_masks_that_are_missing_doubled_or_of_another_shape_are_told(folder):
    for name in ("a", "b", "c"):
        picture(folder / f"{name}.png", caption=name)
    mask = folder.parent / "masks"
    assert "the mask folder" in told(scan(folder, mask={"path": str(mask)}))
    picture(mask / "b.png")
    picture(mask / "b.jpg")
    picture(mask / "c.png", 50, 50)
    text = told(scan(folder, mask={"path": str(mask)}))
    assert f"s/a.png\n  why: no mask in {mask}" in text
    assert "an image has several masks\n  at: s/b.png" in text
    assert "a mask of 50x50 for an image of 24x16" in text


def test_opaque_images_with_an_alpha_mask_are_noted(folder):
    picture(folder / "a.png", caption="a")
    Image.new("RGBA", (8, 8)).save(folder / "b.png")
    (folder / "b.txt").write_text("b")
    index = scan(folder, mask="alpha")
    assert [record.alpha for record in index.records] == [False, True]
    assert index.notes == ("s: no transparency, so a mask of ones: a.png",)
