"""The documentation as tests read it: pages, and the fenced blocks inside them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tests.fixtures.tiny_anima import make_tiny_anima

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w+)(?P<rest>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block. ``title`` is the file name that the page gives it, or empty."""

    page: str
    line: int
    language: str
    title: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        title = re.search(r'title="([^"]+)"', match["rest"])
        found.append(
            Block(
                page=path.relative_to(ROOT).as_posix(),
                line=text[: match.start()].count("\n") + 1,
                language=match["language"],
                title=title[1] if title else "",
                text=textwrap.dedent(match["text"]),
            )
        )
    return found


def blocks(language: str) -> list[Block]:
    """Every block of a language in the README and the documentation."""
    return [block for path in PAGES for block in blocks_of(path) if block.language == language]


def make_tutorial_folder(folder: Path, size: int, captions: Sequence[str]) -> None:
    """Tiny files under the names that the pages use, and a square picture for each caption."""
    make_tiny_anima(folder)
    (folder / "qwen3").rename(folder / "Qwen3-0.6B")
    (folder / "t5").rename(folder / "Qwen3-0.6B" / "t5_tokenizer")
    (folder / "vae.safetensors").rename(folder / "qwen_image_vae.safetensors")
    images = folder / "images" / "hero"
    images.mkdir(parents=True)
    for number, caption in enumerate(captions):
        Image.effect_noise((size, size), 60 + 40 * number).convert("RGB").save(images / f"{number:03}.png")
        (images / f"{number:03}.txt").write_text(caption, encoding="utf-8")
