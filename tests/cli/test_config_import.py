"""``tuner config import`` from the command line, up to a configuration that resolves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fixtures.tiny_anima import make_tiny_anima
from tests.fixtures.tiny_flux import make_tiny_flux
from tests.fixtures.tiny_sd3 import make_tiny_sd3
from tuner.cli.main import main
from tuner.core.config.jsonc import parse
from tuner.core.importing.sd_scripts import import_words
from tuner.core.registry import Catalog, open_facts, typed_config

COMMAND = (
    "anima_train_network.py --pretrained_model_name_or_path=anima.safetensors --qwen3=qwen3 --vae=vae.safetensors"
    " --t5_tokenizer_path=t5 --dataset_config=data.toml --output_dir=out --output_name=hero --network_dim=8"
    " --network_module=networks.lora_anima --learning_rate=1e-4 --timestep_sampling=sigmoid --max_train_epochs=2"
    " --mixed_precision=bf16 --gradient_checkpointing --cache_latents --cache_text_encoder_outputs"
)
DATA = """
[general]
caption_extension = ".txt"
enable_bucket = true

[[datasets]]
resolution = 512

[[datasets.subsets]]
image_dir = "images"
num_repeats = 2
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data.toml").write_text(DATA, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def imported(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(["config", "import", *arguments])
    return code, capsys.readouterr().out


def test_a_command_line_becomes_a_file_that_resolves(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tiny_anima(folder)
    (folder / "images").mkdir()
    code, told = imported(capsys, "sd-scripts", "--out", "runs/hero.json", "--", *COMMAND.split())
    assert code == 0
    assert "network_dim = 8 -> network.rank = 8" in told
    assert "next: tuner check runs/hero.json" in told
    assert main(["config", "resolve", "runs/hero.json"]) == 0
    resolved = json.loads(capsys.readouterr().out)
    assert resolved["network"]["alpha"] == 1.0
    assert resolved["checkpoint"]["format"] == "sd-scripts"
    (entry,) = resolved["data"]["sets"]
    assert entry["sources"][0]["path"] == str(folder / "images")
    assert entry["sources"][0]["repeats"] == 2


SD_SCRIPTS = (
    " --cache_latents_to_disk --sdpa --seed 42 --gradient_checkpointing --mixed_precision bf16 --network_dim 4"
    " --network_train_unet_only --optimizer_type adamw8bit --learning_rate 1e-4 --fp8_base --max_train_epochs 4"
)
FLUX = (
    "flux_train_network.py --network_module networks.lora_flux --timestep_sampling shift --guidance_scale 1.0"
    " --discrete_flow_shift 3.1582 --model_prediction_type raw --network_args train_double_block_indices=0 single_dim=0"
)
SD3 = "sd3_train_network.py --network_module networks.lora_sd3 --clip_l_dropout_rate 0.1 --network_args x_mlp_dim=2"


@pytest.mark.parametrize(("command", "make"), [(FLUX, make_tiny_flux), (SD3, make_tiny_sd3)], ids=["flux", "sd3"])
def test_what_is_mapped_fits_the_weights_of_the_model(command: str, make, folder: Path) -> None:
    section = make(folder)
    result = import_words((command + SD_SCRIPTS).split(), Catalog(), model=None, base=folder)
    assert result.exit_code == 0
    document = result.config | {"model": section.get("model", section) | {"family": result.config["model"]["family"]}}
    opened = open_facts(typed_config(document, Catalog(), base_dir=folder), Catalog())
    assert opened.config.network.alpha == 1.0
    assert opened.config.quantize.denoiser == "fp8_unscaled"


def test_the_report_is_json_for_scripts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = imported(capsys, "sd-scripts", "--json", "--", *COMMAND.split(), "--deepspeed")
    report = json.loads(told)
    assert code == 3
    assert report["options"] == 1 + 16 + 1 + 5
    assert sum(count for status, count in report["counts"].items() if status != "default") == report["options"]
    assert [row["option"] for row in report["rows"] if row["status"] == "not_built"] == ["--deepspeed"]
    assert report["config"]["data"]["sets"][0]["sources"][0]["repeats"] == 2


def test_what_is_printed_can_be_read_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, told = imported(capsys, "sd-scripts", "--", *COMMAND.split())
    text = told.partition("configuration\n")[2]
    document = parse(text, "printed").value
    assert document["model"]["family"] == "anima"
    assert "// alpha is 1 there" in text


def test_a_file_is_not_replaced_unless_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = folder / "config.json"
    target.write_text("mine", encoding="utf-8")
    assert imported(capsys, "sd-scripts", "--out", "config.json", "data.toml")[0] == 2
    assert target.read_text(encoding="utf-8") == "mine"
    assert imported(capsys, "sd-scripts", "--out", "config.json", "--overwrite", "data.toml")[0] == 0
    assert set(parse(target.read_text(encoding="utf-8"), "config").value) == {"data"}


def test_a_folder_of_simpletuner_is_imported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = {"model_family": "flux", "max_train_steps": 9, "num_train_epochs": 0, "tread_config": {"routes": []}}
    (folder / "config.json").write_text(json.dumps(run), encoding="utf-8")
    code, told = imported(capsys, "simpletuner", ".")
    assert code == 3
    assert "config.json:1  tread_config" in told
    assert "4 options in the source" in told


@pytest.mark.parametrize(
    "arguments", [("sd-scripts", "nothing.txt"), ("simpletuner", "nothing"), ("simpletuner", "a", "b")]
)
def test_a_source_that_cannot_be_read_is_named(folder: Path, capsys, arguments: tuple[str, ...]) -> None:
    assert main(["config", "import", *arguments]) == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["sd-scripts", "simpletuner"])
@pytest.mark.parametrize(
    "text",
    ["{", "[1]", '[{"id": "a"}, 3]', '{"datasets": [3]}', '{"datasets": [{"subsets": [3]}]}', '{"general": 3, "a": 1}'],
)
def test_a_file_of_another_shape_is_told(
    tool: str, text: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "source.json").write_text(text, encoding="utf-8")
    assert main(["config", "import", tool, "source.json"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("target", ["images", "data.toml/new.json"])
def test_a_place_that_cannot_be_written_is_told(target: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "images").mkdir()
    assert imported(capsys, "sd-scripts", "data.toml", "--out", target, "--overwrite")[0] == 2
    assert main(["config", "import", "sd-scripts", "data.toml", "--out", target, "--overwrite"]) == 2
    assert "error: this file or folder cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["anima", "flux", "sd3"])
def test_what_is_mapped_resolves_before_the_weights_are_here(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"{name}_train_network.py --pretrained_model_name_or_path models/{name}/base.safetensors"
    (folder / "run.sh").write_text(f"{command} --dataset_config data.toml --mixed_precision bf16", encoding="utf-8")
    assert imported(capsys, "sd-scripts", "run.sh", "--out", "runs/one.json")[0] == 0
    assert main(["config", "resolve", "runs/one.json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["model"]["path"] == str(folder / "models" / name / "base.safetensors")
    assert "base.safetensors is not here" in err
