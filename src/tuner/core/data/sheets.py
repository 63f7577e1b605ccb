"""Contact sheets: every bucket of a plan as pictures of its images, cut as the training sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.core.atomic import atomic_path
from tuner.core.data.images import load_pixels
from tuner.core.data.looks import fit_of, fixed_looks
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

    from tuner.core.data.plan import DataPlan, Group, PlanItem

CELL, LABEL, COLUMNS, ROWS = 192, 14, 6, 8
"""Pixels of a picture's longer side and of the line below it; pictures per page."""


def write_sheets(plan: DataPlan, folder: Path, on_progress: Callable[[int], None] | None = None) -> list[Path]:
    """One JPEG per page of each bucket, in ``folder``. Nothing that exists is written over.

    Random crops are shown at their centre, and nothing is mirrored. Raises UsageError for a folder inside a source,
    where the sheets would become training data, and for files that are in the way.
    """
    _check_folder(plan, folder)
    pages = [page for group in plan.groups for page in _pages(plan, group)]
    for name, _ in pages:
        if (folder / name).exists():
            raise UsageError(
                "a file is in the way of a contact sheet", where=str(folder / name), fix="name a new folder"
            )
    written = []
    for name, items in pages:
        sheet = _sheet(plan, items, on_progress)
        with atomic_path(folder / name) as temporary:
            sheet.save(temporary, format="JPEG", quality=88)
        written.append(folder / name)
    return written


def _check_folder(plan: DataPlan, folder: Path) -> None:
    whole = folder.absolute().resolve()
    for source in plan.sources.values():
        if whole.is_relative_to(Path(source.path).expanduser().resolve()):
            why = f"it lies in source {source.id}: the sheets would be taken for its images"
            raise UsageError("contact sheets cannot go there", where=str(folder), why=why, fix="name another folder")


def _pages(plan: DataPlan, group: Group) -> Iterator[tuple[str, list[PlanItem]]]:
    items = [plan.items[index] for index in group.items]
    tier = plan.tiers[group.tier]
    parts = [f"set{tier.set_index}", tier.name, f"bucket{group.bucket[0]}x{group.bucket[1]}"]
    if plan.sampling != "epoch":
        parts.append("".join(each if each.isalnum() else "_" for each in items[0].source))
    size = COLUMNS * ROWS
    for start in range(0, len(items), size):
        yield f"{'-'.join(parts)}-{start // size + 1}.jpg", items[start : start + size]


def _sheet(plan: DataPlan, items: Iterable[PlanItem], on_progress: Callable[[int], None] | None) -> Image.Image:
    from PIL import Image, ImageDraw

    cells = []
    for item in items:
        cells.append((_thumbnail(plan, item), _label(item)))
        if on_progress is not None:
            on_progress(1)
    columns = min(COLUMNS, len(cells))
    height = max(picture.height for picture, _ in cells) + LABEL
    sheet = Image.new("RGB", (columns * CELL, -(-len(cells) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, label) in enumerate(cells):
        left, top = number % columns * CELL, number // columns * height
        sheet.paste(picture, (left + (CELL - picture.width) // 2, top))
        draw.text((left + 2, top + height - LABEL + 1), label, fill="black")
    return sheet


def _thumbnail(plan: DataPlan, item: PlanItem) -> Image.Image:
    from PIL import Image

    look = fixed_looks(plan, item)[0]
    resize = plan.tiers[item.tier].config.resize
    pixels, _ = load_pixels(item.record, fit_of(item, look), resize=resize, crop=look.crop)
    values = ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(values)
    picture.thumbnail((CELL - 4, CELL - 4), Image.Resampling.BOX)
    return picture


def _label(item: PlanItem) -> str:
    repeats = f" x{item.repeats}" if item.repeats > 1 else ""
    name = item.record.key if len(item.record.key) <= 26 else f"...{item.record.key[-23:]}"
    # The built-in font has no other letters.
    return (name + repeats).encode("latin-1", "replace").decode("latin-1")
