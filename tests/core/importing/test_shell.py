"""Scripts of shells: which words belong to the training command, and what is said of the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.importing.sources import CATALOG, row, status, write
from tuner.core.errors import UsageError
from tuner.core.importing.report import Imported
from tuner.core.importing.sd_scripts import import_files

BASH = r"""#!/bin/bash
set -e
MODELS=/data/models
export OUT="/data/out dir"
EXTRA=(--seed 7 --network_dropout 0.25)
SAVING="--save_every_n_epochs 2 --save_precision bf16"
cd /opt/scripts && \
CUDA_VISIBLE_DEVICES=0 accelerate launch --num_cpu_threads_per_process 1 \
  flux_train_network.py --pretrained_model_name_or_path "$MODELS/dev.safetensors" \
  --clip_l ${MODELS}/clip_l.safetensors --ae '$HOME/ae.safetensors' --t5xxl $WHERE/t5.safetensors \
  # --network_dim 64 \
  --output_dir "$OUT" --output_name my\ lora $SAVING "${EXTRA[@]}" \
  --network_dim 8 --enable_bucket 2>&1 | tee log.txt
echo done
"""
CMD = r"""@echo off
REM --network_dim 64
set MODEL=C:\models\sd35.safetensors
call venv\Scripts\activate.bat
accelerate launch "C:\scripts\sd3_train_network.py" ^
 --pretrained_model_name_or_path="%MODEL%" --output_dir "C:\out\" ^
 --logging_dir C:\logs\ --network_dim=8 --network_train_unet_only
pause
"""


def imported(folder: Path, text: str, name: str = "run.sh") -> Imported:
    return import_files([write(folder, name, text)], CATALOG, model=None, base=folder)


def test_variables_are_filled_in_and_other_commands_are_named(tmp_path: Path) -> None:
    result = imported(tmp_path, BASH)
    config = result.config
    assert config["model"]["path"] == "/data/models/dev.safetensors"
    assert config["model"]["text_encoders"]["clip_l"]["path"] == "/data/models/clip_l.safetensors"
    assert config["checkpoint"]["dir"] == "/data/out dir"
    assert config["checkpoint"]["name"] == "my lora"
    assert (config["checkpoint"]["every"], config["checkpoint"]["dtype"]) == ({"epochs": 2}, "bf16")
    assert (config["train"]["seed"], config["network"]["dropout"], config["network"]["rank"]) == (7, 0.25, 8)
    assert "buckets" not in config["data"]["sets"][0]
    beside = {each.option: each.status for each in result.rows if each.beside}
    assert beside == {
        "MODELS": "mapped", "OUT": "mapped", "EXTRA": "mapped", "SAVING": "mapped",
        "CUDA_VISIBLE_DEVICES": "not_applicable", "set -e": "not_applicable", "cd /opt/scripts": "not_applicable",
        "tee log.txt": "not_applicable", "echo done": "not_applicable",
    }  # fmt: skip
    assert result.options == 2 + 12
    assert result.exit_code == 0


def test_a_variable_that_is_set_nowhere_is_still_to_do(tmp_path: Path) -> None:
    result = imported(tmp_path, BASH)
    assert [text.partition(",")[0] for text in result.open if "holds" in text] == [
        "--ae holds $HOME", "--t5xxl holds $WHERE"]  # fmt: skip


def test_a_batch_file_ends_its_command_with_the_line(tmp_path: Path) -> None:
    result = imported(tmp_path, CMD, "run.bat")
    assert result.config["model"]["path"] == "C:\\models\\sd35.safetensors"
    assert result.config["checkpoint"]["dir"].startswith("C:\\out")
    assert result.config["log"]["dir"].startswith("C:\\logs")
    assert result.config["network"]["rank"] == 8
    assert "components" not in result.config["train"]
    assert row(result, "pause").note == "another command of the script"
    assert result.exit_code == 0


def test_options_on_lines_of_their_own_go_on_with_the_command(tmp_path: Path) -> None:
    text = "accelerate launch flux_train.py\n--learning_rate 1e-5\n--optimizer_args\n'weight_decay=0.5'\n--seed 3\n"
    result = imported(tmp_path, text)
    assert result.config["optimizer"]["weight_decay"] == 0.5
    assert result.config["train"]["seed"] == 3


def test_a_script_of_two_trainings_is_refused_and_other_python_is_not_mistaken(tmp_path: Path) -> None:
    train = "accelerate launch flux_train_network.py --seed 3"
    assert imported(tmp_path, f"python tools/prepare.py --seed 1\n{train}\n").config["train"]["seed"] == 3
    with pytest.raises(UsageError, match="two command lines"):
        imported(tmp_path, f"{train}\n{train}\n")


def test_a_switch_followed_by_other_words_is_not_read_as_off(tmp_path: Path) -> None:
    result = imported(tmp_path, "flux_train_network.py --enable_bucket yes please --seed 3")
    assert status(result, "enable_bucket") == "refused"
    assert result.exit_code == 3


def test_files_are_found_beside_the_script(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    write(tmp_path / "runs", "d.toml", '[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "a"\n')
    path = write(tmp_path / "runs", "run.sh", "flux_train_network.py --dataset_config C:\\configs\\d.toml")
    result = import_files([path], CATALOG, model=None, base=tmp_path)
    assert result.config["data"]["sets"][0]["resolution"] == 512


def test_secrets_are_not_in_the_report(tmp_path: Path) -> None:
    others = 'export MY_PASSWORD=hush\ncurl -H "Authorization: Bearer hush" x.org\ngit clone https://me:hush@x.org\n'
    text = f"{others}export WANDB_API_KEY=hush\nwandb login hush\nHF_TOKEN=hush accelerate launch flux_train.py"
    result = imported(tmp_path, f"{text} --wandb_api_key hush --huggingface_token=hush --seed 3\n")
    assert "hush" not in str(result.as_dict())
    assert result.config["train"]["seed"] == 3
