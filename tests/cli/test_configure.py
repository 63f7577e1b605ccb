"""``tuner configure``: driven at a real pseudo-terminal, by a file of answers, and on a configuration that exists."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.runs import make_pictures
from tests.fixtures.terminal import Terminal
from tests.fixtures.tiny_anima import make_tiny_anima
from tests.fixtures.tiny_flux import make_tiny_flux
from tuner.cli.main import main
from tuner.core.config.jsonc import parse

LINES = {"TERM": "dumb"}
"""A terminal without cursor keys, where plain lines are asked for."""
TOKENIZERS = {
    "anima": {"model.tokenizers.t5": "anima/t5"},
    "flux": {"model.tokenizers.clip_l": "flux/clip_tokenizer", "model.tokenizers.t5": "flux/t5_tokenizer"},
}
MAKERS = {"anima": make_tiny_anima, "flux": make_tiny_flux}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each of two families."""
    folder = tmp_path_factory.mktemp("models")
    for family, make in MAKERS.items():
        make(folder / family)
    return folder


@pytest.fixture
def work(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with freshly made pictures, and the models."""
    for family in MAKERS:
        (tmp_path / family).symlink_to(models / family)
    (tmp_path / "pictures").mkdir()
    make_pictures(tmp_path / "pictures")
    monkeypatch.setenv("TUNER_CACHE_DIR", str(tmp_path / "user"))
    # No card is found here, whatever this computer has: the driver's tool is not on the search path.
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answers(family: str, **other: Any) -> dict[str, Any]:
    return {
        "models": family,
        **TOKENIZERS[family],
        "pictures": "pictures",
        "trigger": "mila",
        "goal": "character",
        "size": 64,
        "card": "cpu",
        "prompt": "-",
        **other,
    }


def configure(given: dict[str, Any], target: str = "config.json") -> int:
    Path("answers.json").write_text(json.dumps(given), encoding="utf-8")
    return main(["configure", target, "--answers", "answers.json"])


def read(path: str = "config.json") -> Any:
    return parse(Path(path).read_text(encoding="utf-8"), path).value


def trains(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", path]) == 0
    assert "no problems found" in capsys.readouterr().out
    assert main(["train", path, "--set", "train.steps=1", "--set", "data.workers.load=0"]) == 0


# --- at a terminal ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MAKERS)
def test_a_person_answers_on_a_terminal_and_the_file_trains(
    family: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Terminal("configure", folder=work, environment=LINES) as terminal:
        terminal.answer("Which file", "")
        terminal.answer("Where are your model files?", "nowhere")
        terminal.expect("no such file or folder")
        terminal.answer("Where are your model files?", family)
        for name, place in TOKENIZERS[family].items():
            terminal.answer(f"Where is the {name.rsplit('.')[-1]} tokenizer", place)
        terminal.answer("In which folder are your pictures?", "picture")
        terminal.expect("there is no such folder")
        terminal.answer("In which folder are your pictures?", "pictures")
        terminal.expect("4 pictures, 128 x 72 to 96 x 96; 4 with a caption")
        terminal.answer("Which word", "mila")
        terminal.answer("Which prompt", "-")
        terminal.answer("What is it to learn?", "1")
        terminal.answer("At which size", "64")
        terminal.answer("Which card", "cpu")
        terminal.expect("Which of them?")
        offered = terminal.expect("> ")
        terminal.type("quick\n")
        assert [line.split(":")[0].split()[-1] for line in offered.splitlines() if " steps; " in line] == [
            "quick", "balanced", "thorough"
        ]  # fmt: skip
        terminal.expect("plan for cpu:")
        terminal.answer("What is the training to be called?", "")
        assert not (work / "config.json").exists()
        terminal.answer("Write this file?", "y")
        assert terminal.end() == 0
        assert f"next: tuner check {work / 'config.json'}" in terminal.screen
        assert f"then: tuner train {work / 'config.json'}" in terminal.screen
    written = read()
    assert (written["model"]["family"], written["network"]["rank"]) == (family, 8)
    assert written["data"]["sets"][0]["sources"] == [
        {"id": "mila", "path": "pictures", "captions": {"prefix": "mila,"}}
    ]
    trains("config.json", capsys)
    assert (work / "out" / "mila" / "mila.safetensors").is_file()


def test_ctrl_c_leaves_everything_as_it_was(work: Path) -> None:
    before = sorted(path.name for path in work.iterdir())
    with Terminal("configure", "new.json", folder=work, environment=LINES) as terminal:
        terminal.answer("Where are your model files?", "anima")
        terminal.expect("tokenizer")
        terminal.expect("> ")
        assert terminal.interrupt() == 130
    assert sorted(path.name for path in work.iterdir()) == before


def test_a_full_terminal_gets_menus_where_they_are_installed(work: Path) -> None:
    if importlib.util.find_spec("questionary") is None:
        with Terminal("configure", "new.json", folder=work) as terminal:
            terminal.answer("Where are your model files?", "nowhere")
            terminal.expect("no such file or folder")
        return

    def line(prompt: str, text: str) -> None:
        terminal.expect(prompt)
        terminal.type(f"{text}\r")

    # Without the variable it would wait for a report that only a real screen sends.
    with Terminal("configure", "new.json", folder=work, environment={"PROMPT_TOOLKIT_NO_CPR": "1"}) as terminal:
        line("Where are your model files?", "anima")
        line("Where is the t5 tokenizer", "\x1b[A\x1b[A")  # around to the last entry but one: the hub
        line("In which folder are your pictures?", "pictures")
        line("Which word shall call up", "mila")
        line("Which prompt shall be drawn", "")
        line("What is it to learn?", "\x1b[B")
        line("At which size", "\x1564")  # Ctrl-U clears what is suggested
        line("Which card will", "cpu")
        line("Which of them?", "")
        line("What is the training to be called?", "")
        line("Write this file?", "n")
        assert terminal.end() == 0
        assert "nothing was written" in terminal.screen
    assert not (work / "new.json").exists()


# --- a file of answers ------------------------------------------------------------------------------------------------


def test_a_script_answers_from_a_file(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(16):
        shutil.copy(work / "pictures" / "0.png", work / "pictures" / f"copy{number}.png")
        shutil.copy(work / "pictures" / "0.txt", work / "pictures" / f"copy{number}.txt")
    assert configure(answers("flux", card="4090", memory="20GB", prompt="mila on a boat", name="first")) == 0
    shown = capsys.readouterr().out
    assert "plan for NVIDIA GeForce RTX 4090" in shown
    assert "balanced: rank 16, 64 px, 1600 steps; " in shown
    assert read()["validate"] == {"split": 0.1}
    assert "  preview: " in shown
    written = read()
    assert written["checkpoint"] == {"every": 200, "dir": "out/first"}
    assert written["sample"] == {"prompts": ["mila on a boat"], "every": 200, "size": 64}
    text = Path("config.json").read_text(encoding="utf-8")
    assert "// one subject needs few numbers" in text
    assert str(work) not in text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"goal": None}, "no answer to 'goal'"),
        ({"goal": "styl"}, "did you mean 'style'?"),
        ({"gaol": "style"}, "not asked: 'gaol'"),
        ({"size": "big"}, "a number of pixels is needed"),
        ({"size": True}, "the answer to 'size' must be a text or a number, got True"),
        ({"pictures": "elsewhere"}, "there is no such folder"),
        ({"models": "pictures"}, "there is no model that an installed plugin knows"),
        ({"model.vae": "anima/anima.safetensors"}, "anima.safetensors"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_wrong_answer_is_an_error_that_names_it(
    change: dict[str, Any], told: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {name: value for name, value in (answers("anima") | change).items() if value is not None}
    assert configure(given) == 2
    assert told in capsys.readouterr().err
    assert not Path("config.json").exists()


def test_a_script_reads_the_result_as_json(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("answers.json").write_text(json.dumps(answers("flux")), encoding="utf-8")
    assert main(["configure", "config.json", "--answers", "answers.json", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["path"], found["new"], found["written"]) == (str(work / "config.json"), True, True)
    assert found["answers"]["preset"] == "balanced"
    assert found["plan"]["peak"] > 0 or found["plan"]["host"] > 0
    assert main(["configure", "config.json", "--json"]) == 2


def test_odd_folders_are_described_and_become_settings(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = work / "pictures"
    (pictures / "broken.png").write_bytes(b"no picture")
    (pictures / "0.txt").unlink()
    (pictures / "1.txt").write_text("", encoding="utf-8")
    (pictures / "more").mkdir()
    (pictures / "more" / "twin.png").write_bytes((pictures / "2.png").read_bytes())
    assert configure(answers("anima", subfolders=True, caption="a photo of a dog")) == 0
    shown = capsys.readouterr().out
    assert "odd: broken.png" in shown
    assert "1 caption files are empty" in shown
    assert "the same picture several times" in shown
    written = read()["data"]
    assert (written["on_corrupt"], written["on_missing"]) == ("skip", "skip")
    assert written["sets"][0]["sources"][0] == {
        "id": "mila",
        "path": "pictures",
        "recursive": True,
        "captions": {"allow_empty": True, "fallback": "a photo of a dog", "prefix": "mila,"},
    }
    assert main(["check", "config.json"]) == 0


def test_each_preset_says_what_it_costs_and_is_fitted_to_the_card(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {name: value for name, value in answers("flux").items() if not name.startswith("model.")}
    given |= {"models": "someone/some-model", "family": "flux", "size": 1024, "card": "4090", "memory": "16GB"}
    assert configure(given | {"preset": "balanced"}) == 0
    shown = capsys.readouterr().out
    ways = re.findall(
        r"  (\w+): rank \d+, \d+ px, \d+ steps; (DOES NOT FIT, needs )?([\d.]+) GB, about ([\dh ]+) min", shown
    )
    assert [way[0] for way in ways] == ["quick", "balanced", "thorough"]
    assert all(not missed and float(needed) <= 16 for _, missed, needed, _ in ways)
    text = Path("config.json").read_text(encoding="utf-8")
    assert re.search(r"// .* less than without, .*\n *\"(checkpointing|swap_blocks|denoiser)\"", text)
    Path("config.json").unlink()
    assert configure(given | {"memory": "3GB"}) == 0
    assert capsys.readouterr().out.count("DOES NOT FIT") >= 3
    Path("config.json").unlink()
    assert configure(given | {"card": "h200", "memory": "10GB", "preset": "faster"}) == 0
    assert "base weights in fewer bits" in capsys.readouterr().out
    assert '// faster here, with slightly different results\n    "denoiser": "int8"' in Path("config.json").read_text()


def test_many_models_in_one_folder_are_offered_with_parts_by_content(work: Path) -> None:
    given = answers("flux", models=".", model="flux/dev.safetensors")
    assert configure(given) == 0
    model = read()["model"]
    assert model["text_encoders"] == {
        "clip_l": {"path": "flux/clip_l.safetensors"}, "t5": {"path": "flux/t5xxl.safetensors"}
    }  # fmt: skip
    assert model["vae"] == {"path": "flux/ae.safetensors"}


def test_weights_that_are_fetched_later_are_planned_as_published(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {name: value for name, value in answers("flux").items() if not name.startswith("model.")}
    given |= {
        "models": "someone/some-model",
        "family": "sd3",
        "model.flavour": "3.5-medium",
        "card": "4090",
        "size": 512,
    }
    assert configure(given | {"memory": 16}) == 0
    assert "sizes are those of the published model '3.5-medium'" in capsys.readouterr().out
    assert read()["model"] == {"family": "sd3", "path": "someone/some-model", "flavour": "3.5-medium"}


# --- a configuration that exists --------------------------------------------------------------------------------------


def test_an_edit_keeps_comments_and_order_shows_the_difference_and_asks(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert configure(answers("anima")) == 0
    path = Path("config.json")
    mine = path.read_text(encoding="utf-8").replace(
        '"steps": 600', '"seed": 3, // my number\n    "steps": 600 /* long */'
    )
    path.write_text(mine, encoding="utf-8")
    capsys.readouterr()
    change = {"change": ["goal"], "goal": "style", "card": "cpu", "preset": "quick"}
    assert configure(change) == 2
    assert "no answer to 'write'" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == mine
    assert configure(change | {"write": False}) == 0
    assert path.read_text(encoding="utf-8") == mine
    capsys.readouterr()
    assert configure(change | {"write": True}) == 0
    shown = capsys.readouterr().out
    assert '-    "steps": 600 /* long */\n' in shown
    assert '+    "steps": 500 /* long */\n' in shown
    text = path.read_text(encoding="utf-8")
    assert '"seed": 3, // my number' in text
    assert "a style touches the whole picture" in text
    assert "one subject needs few numbers" not in text
    assert [*read()] == [*parse(mine, "mine").value]
    trains("config.json", capsys)


def test_a_person_changes_the_pictures_on_a_terminal(work: Path) -> None:
    assert configure(answers("flux")) == 0
    path = Path("config.json")
    (work / "pictures").rename(work / "moved")
    with Terminal("configure", "config.json", folder=work, environment=LINES) as terminal:
        terminal.answer("What shall change?", "2, name")
        terminal.answer("In which folder are your pictures?", "")
        terminal.expect("there is no such folder")
        terminal.answer("In which folder are your pictures?", "moved")
        terminal.answer("Which word", "")
        terminal.answer("What is the training to be called?", "second")
        difference = terminal.answer("Change the file like this?", "yes")
        assert terminal.end() == 0
    assert '"path": "moved"' in difference
    assert read()["checkpoint"]["dir"] == "out/second"
    assert read()["data"]["sets"][0]["sources"][0]["captions"] == {"prefix": "mila,"}
    assert path.read_text(encoding="utf-8").startswith("// Written by tuner configure")
    assert main(["check", "config.json"]) == 0


def test_another_model_replaces_the_files_of_the_old_one(work: Path) -> None:
    assert configure(answers("anima")) == 0
    assert configure({"change": ["model"], "models": "flux", **TOKENIZERS["flux"], "write": True}) == 0
    assert main(["check", "config.json"]) == 0
    assert read()["model"]["family"] == "flux"
    assert set(read()["model"]["text_encoders"]) == {"clip_l", "t5"}


def test_a_file_that_leaves_the_model_to_the_command_line_gets_its_name(work: Path) -> None:
    assert configure(answers("anima")) == 0
    path = Path("config.json")
    path.write_text(path.read_text(encoding="utf-8").replace('"family": "anima",', "// from --model"), encoding="utf-8")
    assert configure({"change": ["goal"], "family": "anima", "goal": "full", "card": "cpu", "write": True}) == 0
    assert (read()["model"]["family"], read()["train"]["mode"]) == ("anima", "full")
    assert "// from --model" in path.read_text(encoding="utf-8")
    assert main(["check", "config.json"]) == 0
    assert configure({"change": ["goal"], "goal": "concept", "card": "cpu", "write": True}) == 0
    assert ("mode" in read()["train"], read()["network"]["rank"]) == (False, 16)
    assert main(["check", "config.json"]) == 0


def test_without_anybody_to_ask_it_says_how_to_answer(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("anima\n"))
    assert main(["configure", "config.json"]) == 2
    assert "tuner configure --answers FILE" in capsys.readouterr().err


def test_a_place_where_no_file_can_be_written_is_told_before_any_question(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "nowhere.json").symlink_to(work / "gone")
    for target, told in (
        ("x" * 5000, "this cannot be the name of a file"),
        ("answers.json/config.json", "answers.json is no folder to write to"),
        ("nowhere.json", "this file exists"),
    ):
        assert configure({}, target) == 2
        assert told in capsys.readouterr().err


def test_a_file_that_is_no_configuration_is_told_before_any_question(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("config.json").write_text("{ nothing", encoding="utf-8")
    assert configure({}) == 2
    assert "not valid JSON" in capsys.readouterr().err
