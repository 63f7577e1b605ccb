"""``tuner completion``: what the scripts offer, tried in bash and read in the others; made without torch."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.core.registry.conftest import site  # noqa: F401  # an empty folder for plugins
from tests.core.registry.toys import Site
from tuner.cli.completion_words import collect
from tuner.cli.main import COMMANDS, main

BASH = str(shutil.which("bash"))


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


def offered(text: str, *lines: str, folder: Path) -> list[list[str]]:
    """What bash offers at the end of each line."""
    tries = "\n".join(
        f"COMP_LINE={shlex.quote(line)}; COMP_POINT=${{#COMP_LINE}}; COMPREPLY=(); _tuner 2>/dev/null;"
        "(IFS=';'; echo \"${COMPREPLY[*]}\")"
        for line in lines
    )
    done = subprocess.run([BASH, "-c", f"{text}\n{tries}"], capture_output=True, text=True, check=True, cwd=folder)
    return [line.split(";") if line else [] for line in done.stdout.split("\n")[:-1]]


def test_bash_offers_commands_options_models_presets_keys_and_values(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "hero.json").touch()
    (tmp_path / "out").mkdir()
    text = script("bash", capsys)
    lines = {
        "tuner tr": ["train"],
        "tuner train --k": ["--keep-going"],
        "tuner train --model sd": ["sd3"],
        "tuner check --preset flux/lora-": ["flux/lora-attention", "flux/lora-t5"],
        "tuner train --set network.rank": ["network.rank=", "network.rank_dropout="],
        "tuner train hero.json --set network.type=lo": ["lora", "loha", "lokr"],
        "tuner plan --set data.sets.0.sources.0.captions.from=f": ["file", "filename", "fixed"],
        "tuner plugins sh": ["show"],
        "tuner plugins show an": ["anima"],
        "tuner config import si": ["simpletuner"],
        "tuner explain memory.swap": ["memory.swap_blocks"],
        "tuner check he": ["hero.json"],
        "tuner report o": ["out"],
        "tuner cache ver": ["verify"],
        "tuner plan --device 409": ["4090"],
        "tuner train --resume x --set train.seed=": [],
        "tuner plan --device=409": ["4090"],
        "tuner train --set=network.rank_": ["network.rank_dropout="],
    }
    assert dict(zip(lines, offered(text, *lines, folder=tmp_path), strict=True)) == lines


def test_names_with_blanks_stay_whole_in_bash(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "my run").mkdir()
    (tmp_path / "my config.json").touch()
    tries = ("tuner check my", "tuner report my", "tuner check my\\ c")
    found = [sorted(each) for each in offered(script("bash", capsys), *tries, folder=tmp_path)]
    assert found == [["my config.json", "my run"], ["my run"], ["my config.json"]]


def test_every_command_option_and_key_is_in_the_script_of_every_shell(capsys: pytest.CaptureFixture[str]) -> None:
    words = collect()
    assert set(words.commands) == set(COMMANDS)
    for shell in ("bash", "zsh", "fish"):
        text = script(shell, capsys)
        for expected in (*COMMANDS, "network.rank", "flux/lora", "keep-going", "sd-scripts"):
            assert expected in text
    assert script("zsh", capsys).startswith("#compdef tuner\n")
    assert "complete -c tuner -n '__tuner_at train' -l keep-going -d " in script("fish", capsys)


def test_keys_presets_and_names_of_installed_plugins_are_offered(
    site: Site,  # noqa: F811
) -> None:
    site.model("cubist")
    site.model("dadaist", descriptor="raise RuntimeError('boom')")
    words = collect()
    assert "cubist" in words.lists["models"]
    assert "model.sharpness" in words.lists["keys"]
    assert words.values["model.flavour"][:3] == ("dev", "schnell", "chroma")


def test_scripts_are_made_without_torch() -> None:
    code = "import sys\nfrom tuner.cli.main import main\nmain(['completion', 'bash'])\nsys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == 2
    assert "invalid choice: 'tcsh'" in capsys.readouterr().err
