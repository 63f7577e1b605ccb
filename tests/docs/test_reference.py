"""What is generated is current, and what is written by hand names what exists."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest

from tests.docs.pages import PAGES, ROOT
from tuner.core.registry import MODELS, Catalog


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = load_generator()


@pytest.mark.parametrize("name", sorted(GENERATOR.PAGES))
def test_a_reference_page_is_what_the_code_says(name: str) -> None:
    committed = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
    assert committed == GENERATOR.PAGES[name](), "run: python docs/generate.py"


def test_the_check_of_the_generator_tells_a_stale_page(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(GENERATOR, "REFERENCE", tmp_path)
    monkeypatch.setattr(GENERATOR, "PAGES", {"one.md": lambda: "text\n"})
    assert GENERATOR.main(["--check"]) == 1
    assert "one.md is out of date" in capsys.readouterr().out
    assert GENERATOR.main([]) == 0
    assert GENERATOR.main(["--check"]) == 0


ADAPTER_SECTIONS = {"anima": "Adapter file formats", "flux": "FLUX.1 and Chroma", "sd3": "SD3 and SD3.5"}


def written_formats(family: str) -> list[str]:
    catalog = Catalog()
    maps = catalog.load(catalog.entry(MODELS, family), "descriptor", str(catalog.model(family).key_maps))
    return [each.name for each in maps.formats]


@pytest.mark.parametrize("family", ADAPTER_SECTIONS)
def test_the_table_of_adapter_formats_lists_those_that_are_written(family: str) -> None:
    text = (ROOT / "docs" / "reference" / "adapter-formats.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^##? ([^\n]+)\n(.*?)(?=^##? |\Z)", text, re.M | re.S))
    assert re.findall(r"^\| `([\w-]+)`", sections[ADAPTER_SECTIONS[family]], re.M) == written_formats(family)


def test_the_choice_of_an_export_format_offers_those_that_are_written() -> None:
    how_to = (ROOT / "docs" / "how-to" / "choose-the-export-format.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\| `([\w-]+)` \|$", how_to, re.M)) == set(written_formats("anima"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http") and not target.endswith(".png"):
            assert (page.parent / target).is_file(), target
