"""The code on the page about model plugins is that of the example plugin, which a test installs and trains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "how-to" / "write-a-model-plugin.md"
EXAMPLE = ROOT / "examples" / "plugins" / "tuner-mosaic"
BLOCKS = re.findall(r'```python title="([^"]+)"\n(.*?)```', PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_page_shows_code() -> None:
    assert len(BLOCKS) > 4


@pytest.mark.parametrize(("file", "text"), BLOCKS, ids=[f"{file} {number}" for number, (file, _) in enumerate(BLOCKS)])
def test_a_shown_part_stands_in_the_example_as_it_is(file: str, text: str) -> None:
    assert text in (EXAMPLE / file).read_text(encoding="utf-8")
