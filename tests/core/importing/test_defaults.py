"""What other programs do when an option is absent, and which option counts when several say the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.importing.sources import CATALOG, backends, lora, row, status, words
from tuner.core.importing.sd_scripts import import_files

SOURCE = {"id": "a", "instance_data_dir": "a"}


def test_no_blocks_is_not_all_blocks() -> None:
    result = lora("flux", "--network_args train_single_block_indices=none train_double_block_indices=all")
    assert result.config["network"]["blocks"] == {"single": "none"}


def test_every_part_that_is_asked_for_trains() -> None:
    both = "--network_args train_llm_adapter=True"
    assert lora("anima", both).config["train"]["components"] == ["denoiser", "llm_adapter", "qwen3"]
    alone = lora("anima", f"{both} --network_train_unet_only")
    assert alone.config["train"]["components"] == ["denoiser", "llm_adapter"]
    assert lora("flux", "--network_train_text_encoder_only").config["train"]["components"] == ["clip_l"]
    t5 = lora("flux", "--network_args train_t5xxl=True")
    assert t5.config["train"]["components"] == ["denoiser", "clip_l", "t5"]


def test_a_weighting_scheme_is_what_it_is_there_for_each_model() -> None:
    result = lora("flux", "--weighting_scheme logit_normal --logit_mean 0.5")
    assert result.config["noise"] == {"timesteps": "sigma", "shift": 3.0, "density": "logit_normal", "logit_mean": 0.5}
    raw = lora("flux", "--weighting_scheme sigma_sqrt --model_prediction_type raw")
    assert status(raw, "weighting_scheme") == "not_applicable"
    assert "loss" not in raw.config
    assert lora("anima", "--weighting_scheme sigma_sqrt").config["loss"] == {"weighting": "sigma_sqrt"}
    assert status(lora("anima", "--weighting_scheme mode"), "weighting_scheme") == "not_applicable"


def test_the_additive_prediction_is_built() -> None:
    result = lora("flux", "--model_prediction_type additive")
    assert result.config["loss"] == {"prediction": "additive"}


def test_a_default_that_is_not_taken_over_is_no_default_written_out() -> None:
    result = lora("flux", "")
    assert row(result, "model_prediction_type").status == "changed"
    assert result.options == 5


def test_previews_have_the_sizes_of_the_other_program() -> None:
    wanted = {"anima": (512, 30, 7.5), "flux": (512, 20, 1.0), "sd3": (512, 30, 7.5)}
    for family, (size, steps, cfg) in wanted.items():
        sample = lora(family, "--sample_prompts p.txt --sample_every_n_steps 9").config["sample"]
        assert (sample["size"], sample["steps"], sample["cfg"]) == (size, steps, cfg)
        assert "sample" not in lora(family, "").config


def test_previews_of_simpletuner_have_its_sizes_where_there_are_prompts(tmp_path: Path) -> None:
    sample = backends(tmp_path, SOURCE, validation_prompt="a cat").config["sample"]
    assert (sample["size"], sample["steps"], sample["cfg"], sample["every"]) == (256, 30, 7.5, {"steps": 100})
    assert sample["negative"] == "blurry, cropped, ugly"
    assert "sample" not in backends(tmp_path, SOURCE).config
    given = backends(tmp_path, SOURCE, validation_prompt="a cat", validation_steps=7, validation_guidance=2)
    assert (given.config["sample"]["every"], given.config["sample"]["cfg"]) == ({"steps": 7}, 2.0)


def test_the_schedule_of_huber_is_written_where_huber_counts(tmp_path: Path) -> None:
    assert lora("flux", "--loss_type huber").config["loss"] == {"type": "huber", "huber_schedule": "snr"}
    assert backends(tmp_path, SOURCE, loss_type="huber").config["loss"]["huber_schedule"] == "snr"
    assert "loss" not in lora("flux", "--loss_type l2").config


@pytest.mark.parametrize(
    ("options", "noise"),
    [
        ("--timestep_sample_method logit_normal", {"timesteps": "shift", "shift": 3.0}),
        ("--timestep_sample_method uniform --discrete_flow_shift 2", {"timesteps": "uniform", "shift": 2.0}),
        ("--qwen3_path q", {"timesteps": "shift", "shift": 3.0}),
        ("--qwen3_path q --sigmoid_scale 1.5", {"timesteps": "shift", "shift": 3.0, "sigmoid_scale": 1.5}),
        ("--timestep_sampling shift --discrete_flow_shift 2", {"timesteps": "shift", "shift": 2.0}),
    ],
)
def test_the_first_version_of_a_script_keeps_its_own_defaults(options: str, noise: dict[str, object]) -> None:
    result = words(f"anima_train_network.py --vae v.safetensors {options}")
    assert result.config["noise"] == noise
    assert ("include" in result.config["network"]) == ("timestep_sampling" not in options)


def test_the_way_of_attention_that_wins_there_wins() -> None:
    result = lora("anima", "--mixed_precision bf16 --attn_mode flash --xformers --sdpa")
    assert result.config["attention"] == {"backend": "flash"}
    assert row(result, "xformers").note == "attn_mode wins there"
    assert lora("flux", "--mixed_precision bf16 --xformers --sdpa").config["attention"] == {"backend": "xformers"}


def test_weight_files_are_never_places_on_the_hub() -> None:
    result = words("flux_train_network.py --pretrained_model_name_or_path models/flux/dev.safetensors --ae a/b")
    assert result.config["model"]["path"] == "./models/flux/dev.safetensors"
    assert result.config["model"]["vae"]["path"] == "a/b"


def test_whole_models_train_unless_an_adapter_is_asked_for(tmp_path: Path) -> None:
    result = backends(tmp_path, SOURCE, model_type="full", lora_rank=8)
    assert result.config["train"]["mode"] == "full"
    assert "network" not in result.config
    assert result.config["optimizer"]["rounding"] == "stochastic"
    assert "rounding" not in backends(tmp_path, SOURCE).config["optimizer"]


def test_adapters_of_simpletuner_reach_what_they_reach_there(tmp_path: Path) -> None:
    presets = {"anima": "attention", "flux": "all", "sd3": "x_attn"}
    for family, preset in presets.items():
        assert backends(tmp_path, SOURCE, model_family=family).config["network"]["preset"] == preset


def test_levels_from_a_list_are_named_and_left_out(tmp_path: Path) -> None:
    result = backends(tmp_path, SOURCE, model_family="flux", flux_fast_schedule=True)
    assert status(result, "flux_fast_schedule") == "not_built"
    assert result.exit_code == 3


def test_encoders_are_quantized_as_the_denoiser_is(tmp_path: Path) -> None:
    result = backends(tmp_path, SOURCE, model_family="flux", text_encoder_2_precision="int8-quanto")
    assert result.config["quantize"]["text_encoder"] == {"t5": "int8"}


def test_optimizer_settings_that_have_keys_get_them(tmp_path: Path) -> None:
    given = "weight_decay=0.02, eps=1e-6,beta1=0.8,decouple=True"
    config = backends(tmp_path, SOURCE, optimizer_config=given, optimizer="prodigy").config["optimizer"]
    assert (config["weight_decay"], config["eps"], config["betas"]) == (0.02, 1e-6, [0.8, 0.999])
    assert config["args"] == {"decouple": True}


def test_empty_lists_of_a_file_ask_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("text_encoder_lr = []\nnetwork_args = []\nmax_train_steps = 9\n")
    result = import_files([tmp_path / "run.toml"], CATALOG, model="flux", base=tmp_path)
    assert "lr_by_component" not in result.config["optimizer"]
    assert result.exit_code == 0


def test_masks_are_joined_with_their_images_or_said_to_be_unused(tmp_path: Path) -> None:
    mask = {"id": "m", "dataset_type": "conditioning", "conditioning_type": "mask", "instance_data_dir": "masks"}
    joined = backends(tmp_path, SOURCE, mask | {"source_dataset_id": "a"})
    assert joined.config["data"]["sets"][0]["sources"][0]["mask"] == {"path": "masks"}
    assert joined.exit_code == 0
    alone = backends(tmp_path, SOURCE, mask)
    assert row(alone, "[m] instance_data_dir").status == "not_applicable"
    assert "mask" not in alone.config["data"]["sets"][0]["sources"][0]


def test_adapters_merged_into_the_base_keep_their_strengths() -> None:
    result = lora("flux", "--base_weights a.safetensors b.safetensors --base_weights_multiplier 0.5")
    merge = [{"path": "a.safetensors", "strength": 0.5}, {"path": "b.safetensors", "strength": 1.0}]
    assert result.config["model"]["merge"] == merge
    assert result.exit_code == 0


def test_updates_in_the_backward_pass_have_no_limit_on_the_norm() -> None:
    fused = "--optimizer_type adafactor --fused_backward_pass"
    result = lora("flux", fused)
    assert (result.config["optimizer"]["fuse"], result.config["train"]["clip_grad"]) == ("parameter", None)
    assert row(result, "max_grad_norm").where == "default"
    assert status(lora("flux", f"{fused} --max_grad_norm 0.5"), "max_grad_norm") == "changed"
    assert "clip_grad" not in lora("flux", "").config["train"]


def test_files_have_the_layout_of_their_kind() -> None:
    every = lora("flux", "--network_module networks.oft_flux --network_args enable_all_linear=True")
    assert every.config["checkpoint"]["format"] == "sd-scripts-oft"
    products = lora("anima", "--network_module networks.loha --network_dim 8")
    assert products.config["network"] == {"type": "loha", "rank": 8, "alpha": 1.0}
    assert "format" not in products.config["checkpoint"]


def test_a_scheduler_class_gets_its_arguments() -> None:
    options = "--lr_scheduler_type torch.optim.lr_scheduler.CosineAnnealingLR --lr_scheduler_args T_max=10 eta_min=1e-6"
    schedule = lora("flux", options).config["schedule"]
    assert schedule["class"] == "torch.optim.lr_scheduler.CosineAnnealingLR"
    assert schedule["args"] == {"T_max": 10, "eta_min": 1e-6}


def test_a_model_without_an_encoder_does_not_train_it() -> None:
    assert "components" not in lora("flux", "--model_type chroma").config["train"]


def test_a_value_that_cannot_be_read_is_a_row_and_no_crash(tmp_path: Path) -> None:
    result = lora(
        "flux", "--lr_warmup_steps soon --text_encoder_lr fast --network_args train_double_block_indices=a-b,c"
    )
    assert {status(result, name) for name in ("lr_warmup_steps", "text_encoder_lr", "block_indices")} == {"refused"}
    assert result.exit_code == 3


def test_kernels_of_simpletuner_have_their_names_here(tmp_path: Path) -> None:
    def kernels(name: str) -> dict[str, str]:
        return backends(tmp_path, SOURCE, attention_mechanism=name, validation_prompt="a cat").config["attention"]

    assert kernels("flash-attn-3") == {"backend": "flash3"}
    assert kernels("native-math") == {"backend": "math"}
    assert kernels("sageattention") == {"sample_backend": "sage"}
    assert status(backends(tmp_path, SOURCE, attention_mechanism="flex"), "attention_mechanism") == "not_built"
    compiled = backends(tmp_path, SOURCE, dynamo_backend="inductor").config["compile"]
    assert compiled == {"enabled": True}


def test_text_encoders_that_are_not_named_make_the_import_incomplete(tmp_path: Path) -> None:
    result = backends(tmp_path, SOURCE, train_text_encoder=True, text_encoder_lr=1e-5)
    assert status(result, "train_text_encoder") == "not_built"
    assert status(result, "text_encoder_lr") == "not_applicable"


def test_whole_text_encoders_train_in_any_order_of_the_options() -> None:
    line = "sd3_train.py --train_t5xxl --train_text_encoder --learning_rate_te1 1e-5 --learning_rate_te3 1e-6"
    config = words(line).config
    assert config["train"]["components"] == ["denoiser", "clip_l", "clip_g", "t5"]
    assert config["optimizer"]["lr_by_component"] == {"clip_l": 1e-5, "t5": 1e-6}
    alone = words("sd3_train.py --train_t5xxl --learning_rate_te1 1e-5")
    assert "components" not in alone.config["train"]
    assert status(alone, "learning_rate_te1") == "not_applicable"


def test_a_shift_that_the_default_does_not_use_is_said_to_be_unused() -> None:
    result = lora("anima", "--discrete_flow_shift 3 --logit_mean 1")
    assert result.config["noise"] == {"timesteps": "sigmoid"}
    assert status(result, "discrete_flow_shift") == status(result, "logit_mean") == "not_applicable"


def test_of_an_option_that_is_given_twice_the_last_counts() -> None:
    result = lora("flux", "--network_args rank_dropout=0.1 --train_batch_size 2 --train_batch_size 4"
                          " --network_args module_dropout=0.2")  # fmt: skip
    assert result.config["network"].get("module_dropout") == 0.2
    assert "rank_dropout" not in result.config["network"]
    assert [each.note for each in result.rows if each.name == "network_args"] == ["given again in word 16, which wins"]
    first = next(each for each in result.rows if each.name == "train_batch_size")
    assert first.note == "given again in word 14, which wins"
