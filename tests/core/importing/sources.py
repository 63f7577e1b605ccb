"""Sources of other trainers that tests write themselves, and how they import them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tuner.core.importing.report import Imported
from tuner.core.importing.sd_scripts import import_files, import_words
from tuner.core.importing.simpletuner import import_path
from tuner.core.registry import Catalog

CATALOG = Catalog()
LORA = {
    "anima": "anima_train_network.py --pretrained_model_name_or_path dit.safetensors --qwen3 qwen3"
    " --vae vae.safetensors",
    "flux": "flux_train_network.py --pretrained_model_name_or_path dev.safetensors --clip_l clip_l.safetensors"
    " --t5xxl t5.safetensors --ae ae.safetensors",
    "sd3": "sd3_train_network.py --pretrained_model_name_or_path sd35.safetensors",
}
"""Commands of the three LoRA scripts, to add options to."""


def words(text: str, folder: Path = Path("/nowhere")) -> Imported:
    """Import a command line; nothing that it names exists."""
    return import_words(text.split(), CATALOG, model=None, base=folder)


def lora(family: str, options: str) -> Imported:
    return words(f"{LORA[family]} {options}")


def write(folder: Path, name: str, text: str | dict | list) -> Path:
    path = folder / name
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return path


def dataset(folder: Path, toml: str) -> Imported:
    """Import a data set file of sd-scripts."""
    return import_files([write(folder, "data.toml", toml)], CATALOG, model=None, base=folder)


def backends(folder: Path, *entries: dict[str, Any], **options: Any) -> Imported:
    """Import a configuration of SimpleTuner with these data backends."""
    write(folder, "backends.json", list(entries))
    run = {"model_family": "anima", "model_type": "lora", "data_backend_config": "backends.json", "max_train_steps": 5,
           "num_train_epochs": 0, "caption_dropout_probability": 0} | options  # fmt: skip
    write(folder, "config.json", run)
    return import_path(folder, CATALOG, model=None, base=folder)


def status(result: Imported, option: str) -> str:
    """The status of the row of an option, by the end of its name."""
    found = [row.status for row in result.rows if row.option.lstrip("-").endswith(option) and row.where != "default"]
    assert len(found) == 1, (option, found)
    return found[0]


def row(result: Imported, option: str) -> Any:
    return next(each for each in result.rows if each.option.lstrip("-").endswith(option))
