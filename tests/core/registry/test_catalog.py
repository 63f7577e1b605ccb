"""Installed plugins are known from metadata; whatever is wrong with one of them stays its own problem."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.core.registry.toys import Site
from tuner.core.errors import UsageError
from tuner.core.registry import EXTENSIONS, MODELS, Catalog
from tuner.core.types import API_VERSION


def refusal(catalog: Catalog, name: str) -> str:
    with pytest.raises(UsageError) as caught:
        catalog.model(name)
    return str(caught.value)


def names(catalog: Catalog) -> list[str]:
    return [entry.name for entry in catalog.entries(MODELS) if not entry.builtin]


def test_listing_imports_nothing(site: Site) -> None:
    site.model("cubist", descriptor="raise RuntimeError('imported')")
    site.extension("probe", "raise RuntimeError('imported')")
    catalog = Catalog()
    assert names(catalog) == ["cubist"]
    assert [entry.name for entry in catalog.entries(EXTENSIONS)] == ["probe"]
    entry = catalog.entry(MODELS, "cubist")
    assert (entry.dist, entry.version, entry.summary) == ("tuner-cubist", "0.3", "The plugin tuner-cubist")
    assert catalog.warnings() == []
    assert not any(name.startswith("toy_") for name in sys.modules)


def test_a_descriptor_is_imported_without_its_hooks(site: Site) -> None:
    site.model("cubist", hooks="raise RuntimeError('imported')")
    assert Catalog().model("cubist").name == "cubist"
    assert "toy_cubist.hooks" not in sys.modules


def test_a_missing_plugin_is_told_with_the_nearest_name_and_what_is_installed(site: Site) -> None:
    site.model("cubist")
    message = refusal(Catalog(path=[str(site.folder)]), "cubits")
    assert message == "there is no model plugin 'cubits'\n  why: installed: cubist\n  fix: did you mean 'cubist'?"


def test_two_plugins_of_one_name_are_both_refused_and_both_named(site: Site) -> None:
    site.model("cubist", dist="tuner-cubist")
    site.model("cubist", dist="other-cubist", version="2.0")
    site.model("fauvist")
    catalog = Catalog(path=[str(site.folder)])
    message = refusal(catalog, "cubist")
    assert "the name is also taken by" in message
    assert {"tuner-cubist", "other-cubist"} == {problem.dist for problem in catalog.problems}
    assert names(catalog) == ["fauvist"]


def test_a_built_in_name_cannot_be_taken(site: Site) -> None:
    builtin = next(entry.name for entry in Catalog().entries(MODELS) if entry.builtin)
    site.model(builtin, dist="squatter", module="toy_squatter")
    catalog = Catalog()
    assert catalog.entry(MODELS, builtin).dist == "tuner"
    assert [str(problem) for problem in catalog.problems] == [
        f"plugin '{builtin}' (squatter 0.3) is not usable: the name is reserved by tuner"
    ]


@pytest.mark.parametrize(
    ("descriptor", "expected"),
    [
        ("import toy_gone", "ModuleNotFoundError: No module named 'toy_gone' (while reading its descriptor)"),
        ("raise SystemExit(3)", "SystemExit: 3 (while reading its descriptor)"),
        ("plugin = 3", "toy_cubist.plugin:plugin is not a ModelPlugin"),
        ("x = 3", "AttributeError: module 'toy_cubist.plugin' has no attribute 'plugin'"),
        ("def broken(:", "SyntaxError: invalid syntax"),
    ],
)
def test_a_broken_descriptor_is_told_by_name_version_and_reason(descriptor: str, expected: str, site: Site) -> None:
    site.model("cubist", descriptor=descriptor)
    message = refusal(Catalog(), "cubist")
    assert message.startswith("plugin 'cubist' (tuner-cubist 0.3) is not usable: ")
    assert expected in message


def test_a_broken_plugin_does_not_stop_another(site: Site) -> None:
    site.model("cubist", descriptor="raise RuntimeError('boom')")
    site.model("fauvist")
    catalog = Catalog()
    refusal(catalog, "cubist")
    assert catalog.model("fauvist").name == "fauvist"


def test_unreadable_metadata_of_one_distribution_is_its_own_problem(site: Site) -> None:
    site.model("cubist")
    info = site.folder / "broken-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: broken\nVersion: 1\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[tuner.models]\nno value here\n", encoding="utf-8")
    catalog = Catalog()
    assert names(catalog) == ["cubist"]
    assert [(problem.name, problem.dist) for problem in catalog.problems] == [("?", "broken")]


@pytest.mark.parametrize(
    ("api", "fix"),
    [
        ((API_VERSION[0] + 1, 0), "pip install --upgrade tuner"),
        ((API_VERSION[0], API_VERSION[1] + 1), "pip install --upgrade tuner"),
        ((API_VERSION[0] - 1, 9), "pip install --upgrade tuner-cubist"),
    ],
)
def test_a_plugin_for_another_api_is_told_the_versions_and_what_to_upgrade(
    api: tuple[int, int], fix: str, site: Site
) -> None:
    site.model("cubist", api=api)
    message = refusal(Catalog(), "cubist")
    assert f"it is made for hook API {api[0]}.{api[1]}, this tuner has {API_VERSION[0]}.{API_VERSION[1]}" in message
    assert fix in message


@pytest.mark.parametrize(("requires", "usable"), [("tuner>=0", True), ("tuner<0.0.1", False), ("tuner-other<1", True)])
def test_requirements_on_this_program_are_read_from_metadata(requires: str, usable: bool, site: Site) -> None:
    site.model("cubist", requires=requires)
    catalog = Catalog()
    assert (names(catalog) == ["cubist"]) is usable
    if not usable:
        assert "is not usable: needs tuner<0.0.1, this is" in refusal(catalog, "cubist")


def test_a_descriptor_must_have_the_name_it_is_installed_under(site: Site) -> None:
    site.model("cubist", descriptor="from toy_fauvist.plugin import plugin")
    site.model("fauvist")
    assert "it calls itself 'fauvist' and is installed as 'cubist'" in refusal(Catalog(), "cubist")


def test_an_import_failure_is_remembered_until_it_is_gone_or_another_version_is_there(site: Site) -> None:
    site.model("cubist", descriptor="raise RuntimeError('boom')")
    refusal(Catalog(), "cubist")
    remembered = Catalog().warnings()
    assert [problem.error for problem in remembered] == ["RuntimeError: boom (while reading its descriptor)"]
    del sys.modules["toy_cubist"]
    plugin = site.folder / "toy_cubist" / "plugin.py"
    good = (
        "from tuner import ModelPlugin\nplugin = ModelPlugin(name='cubist', api=(1, 0), config='', files='', detect='',"
    )
    plugin.write_text(f"{good} facts='', hooks='')", encoding="utf-8")
    assert Catalog().model("cubist").name == "cubist"
    assert Catalog().warnings() == []


def test_the_traceback_is_shown_on_request(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.model("cubist", descriptor="raise RuntimeError('boom')")
    assert "TUNER_DEBUG_PLUGINS=1 shows the traceback" in refusal(Catalog(), "cubist")
    monkeypatch.setenv("TUNER_DEBUG_PLUGINS", "1")
    assert "Traceback (most recent call last)" in refusal(Catalog(), "cubist")


def test_a_cache_folder_that_cannot_be_written_loses_only_the_warning(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TUNER_CACHE_DIR", str(tmp_path / "file" / "below"))
    site.model("cubist", descriptor="raise RuntimeError('boom')")
    assert "RuntimeError: boom" in refusal(Catalog(), "cubist")
    assert Catalog().warnings() == []
