"""``report.html`` shows a run from its files alone, loads nothing, escapes everything, and names no folder."""

from __future__ import annotations

import base64
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from tuner.core.track.charts import MAX_BINS, Line, line_chart, smoothed
from tuner.core.track.events import EventLog
from tuner.core.track.page import flattened, hide_folders
from tuner.core.track.report import write_report

VOID = {"meta", "img", "br"}


class Checker(HTMLParser):
    """Collects tags and text, and fails on a tag that is not closed where it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data + "\n"


def parsed(folder: Path) -> Checker:
    checker = Checker()
    checker.feed(write_report(folder).read_text(encoding="utf-8"))
    assert checker.open == []
    return checker


def sheet(path: Path, size: tuple[int, int] = (60, 40)) -> None:
    path.parent.mkdir(parents=True)
    Image.new("RGB", size, "orange").save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run with everything in it, some of it hostile."""
    run = tmp_path / "out"
    run.mkdir()
    with EventLog(run / "events.jsonl") as events:
        events.emit("run_start", run="hero<script>", versions={"tuner": "0.1.0"},
                    plan={"total_steps": 6, "sources": [{"source": "a&b", "images": 3}],
                          "buckets": [{"tier": "512", "bucket": "512x448", "images": 3}]})  # fmt: skip
        for step in range(1, 7):
            events.emit("step", step=step, epoch=0, loss=0.5 / step, loss_avg=0.4, lr={"down": 1e-4, "up": 1e-4},
                        grad_norm=1.0, seconds=0.5, images_per_second=4.0)  # fmt: skip
            if step % 3 == 0:
                sheet(run / f"samples/step-{step:06d}/sheet.png")
                events.emit("sample", step=step, sheet=f"samples/step-{step:06d}/sheet.png", images=[])
                by_sigma = [{"sigma": 0.2, "delta": -0.1}, {"sigma": 0.8, "delta": -0.2}]
                events.emit("validation", step=step, n=4, base=0.5, adapted=0.4, delta=-0.1, low=-0.15, high=-0.05,
                            shuffled_delta=-0.02, by_sigma=by_sigma)  # fmt: skip
        events.emit("warning", message="cannot read /home/someone/pictures/x.png, skipped")
        events.emit("export", path="hero.safetensors", keys=12, matched=12)
        events.emit("run_end", steps=6, seconds=3.0, reason="finished")
    (run / "data.json").write_text(json.dumps({
        "images": [{"source": "a&b", "image": "<i>.png", "part": "train", "used": 7, "size": [640, 480],
                    "bucket": [512, 448], "cropped_percent": 2.5}],
        "left_out": [{"source": "a&b", "image": "small.png", "reason": "too small"}],
    }))  # fmt: skip
    (run / "config.resolved.json").write_text(json.dumps({
        "model": {"path": "/home/someone/models/base.safetensors"}, "cache": {"dir": "C:\\Users\\someone\\cache"},
        "data": {"sets": [{"sources": [{"path": "~/pictures"}]}]}, "sample": {"prompts": ["<b>bold</b>", "b"]},
    }))  # fmt: skip
    return run


def test_the_report_shows_the_run(folder: Path) -> None:
    text = parsed(folder).text
    for expected in (
        "hero<script>",
        "finished",
        "of 6 planned",
        "12 of 12 keys match",
        "better than the base model",
        "smoothed over about 10 steps",
        "before clipping",
        "down, up",
        "with another image's caption",
        "a&b",
        "512x448",
        "<i>.png",
        "too small",
        "<b>bold</b>, b",
        "0.1.0",
    ):
        assert expected in text


def test_nothing_is_loaded_from_elsewhere_and_no_script_runs(folder: Path) -> None:
    checker = parsed(folder)
    assert {"script", "link", "iframe", "object", "style"} & {tag for tag, _ in checker.tags} == {"style"}
    for _, attributes in checker.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("href", "srcset", "action")]
        assert attributes.get("src", "data:image/").startswith("data:image/")
    page = (folder / "report.html").read_text()
    assert not re.search(r"https?://|url\(|@import", page)
    assert "default-src &#x27;none&#x27;" in page or "default-src 'none'" in page


def test_no_folder_of_the_machine_is_named(folder: Path) -> None:
    parsed(folder)
    page = (folder / "report.html").read_text()
    assert "someone" not in page
    assert str(folder.parent) not in page
    assert "…/base.safetensors" in page
    assert "…/x.png, skipped" in page


def test_contact_sheets_are_embedded_and_large_ones_shrunk(folder: Path) -> None:
    sheet(folder / "samples/big/sheet.png", (3000, 30))
    with EventLog(folder / "events.jsonl") as events:
        events.emit("sample", step=6, sheet="samples/big/sheet.png", images=[])
    pictures = [attributes["src"] for tag, attributes in parsed(folder).tags if tag == "img"]
    sizes = []
    for source in pictures:
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
            sizes.append(image.size)
    assert sizes == [(1400, 14), (60, 40), (60, 40)]


def test_many_contact_sheets_are_thinned_out_evenly(folder: Path) -> None:
    with EventLog(folder / "events.jsonl") as events:
        for step in range(10, 40):
            events.emit("sample", step=step, sheet="samples/step-000003/sheet.png", images=[])
    pictures = [attributes["alt"] for tag, attributes in parsed(folder).tags if tag == "img"]
    assert len(pictures) == 8
    assert pictures[0] == "Contact sheet at step 39"
    assert pictures[-1] == "Contact sheet at step 3"


def test_a_sheet_outside_the_run_folder_is_not_embedded(folder: Path) -> None:
    Image.new("RGB", (4, 4)).save(folder.parent / "secret.png")
    with EventLog(folder / "events.jsonl") as events:
        events.emit("sample", step=6, sheet="../secret.png", images=[])
        events.emit("sample", step=6, sheet=str(folder.parent / "secret.png"), images=[])
        events.emit("sample", step=6, sheet="samples/gone.png", images=[])
    assert len([tag for tag, _ in parsed(folder).tags if tag == "img"]) == 2


@pytest.mark.parametrize("name", ["events.jsonl", "data.json", "config.resolved.json", "samples/step-000006/sheet.png"])
def test_a_missing_or_broken_file_leaves_its_part_out(folder: Path, name: str) -> None:
    if name != "samples/step-000006/sheet.png":
        (folder / name).write_text("{ torn")
        assert "Training" in parsed(folder).text or name == "events.jsonl"
    (folder / name).unlink()
    assert parsed(folder).text


def test_an_empty_folder_gives_a_page_too(tmp_path: Path) -> None:
    assert parsed(tmp_path).text


def test_a_resumed_run_is_not_called_by_its_old_end(folder: Path) -> None:
    with EventLog(folder / "events.jsonl") as events:
        events.emit("run_start", run="hero", plan={"total_steps": 8})
        events.emit("resume", step=4)
    text = parsed(folder).text
    assert "no end recorded · resumed 1 time" in text
    assert "· finished" not in text


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.01, 0.2, "worse than the base model"), (-0.1, 0.2, "The interval contains 0"), (-0.2, -0.1, "better than")],
)
def test_the_verdict_follows_the_interval(tmp_path: Path, low: float, high: float, verdict: str) -> None:
    with EventLog(tmp_path / "events.jsonl") as events:
        events.emit("validation", step=1, images=9, base=0.5, adapted=0.5, delta=0.5 * (low + high), low=low, high=high)
    assert verdict in parsed(tmp_path).text


def test_one_held_out_image_gets_no_verdict(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl") as events:
        events.emit("validation", step=1, images=1, base=0.5, adapted=0.4, delta=-0.1, low=-0.1, high=-0.1)
    text = parsed(tmp_path).text
    assert "One held-out image says nothing" in text
    assert "better than" not in text


# --- charts -----------------------------------------------------------------------------------------------------------


def svg_of(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(re.search(r"<svg.*</svg>", chart, re.DOTALL).group())


def test_a_chart_is_well_formed_and_inside_its_frame() -> None:
    chart = line_chart("a < b", [Line(name="x & y", points=[(0, 1.0), (5, -3.0), (9, 250.0)], dots=True)], zero=True)
    root = svg_of(chart)
    numbers = [float(value) for line in root.iter("polyline") for value in re.findall(r"[\d.]+", line.get("points"))]
    assert all(0 <= x <= 720 for x in numbers[::2])
    assert all(0 <= y <= 260 for y in numbers[1::2])
    assert len(list(root.iter("circle"))) == 3


def test_a_constant_line_one_point_and_missing_values_are_drawn() -> None:
    assert "polyline" in line_chart("t", [Line(name="a", points=[(1, 2.0), (2, 2.0)])])
    assert "circle" in line_chart("t", [Line(name="a", points=[(1, 2.0)])])
    assert line_chart("t", [Line(name="a", points=[(1, float("nan"))])]) == ""
    assert line_chart("t", []) == ""


def test_single_outliers_do_not_hide_the_rest() -> None:
    points = [(step, 1.0 + step % 2) for step in range(200)] + [(200, 1e6)]
    root = svg_of(line_chart("t", [Line(name="a", points=points)], clip=0.01))
    texts = [text.text for text in root.iter("text") if text.get("text-anchor") == "end"]
    labels = [float(text.replace(",", "")) for text in texts if text != "step"]
    assert max(labels) <= 2


def test_long_lines_are_thinned_and_keep_their_spikes() -> None:
    points = [(step, 5.0 if step == 77_777 else 1.0) for step in range(100_000)]
    line = next(svg_of(line_chart("t", [Line(name="a", points=points)])).iter("polyline"))
    drawn = line.get("points").split()
    assert len(drawn) <= 2 * MAX_BINS
    assert len({point.partition(",")[2] for point in drawn}) == 2


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value() -> None:
    assert [y for _, y in smoothed([(x, 3.0) for x in range(5)], 4)] == pytest.approx([3.0] * 5)
    assert smoothed([(0, 2.0), (1, 4.0)], 3) == [(0, 2.0), (1, pytest.approx(10 / 3))]


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/a b/model.safetensors", "…/model.safetensors"),
        ("C:\\Users\\me\\x.bin", "…/x.bin"),
        ("~/pictures", "…/pictures"),
        ("cannot read /home/me/x.png: gone", "cannot read …/x.png: gone"),
        ("samples/step-1/sheet.png", "samples/step-1/sheet.png"),
        ("owner/model", "owner/model"),
        ("a / b / c, 5 images/s", "a / b / c, 5 images/s"),
        ("https://example.org/a/b", "https://example.org/a/b"),
    ],
)
def test_absolute_paths_lose_their_folders_and_nothing_else_changes(text: str, shown: str) -> None:
    assert hide_folders(text) == shown


def test_settings_are_listed_by_their_dotted_names() -> None:
    document = {"a": {"b": 1, "c": {}}, "d": [{"e": None}], "f": [1, "x"]}
    assert flattened(document) == [("a.b", 1), ("a.c", "{}"), ("d[0].e", None), ("f", "1, x")]
