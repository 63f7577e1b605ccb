"""Adapters of LyCORIS come over with their kind and their settings, and what cannot is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.core.importing.sources import backends, lora, row, status, write
from tests.fixtures.runs import run_document
from tests.fixtures.tiny_anima import make_tiny_anima
from tests.fixtures.tiny_flux import make_tiny_flux
from tests.fixtures.tiny_sd3 import make_tiny_sd3
from tuner.core.adapters.lora import adaptable_modules
from tuner.core.adapters.targets import select_targets
from tuner.core.importing.report import Imported
from tuner.core.registry import open_run

LOKR = {
    "algo": "lokr", "multiplier": 1.0, "linear_dim": 10000, "linear_alpha": 1, "factor": 16,
    "apply_preset": {
        "target_module": ["Attention", "FeedForward"],
        "module_algo_map": {"Attention": {"factor": 16}, "FeedForward": {"factor": 8}},
    },
}  # fmt: skip
ATTENTION, MLP = r".*attn\d?\..*", r".*\.(ff|ff_context|mlp)\..*"
ONE = {"id": "a", "instance_data_dir": "a"}


def simpletuner(folder: Path, described: dict[str, Any] | None, **options: Any) -> Imported:
    if described is not None:
        write(folder, "lycoris.json", described)
    return backends(folder, ONE, lora_type="lycoris", lycoris_config="config/lycoris.json", **options)


def test_a_lokr_of_whole_matrices_keeps_its_factors_modules_and_start(tmp_path: Path) -> None:
    result = simpletuner(tmp_path, LOKR, init_lokr_norm=1e-3, lora_rank=64, lora_alpha=64)
    assert result.config["network"] == {
        "type": "lokr", "full_matrix": True, "factor": 16, "init_norm": 1e-3, "targets": [ATTENTION, MLP],
        "rules": [{"match": MLP, "factor": 8}],
    }  # fmt: skip
    assert status(result, "lora_rank") == "mapped" and "lycoris_config decides" in row(result, "lora_rank").note
    assert row(result, "lycoris apply_preset").status == "changed"
    assert "format" not in result.config["checkpoint"]
    assert result.exit_code == 0


def test_a_rank_that_is_one_stays_with_its_alpha(tmp_path: Path) -> None:
    result = simpletuner(tmp_path, {"algo": "loha", "linear_dim": 32, "linear_alpha": 4, "dropout": 0.0})
    assert result.config["network"] == {"type": "loha", "rank": 32, "alpha": 4.0}
    bare = simpletuner(tmp_path, {})
    assert bare.config["network"] == {"rank": 4, "alpha": 1.0}


@pytest.mark.parametrize(
    ("described", "option"),
    [
        ({"algo": "glora"}, "lycoris algo"),
        ({"algo": "lokr", "weight_decompose": True}, "lycoris algo"),
        ({"algo": "lokr", "use_scalar": True}, "lycoris use_scalar"),
        ({"algo": "lokr", "apply_preset": {"target_module": ["Timesteps"]}}, "lycoris apply_preset"),
        ({"algo": "lokr", "apply_preset": {"name_algo_map": {"a.*": {"factor": 4}}}}, "lycoris apply_preset"),
    ],
)
def test_what_there_is_nothing_for_is_named(described: dict[str, Any], option: str, tmp_path: Path) -> None:
    result = simpletuner(tmp_path, described)
    assert row(result, option).status == "not_built"
    assert result.exit_code == 3


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = simpletuner(tmp_path, None)
    assert row(result, "lycoris_config").status == "missing"
    assert "set network.type" in row(result, "lycoris_config").note


@pytest.mark.parametrize(
    ("options", "network"),
    [
        ("--network_dim 8 --network_alpha 4", {"rank": 8, "alpha": 4.0}),
        ("--network_args algo=lokr factor=8 --network_dim 100000", {"type": "lokr", "factor": 8, "full_matrix": True}),
        ("--network_args algo=loha preset=attn-only",
         {"type": "loha", "rank": 4, "alpha": 1.0, "targets": [ATTENTION]}),
        ("--network_args dora_wd=True", {"type": "dora", "rank": 4, "alpha": 1.0}),
        ("--network_args algo=diag-oft constraint=1e-3 --network_dim 8",
         {"type": "oft", "block_size": 8, "constraint": 1e-3}),
        ("--network_args algo=boft --network_dim 8", {"type": "boft", "block_size": 8}),
        ("--network_args algo=ia3", {"type": "ia3"}),
        ("--network_args algo=full train_norm=True", {"type": "full", "train_norms": True}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("family", ["anima", "flux", "sd3"])
def test_a_command_line_keeps_kind_and_settings(family: str, options: str, network: dict[str, Any]) -> None:
    result = lora(family, f"--network_train_unet_only --network_module lycoris.kohya {options}")
    assert result.config["network"] == network
    assert result.exit_code == 0


def test_arguments_of_lycoris_do_nothing_elsewhere() -> None:
    assert status(lora("flux", "--network_args factor=8"), "factor") == "not_applicable"
    assert status(lora("flux", "--network_args enable_all_linear=True"), "enable_all_linear") == "not_applicable"
    assert status(lora("flux", "--network_module lycoris.kohya --network_args preset=x.toml"), "preset") == "not_built"


@pytest.mark.parametrize("family", ["anima", "flux", "sd3"])
def test_modules_that_are_chosen_by_class_exist_in_every_model(family: str, tmp_path: Path) -> None:
    make = {"anima": make_tiny_anima, "flux": make_tiny_flux, "sd3": make_tiny_sd3}[family]
    model = {"family": family, **make(tmp_path)}
    preset = lora(family, "--network_train_unet_only --network_module lycoris.kohya --network_args preset=attn-mlp")
    document = run_document(model, tmp_path, cache=tmp_path, out=tmp_path / "out", steps=1)
    run = open_run(document | {"network": preset.config["network"]})
    denoiser = run.model.load_models(["denoiser"]).denoiser
    assert denoiser is not None
    found = select_targets({"denoiser": tuple(adaptable_modules(denoiser))}, run.config.network, run.facts)
    names = {path for target in found for path in target.paths}
    assert any("attn" in name for name in names) and any("attn" not in name for name in names)
