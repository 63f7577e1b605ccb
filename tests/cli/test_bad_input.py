"""The command line under bad input: exit code 2, the problem by name, no traceback; signals, and foreign plugins."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.core.registry.conftest import site  # noqa: F401  # an empty folder for plugins
from tests.core.registry.toys import Site
from tests.core.train.conftest import cache_dir, make_config, model_files, pictures  # noqa: F401  # a tiny real model
from tuner.cli.main import main
from tuner.core.track.events import read_events

Write = Callable[..., str]


@pytest.fixture
def write(make_config: Callable[..., dict[str, Any]], tmp_path: Path) -> Write:  # noqa: F811
    """A function from changes by dotted path to the path of a configuration file."""

    def to_file(**changes: Any) -> str:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(make_config(**changes), indent=2), encoding="utf-8")
        return str(path)

    return to_file


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says on standard error when it refuses."""
    assert main(list(arguments)) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("error: ")
    assert "Traceback" not in streams.err
    return streams.err.removeprefix("error: ")


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tuner", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"TUNER_CACHE_DIR": os.devnull},
    )  # fmt: skip


# --- configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize(
    ("changes", "what", "key", "fix"),
    [
        ({"train__stepz": 4}, "unknown key 'stepz' in train", "train.stepz", "did you mean 'steps'?"),
        ({"netwrk": {"rank": 4}}, "unknown key 'netwrk'", "netwrk", "did you mean 'network'?"),
        ({"model__paht": "x"}, "unknown key 'paht' in model", "model.paht", "did you mean 'path'?"),
        (
            {"network__type": "controlnet"},
            "network.type = 'controlnet' is planned",
            "network.type",
            "choose another value",
        ),
        ({"train__steps": "many"}, "train.steps: expected a whole number, got 'many'", "train.steps", None),
        ({"optimizer__lr": "2e-4"}, "optimizer.lr: expected a number, got '2e-4'", "optimizer.lr", None),
        ({"model__family": "animaa"}, "there is no model plugin 'animaa'", None, "did you mean 'anima'?"),
    ],
)
def test_a_wrong_key_or_value_is_told_with_file_line_and_path(
    write: Write, capsys: pytest.CaptureFixture[str], command: str, changes: dict[str, Any], what: str,
    key: str | None, fix: str | None,
) -> None:  # fmt: skip
    path = write(**changes)
    message = refusal(capsys, command, path)
    assert message.startswith(what)
    if key is not None:
        leaf = f'"{key.rpartition(".")[2]}"'
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        number = next(number for number, line in enumerate(lines, 1) if leaf in line)
        assert f"at: {path}:{number}, {key}\n" in message
    if fix is not None:
        assert f"fix: {fix}" in message


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("optimizer.lrr=1", "unknown key 'lrr' in optimizer\n  at: --set optimizer.lrr=1, optimizer.lrr"),
        ("nothing.at=1", "unknown key 'nothing'\n  at: --set nothing.at=1, nothing"),
        ("optimizer.lr", "cannot read --set 'optimizer.lr'"),
        ("=5", "cannot read --set '=5'"),
        ("train.steps=abc", "train.steps: expected a whole number, got 'abc'\n  at: --set train.steps=abc"),
        ("data.sets[7].resolution=64", "there is no entry 7 in data.sets, which has 1"),
        ("data.sets[0].resolution=100", "data.sets[0].resolution: 100 is not a multiple of 16"),
    ],
)
def test_a_misspelt_override_is_told(write: Write, capsys: pytest.CaptureFixture[str], text: str, what: str) -> None:
    assert refusal(capsys, "check", write(), "--set", text).startswith(what)


def test_the_wrong_model_is_told(write: Write, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = refusal(capsys, "train", write(), "--model", "flux")
    assert message.startswith("--model says 'flux', the configuration says 'anima'")
    config = json.loads(Path(write()).read_text())
    del config["model"]["family"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "there is no model plugin 'fluxx'" in refusal(
        capsys, "train", str(tmp_path / "config.json"), "--model", "fluxx"
    )
    assert "add --model NAME" in refusal(capsys, "train", str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{ nope", "not valid JSON"),
        ("[1]", "the configuration must be a JSON object"),
        ('{"model": {"family": "anima"}}', "5 problems:\n1. the key 'model.path' is required"),
    ],
)
def test_a_file_that_is_no_configuration_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, what: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    message = refusal(capsys, "train", str(path))
    assert message.startswith(what)
    assert str(path) in message


def test_every_command_tells_a_wrong_weight_path_the_same_way(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(model__path="/nothing/here.safetensors")
    said = {refusal(capsys, command, path) for command in ("check", "train", "cache")}
    assert said == {"no such file or folder\n  at: model.path: /nothing/here.safetensors\n  fix: check the path\n"}


def test_a_configuration_resolves_without_its_weights(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(model__path="/nothing/here.safetensors")
    assert main(["config", "resolve", path]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["model"]["path"] == "/nothing/here.safetensors"
    assert "/nothing/here.safetensors is not here" in err


def test_a_missing_prompt_file_is_told(write: Write, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = refusal(capsys, "check", write(sample={"prompts": "prompts.txt"}))
    assert f"{tmp_path / 'prompts.txt'}, sample.prompts\n  why: No such file or directory" in message


# --- the whole program ------------------------------------------------------------------------------------------------


def test_a_strength_that_is_no_number_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    message = refusal(capsys, "sample", "--adapter", f"{tmp_path / 'a.safetensors'}:0,8")
    assert "cannot read the strength '0,8'" in message


def test_the_program_exits_with_2_and_without_a_traceback(write: Write) -> None:
    with start("train", write(network__rank=0)) as process:
        out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    expected = "error: no module gets an adapter\n  at: network.rank\n  why: the rank is 0\n"
    assert err == expected + "  fix: set network.rank to 1 or more\n"


def test_sigterm_saves_and_exits_with_0_and_standard_error_is_free_of_library_noise(
    write: Write, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with start("train", write(train__steps=20000, log__level="warning")) as process:
        while process.poll() is None and steps(out) < 2:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        said, err = process.communicate()
    assert process.returncode == 0, err
    assert err == "warning: stopping after this step; once more to abort now\n"
    assert "interrupted, to go on add --resume: step " in said
    [checkpoint] = (out / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{steps(out):06d}"
    assert read_events(out / "events.jsonl")[-1]["reason"] == "interrupted"


def test_a_training_goes_on_when_nobody_reads_its_output(write: Write, tmp_path: Path) -> None:
    with start("train", write()) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 0, err
    assert (tmp_path / "out/out.safetensors").is_file()
    assert read_events(tmp_path / "out/events.jsonl")[-1]["reason"] == "finished"


TWICE = """
import signal, sys
from tuner.cli.main import main
from tuner.core.registry.extensions import Extensions

def twice(self, step, metrics):
    if step == 3:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

Extensions.on_step_end = twice
sys.exit(main(sys.argv[1:]))
"""


def test_a_second_signal_aborts_and_earlier_checkpoints_stay(write: Write, tmp_path: Path) -> None:
    path = write(checkpoint__every=2)
    done = subprocess.run([sys.executable, "-c", TWICE, "train", path], capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr
    assert done.stderr.endswith("error: interrupted\n")
    assert "Traceback" not in done.stderr
    assert [entry.name for entry in (tmp_path / "out/checkpoints").iterdir()] == ["step-000002"]


def steps(folder: Path) -> int:
    return sum(event["kind"] == "step" for event in read_events(folder / "events.jsonl"))


def test_a_broken_plugin_beside_a_good_run_changes_nothing_but_a_warning(
    write: Write,
    site: Site,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def adapter(name: str) -> bytes:
        assert main(["train", write(checkpoint__dir=str(tmp_path / name / "run"), train__steps=2)]) == 0
        return (tmp_path / name / "run" / "run.safetensors").read_bytes()

    alone = adapter("alone")
    site.model("cubist", descriptor="raise RuntimeError('boom')")
    site.model("dadaist", requires="tuner<0.0.1")
    assert main(["plugins", "show", "cubist"]) == 2
    capsys.readouterr()
    assert adapter("beside") == alone
    capsys.readouterr()
    assert main(["--help"]) == 0
    warnings = capsys.readouterr().err
    assert "plugin 'cubist' (tuner-cubist 0.3) is not usable: RuntimeError: boom" in warnings
    assert "plugin 'dadaist' (tuner-dadaist 0.3) is not usable" in warnings
