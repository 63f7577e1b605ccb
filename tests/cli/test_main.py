"""The front of the command line: quick, clear about wrong use, and untouched by broken plugins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Project
from tests.core.registry.toys import Site
from tuner.cli.main import COMMANDS, main


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tuner", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | (env or {}),
    )


@pytest.mark.parametrize("arguments", [["--help"], ["plugins", "list"], ["train", "--help"], ["--version"], ["trian"]])
def test_light_commands_import_neither_torch_nor_pydantic_nor_rich(arguments: list[str]) -> None:
    code = f"""
import sys
from tuner.cli.main import main
try:
    main({arguments!r})
except SystemExit:
    pass
heavy = [name for name in ("torch", "pydantic", "rich", "transformers", "numpy", "PIL") if name in sys.modules]
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["train", "cache", "verify"])
def test_a_misspelt_key_is_told_before_torch_is_imported(command: str, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"model": {"family": "anima"}, "train": {"stepz": 4}}', encoding="utf-8")
    code = f"""
import sys
from tuner.cli.main import main
code = main([{command!r}, {str(config)!r}])
sys.exit("imported torch" if "torch" in sys.modules else code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "did you mean 'steps'?" in done.stderr


def test_help_lists_every_command_and_model() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    for name in COMMANDS:
        assert f"  {name}" in done.stdout
    assert "models: " in done.stdout


def test_a_command_works_with_nobody_to_write_to(monkeypatch: pytest.MonkeyPatch) -> None:
    for closed, arguments, code in (("stdout", ["--version"], 0), ("stderr", ["trian"], 2)):
        with monkeypatch.context() as patch:
            patch.setattr(sys, closed, None)
            assert main(arguments) == code
            getattr(sys, closed).close()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([name, "--help"], ["help", name]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        assert f"usage: tuner {name}" in capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("tuner ")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "error: there is no command 'trian'\n  fix: did you mean 'tuner train'?\n"),
        (["frobnicate"], "error: there is no command 'frobnicate'\n  fix: tuner --help lists the commands\n"),
        (["train"], "error: which configuration?\n  fix: tuner train config.json\n"),
        (
            ["check", "nothing.json"],
            "error: the configuration file does not exist\n  at: nothing.json\n"
            "  fix: check the path; tuner configure writes a configuration\n",
        ),
        (
            ["train", "--moedl", "x"],
            "error: tuner train: unrecognized arguments: --moedl\n  fix: did you mean '--model'?\n",
        ),
        (["train", "--what"], "error: tuner train: unrecognized arguments: --what\n  fix: tuner train --help\n"),
        (["convert", "a", "b"], "error: tuner convert: the following arguments are required: --to\n"),
        (["plugins", "show", "ghost"], "error: there is no model plugin 'ghost'\n"),
    ],
)
def test_wrong_use_is_told_without_a_traceback_and_exits_with_2(
    arguments: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith(expected)


def test_no_command_has_more_than_twelve_flags_but_the_one_that_draws_pictures() -> None:
    """Its flags are of one picture, not of a configuration that grows."""
    import argparse
    import importlib

    for name in COMMANDS:
        parser = argparse.ArgumentParser()
        importlib.import_module(f"tuner.cli.{name}").add_arguments(parser)
        assert sum(bool(action.option_strings) for action in parser._actions) <= (18 if name == "sample" else 12)


def test_a_broken_plugin_breaks_neither_help_nor_the_list(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.model("cubist", descriptor="raise RuntimeError('boom')")
    site.model("dadaist", requires="tuner<0.0.1")
    assert main(["plugins", "show", "cubist"]) == 2
    assert "plugin 'cubist' (tuner-cubist 0.3) is not usable: RuntimeError: boom" in capsys.readouterr().err
    for arguments in (["--help"], ["plugins", "list"]):
        assert main(arguments) == 0
        streams = capsys.readouterr()
        assert "warning: plugin 'cubist' (tuner-cubist 0.3) is not usable: RuntimeError: boom" in streams.err
        assert "warning: plugin 'dadaist' (tuner-dadaist 0.3) is not usable: needs tuner<0.0.1" in streams.err


def test_plugins_are_listed_and_shown_for_scripts(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.model("cubist")
    assert main(["plugins", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    cubist = next(entry for entry in listed["plugins"] if entry["name"] == "cubist")
    assert (cubist["kind"], cubist["dist"], cubist["usable"]) == ("model", "tuner-cubist", True)
    assert main(["plugins", "show", "cubist", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["api"], shown["formats"], shown["hooks"]) == ("1.0", ["plain"], "toy_cubist.hooks")


def test_a_plugin_whose_hooks_are_broken_is_shown_with_the_reason(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.model("cubist", hooks="import toy_gone")
    assert main(["plugins", "show", "cubist"]) == 0
    assert "hooks: cannot be imported: ModuleNotFoundError: No module named 'toy_gone'" in capsys.readouterr().out


def test_the_schema_of_a_model_is_printed_for_editors(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema", "--model", "cubist"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["$schema"].endswith("2020-12/schema")
    model = schema["$defs"][schema["properties"]["model"]["$ref"].split("/")[-1]]
    assert model["properties"]["sharpness"]["description"] == "A key of its own."


def test_a_resolved_configuration_is_printed_and_stays_as_it_is(
    project: Project, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["config", "resolve", project.config(), "--set", "network.rank=8"]) == 0
    first = capsys.readouterr().out
    assert json.loads(first)["network"]["alpha"] == 8
    (tmp_path / "resolved.json").write_text(first, encoding="utf-8")
    assert main(["config", "resolve", str(tmp_path / "resolved.json")]) == 0
    assert capsys.readouterr().out == first


def test_output_is_plain_where_there_is_no_terminal(project: Project) -> None:
    done = run("trian")
    assert "\x1b" not in done.stderr


def test_a_closed_output_is_no_fault() -> None:
    done = subprocess.run(
        f"{sys.executable} -m tuner explain train.seed >&-", shell=True, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_current_folder_that_was_removed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["doctor"]) == 2
    assert "the current folder is not there any more" in capsys.readouterr().err


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from tuner.cli.console import colours

    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert colours(Terminal())  # type: ignore[arg-type]
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colours(Terminal())  # type: ignore[arg-type]


def test_characters_that_a_stream_lacks_end_no_command(tmp_path: Path) -> None:
    picture = {"model_family": "flux", "validation_prompt": "\U0001f7eb"}
    (tmp_path / "config.json").write_text(json.dumps(picture, ensure_ascii=False), encoding="utf-8")
    called = [sys.executable, "-m", "tuner", "config", "import", "simpletuner", str(tmp_path), "--json"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(called, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0
    assert json.loads(done.stdout)["config"]["sample"]["prompts"] == ["\U0001f7eb"]
