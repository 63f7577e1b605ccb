"""``tuner plugins check`` says plainly what is wrong with each part of a descriptor."""

from __future__ import annotations

import pytest

from tests.core.registry.conftest import site as site
from tests.core.registry.toys import DESCRIPTOR, Site
from tuner.core.lifecycle.check import plugin_problems
from tuner.core.registry import MODELS, Catalog


def problems(site: Site, more: str = "", **files: str) -> str:
    """What is said about a toy whose descriptor has ``more``, and whose modules end with the given text."""
    text = DESCRIPTOR.format(name="fauve", api=(1, 0), module="toy_fauve")
    site.model("fauve", descriptor=text.replace("key_maps=", f"{more} key_maps="))
    for name, extra in files.items():
        path = site.folder / "toy_fauve" / f"{name}.py"
        path.write_text(path.read_text(encoding="utf-8") + extra, encoding="utf-8")
    catalog = Catalog()
    return "\n".join(plugin_problems(catalog, catalog.entry(MODELS, "fauve")))


def test_a_plugin_with_every_optional_part_is_in_order(site: Site) -> None:
    facts = """
from tuner.core.config.foreign import ForeignFamily
PROGRAMS = {"sd-scripts": (ForeignFamily(names=("fauve_train",)),)}
def recognise(header):
    return ("vae",) if "vae.weight" in header else ()
"""
    config = "\n    unused = ('variant',)\n"
    more = 'recognise="toy_fauve.facts:recognise", importers="toy_fauve.facts:PROGRAMS",'
    assert problems(site, more, facts=facts, config=config) == ""


@pytest.mark.parametrize(
    ("more", "facts", "expected"),
    [
        ('public="toy_fauve.facts:MAPS",', "", "public of its descriptor is not a function"),
        ('count_tokens="toy_fauve.facts:MAPS",', "", "count_tokens of its descriptor is not a function"),
        ('importers="toy_fauve.facts:MAPS",', "", "is not a table of programs"),
        ('importers="toy_fauve.facts:PROGRAMS",', "PROGRAMS = {'sd-scripts': 1}", "is not a table of programs"),
        ('recognise="toy_fauve.facts:facts",', "", "missing 1 required positional argument"),
        ('recognise="toy_fauve.facts:known",', "def known(header): return None", "its recognise returned nothing"),
        ("", "def detect(header): return 'small'", "detect of its descriptor takes a file without tensors"),
    ],
)
def test_a_wrong_part_of_the_descriptor_is_named(site: Site, more: str, facts: str, expected: str) -> None:
    assert expected in problems(site, more, facts=facts)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("    unused = ('varient',)", "names 'varient', which is no key of it\n  fix: did you mean 'variant'?"),
        ("    family: __import__('typing').Literal['fauves'] = 'fauves'", "family of Config is 'fauves'"),
        ("Config = 3", "is not a ModelConfigBase"),
    ],
)
def test_a_wrong_section_is_named(site: Site, config: str, expected: str) -> None:
    assert expected in problems(site, config=f"\n{config}\n")
