"""Every option has a row, and every row of the tables leads to something that exists."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.importing.sources import CATALOG, LORA, backends, lora, row, status, words, write
from tuner.core.config.build import examine_config
from tuner.core.config.document import RawConfig
from tuner.core.config.foreign import ForeignOption
from tuner.core.config.messages import known_keys
from tuner.core.config.planned import NOT_APPLICABLE, PLANNED, unusable_keys
from tuner.core.config.run import RunConfig
from tuner.core.errors import UsageError
from tuner.core.importing.families import choices
from tuner.core.importing.sd_scripts import import_files
from tuner.core.importing.sd_scripts_options import GENERAL as SD_SCRIPTS
from tuner.core.importing.sd_scripts_options import LAUNCHER
from tuner.core.importing.simpletuner import import_path
from tuner.core.importing.simpletuner_options import GENERAL as SIMPLETUNER
from tuner.core.importing.write import config_text
from tuner.core.registry import MODELS, model_schema

FAMILIES = [(tool, each) for tool in ("sd-scripts", "simpletuner") for each in choices(CATALOG, tool)]
TABLES = [
    ("sd-scripts", RunConfig, SD_SCRIPTS),
    ("launcher", RunConfig, LAUNCHER),
    ("simpletuner", RunConfig, SIMPLETUNER),
    *((f"{tool}:{each.family.names[0]}", each.model, each.family.options) for tool, each in FAMILIES),
]


def exists(key: str, model: object) -> bool:
    """Whether a dotted key is one of the schema, or one that is known to be planned or without meaning."""
    path = tuple(part for part in key.removesuffix("[]").split("."))
    for length in range(1, len(path) + 1):
        if ".".join(path[:length]) in {**PLANNED, **NOT_APPLICABLE}:
            return True
    if path[0] == "model":
        schemas = [model_schema(CATALOG, entry.name) for entry in CATALOG.entries(MODELS)]
        return any(path[1] in schema.model_fields for schema in schemas)
    inside = known_keys(RunConfig, path[:-1])
    return path[-1] in inside or path[-2] in known_keys(RunConfig, path[:-2])  # the latter: a key of a mapping


@pytest.mark.parametrize(("name", "model", "options"), TABLES, ids=[each[0] for each in TABLES])
def test_every_key_of_a_table_is_known_here(name: str, model: object, options: tuple[ForeignOption, ...]) -> None:
    assert [each.key for each in options if each.key and not exists(each.key, model)] == []


@pytest.mark.parametrize(("name", "model", "options"), TABLES, ids=[each[0] for each in TABLES])
def test_an_option_without_a_key_says_why(name: str, model: object, options: tuple[ForeignOption, ...]) -> None:
    silent = [each.names[0] for each in options if not (each.key or each.convert or each.note or each.values)]
    assert silent == []


def test_no_option_of_a_table_is_hidden_by_another_spelling() -> None:
    for _, _, options in TABLES:
        names = [name for each in options for name in each.names]
        assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)


@pytest.mark.parametrize("family", LORA)
def test_a_command_line_becomes_a_configuration_that_passes_every_check(family: str) -> None:
    options = (
        "--network_dim 8 --learning_rate 1e-4 --max_train_epochs 3 --network_train_unet_only --mixed_precision bf16"
        " --output_dir out --dataset_config data.toml --network_module networks.lora_"
    )
    result = lora(family, options + family)
    assert result.exit_code == 0
    assert result.open == []
    _, problems = examine_config(RawConfig(result.config), model_schema(CATALOG, family))
    assert problems == []
    assert result.config["network"] == {"rank": 8, "alpha": 1.0}
    assert status(result, "network_dim") == "mapped"
    assert row(result, "network_alpha").status == "default"


def test_alpha_rank_and_length_have_the_defaults_of_the_other_program() -> None:
    result = lora("flux", "--network_train_unet_only")
    assert result.config["network"] == {"rank": 4, "alpha": 1.0}
    assert result.config["train"] == {"steps": 1600}
    assert result.config["optimizer"] == {"lr": 2e-6}
    assert result.config["precision"] == {"compute": "fp32"}
    assert result.config["guidance"] == {"embedded": 3.5}
    assert result.config["noise"] == {"timesteps": "sigma", "shift": 3.0}
    assert result.config["checkpoint"] == {"dir": "output", "format": "sd-scripts"}


def test_whole_models_lose_no_updates_where_they_lose_none_there() -> None:
    line = "accelerate launch anima_train.py --mixed_precision bf16 --learning_rate 1e-5 --output_dir out"
    result = words(line)
    assert result.config["optimizer"] == {"lr": 1e-5, "rounding": "kahan"}
    assert row(result, "full_bf16").status == "changed"
    assert words(f"{line} --full_bf16").config["optimizer"]["rounding"] == "stochastic"
    assert "rounding" not in words(f"{line} --mixed_precision no").config["optimizer"]
    free = words(f"{line} --optimizer_type AdamWScheduleFree")
    assert "rounding" not in free.config["optimizer"]
    assert "loses small updates" in row(free, "full_bf16").note


@pytest.mark.parametrize(
    ("option", "components", "rates"),
    [
        ("", ["denoiser", "llm_adapter"], None),
        ("--llm_adapter_lr 0", ["denoiser"], None),
        ("--llm_adapter_lr 2e-6", ["denoiser", "llm_adapter"], {"llm_adapter": 2e-6}),
    ],
)
def test_a_whole_model_trains_the_parts_that_it_trains_there(
    option: str, components: list[str], rates: dict[str, float] | None
) -> None:
    result = words(f"anima_train.py --learning_rate 1e-5 --max_train_steps 9 --output_dir out {option}")
    assert result.config["train"]["components"] == components
    assert result.config["optimizer"].get("lr_by_component") == rates


def test_rows_are_as_many_as_options_and_none_is_lost() -> None:
    given = ("--network_args train_double_block_indices=0-3 single_dim=4 in_dims=[4,0,0,0,4] no_such=1"
             " --optimizer_type AdamW --optimizer_args weight_decay=0.1 betas=0.9,0.99 --learning_rat 3"
             " --lowram --sdpa --sdpa --seed 7")  # fmt: skip
    result = lora("flux", given)
    assert result.options == 1 + 4 + 4 + 1 + 2 + 1 + 4
    assert status(result, "no_such") == "unknown"
    assert row(result, "learning_rat").note == "did you mean learning_rate?"
    assert result.exit_code == 3
    assert result.config["network"]["blocks"] == {"double": ["0-3"]}
    assert result.config["network"]["include"] == ["img_in", "txt_in"]
    assert result.config["network"]["rules"] == [
        {"match": "single", "rank": 4}, {"match": "img_in", "rank": 4}, {"match": "txt_in", "rank": 4}]  # fmt: skip
    assert result.config["optimizer"]["betas"] == [0.9, 0.99]


@pytest.mark.parametrize("family", LORA)
def test_text_encoders_train_where_they_train_there(family: str) -> None:
    trained = {"anima": ["qwen3"], "flux": ["clip_l"], "sd3": ["clip_l", "clip_g"]}[family]
    assert lora(family, "").config["train"]["components"] == ["denoiser", *trained]
    assert "components" not in lora(family, "--network_train_unet_only").config["train"]
    rates = lora(family, "--text_encoder_lr 1e-5").config["optimizer"]["lr_by_component"]
    assert rates == dict.fromkeys(trained, 1e-5)
    assert (
        status(lora(family, "--text_encoder_lr 1e-5 --network_train_unet_only"), "text_encoder_lr") == "not_applicable"
    )


@pytest.mark.parametrize(
    ("family", "options", "blocks"),
    [
        ("flux", "--blocks_to_swap 1", 2),
        ("flux", "--blocks_to_swap 16", 24),
        ("flux", "--blocks_to_swap 35", 53),
        ("flux", "--blocks_to_swap 36", None),
        ("flux", "--blocks_to_swap 0", None),
        ("flux", "--double_blocks_to_swap 6 --single_blocks_to_swap 8", 15),
        ("flux", "--split_mode", 27),
        ("anima", "--blocks_to_swap 14", 14),
        ("sd3", "--blocks_to_swap 1", None),
    ],
)
def test_swapped_blocks_are_counted_in_the_unit_of_the_other_program(
    family: str, options: str, blocks: int | None
) -> None:
    result = lora(family, f"--network_dim 8 --learning_rate 1e-4 --max_train_steps 3 --output_dir out {options}")
    assert result.config.get("memory", {}).get("swap_blocks") == blocks


def test_cached_captions_stop_the_encoder_only_where_they_do_there() -> None:
    assert "components" not in lora("anima", "--cache_text_encoder_outputs").config["train"]
    assert lora("flux", "--cache_text_encoder_outputs").config["train"]["components"] == ["denoiser", "clip_l"]


@pytest.mark.parametrize(
    ("option", "key"), [("--deepspeed", "distributed.deepspeed"), ("--control", "model.control_channels")]
)
def test_what_is_not_built_is_named_and_left_out(option: str, key: str, tmp_path: Path) -> None:
    if option == "--deepspeed":
        result = lora("flux", option)
    else:
        result = backends(tmp_path, {"id": "a", "instance_data_dir": "a"}, control=True)
    assert status(result, option.lstrip("-")) == "not_built"
    assert key.split(".")[0] not in result.config or key.split(".")[1] not in result.config[key.split(".")[0]]
    assert result.exit_code == 3
    assert "// Not taken over:" in config_text(result)


def test_a_switch_that_is_off_asks_for_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, "run.toml", 'network_module = "networks.lora_flux"\ndeepspeed = false\nlowram = false\n')
    result = import_files([path], CATALOG, model=None, base=tmp_path)
    assert {status(result, "deepspeed"), status(result, "lowram")} == {"mapped"}
    assert result.exit_code == 0


def test_a_config_file_gives_way_to_the_command_line(tmp_path: Path) -> None:
    write(tmp_path, "run.toml", "[training]\nlearning_rate = 1e-3\nseed = 4\nnetwork_args = ['rank_dropout=0.1']\n")
    result = words(f"{LORA['flux']} --config_file run --learning_rate 1e-4", tmp_path)
    assert result.config["optimizer"]["lr"] == 1e-4
    assert result.config["train"]["seed"] == 4
    assert result.config["network"]["rank_dropout"] == 0.1
    assert [each.where for each in result.rows if each.option == "training.learning_rate"] == ["run.toml:2"]


@pytest.mark.parametrize("end", ["\\", "^", "`"])
def test_continued_lines_quotes_and_paths_of_windows_are_read(end: str, tmp_path: Path) -> None:
    text = (
        f"# my run\naccelerate launch --num_cpu_threads_per_process 1 --mixed_precision bf16 {end}\n"
        f'  flux_train_network.py --pretrained_model_name_or_path="C:\\models\\my flux.safetensors" {end}\n'
        f"  --output_dir 'D:\\out' --optimizer_args \"betas=(0.9, 0.95)\" {end}\n  --network_train_unet_only\n"
    )
    result = import_files([write(tmp_path, "run.bat", text)], CATALOG, model=None, base=tmp_path)
    assert result.config["model"]["path"] == "C:\\models\\my flux.safetensors"
    assert result.config["checkpoint"]["dir"] == "D:\\out"
    assert result.config["optimizer"]["betas"] == [0.9, 0.95]
    assert result.config["precision"] == {"compute": "fp32"}  # sd-scripts hands on its own, which is not given
    assert row(result, "output_dir").where == "run.bat:4"
    assert result.options == 7


def test_legacy_folders_give_repeats_and_class_tokens(tmp_path: Path) -> None:
    for name in ("img/10_sks dog", "img/2_sks cat", "img/notes", "reg/1_dog"):
        (tmp_path / name).mkdir(parents=True)
    result = words(f"{LORA['flux']} --train_data_dir img --reg_data_dir reg --resolution 768,768", tmp_path)
    (entry,) = result.config["data"]["sets"]
    assert entry["resolution"] == 768
    found = [(each["path"], each.get("repeats", 1), each.get("role"), each["captions"]["fallback"])
             for each in entry["sources"]]  # fmt: skip
    assert found == [
        ("img/10_sks dog", 10, None, "sks dog"),
        ("img/2_sks cat", 2, None, "sks cat"),
        ("reg/1_dog", 1, "regularisation", "dog"),
    ]
    assert {each["captions"]["extension"] for each in entry["sources"]} == {".caption"}


def test_captions_that_are_drawn_are_not_cached_unless_asked(tmp_path: Path) -> None:
    write(tmp_path, "d.toml", '[general]\nshuffle_caption = true\n[[datasets]]\nresolution = 512\n'
                              '[[datasets.subsets]]\nimage_dir = "a"\n')  # fmt: skip
    result = words(f"{LORA['flux']} --dataset_config d.toml", tmp_path)
    assert result.config["cache"] == {"text": "off"}


def test_a_prompt_file_is_named_with_the_change_of_its_flags(tmp_path: Path) -> None:
    write(tmp_path, "prompts.txt", "a cat --l 4 --ss euler_a\n")
    result = words(f"{LORA['flux']} --sample_prompts prompts.txt --sample_every_n_steps 50", tmp_path)
    assert status(result, "sample_prompts") == "changed"
    assert "30 July 2025" in row(result, "sample_prompts").note
    assert "cannot use --ss" in row(result, "sample_prompts").note
    write(tmp_path, "prompts.txt", "a cat --l 4 --ss euler\n")
    result = words(f"{LORA['flux']} --sample_prompts prompts.txt --sample_every_n_steps 50", tmp_path)
    assert "cannot use" not in row(result, "sample_prompts").note


def test_what_has_no_effect_there_has_none_here() -> None:
    result = lora("flux", "--min_snr_gamma 5 --noise_offset 0.05 --min_timestep 100 --huber_c 0.2")
    for name in ("min_snr_gamma", "noise_offset", "min_timestep", "huber_c"):
        assert status(result, name) == "not_applicable"
    assert "loss" not in result.config
    assert lora("sd3", "--min_timestep 100").config["noise"]["min_timestep"] == 100


def test_every_script_of_the_plugins_is_known() -> None:
    names = [name for tool, each in FAMILIES if tool == "sd-scripts" for name in each.family.names]
    for name in names:
        result = words(f"{name} --output_dir out --max_train_epochs 1")
        assert result.config["model"]["family"] == name.partition("_")[0]
        assert not [each for each in result.rows if each.status in ("unknown", "refused")]


def test_a_source_without_a_model_needs_one() -> None:
    with pytest.raises(UsageError, match="which model"):
        words("train_network.py --output_dir out")


# --- SimpleTuner ------------------------------------------------------------------------------------------------------


def test_defaults_of_simpletuner_that_differ_are_written_out(tmp_path: Path) -> None:
    run = {"model_family": "flux", "model_type": "lora", "max_train_steps": 10, "num_train_epochs": 0}
    write(tmp_path, "config.json", run)
    result = import_path(tmp_path, CATALOG, model=None, base=tmp_path)
    config = result.config
    assert config["train"]["clip_grad"] == {"value": 2.0}
    assert config["train"]["batch_size"] == 4
    assert config["network"] == {"preset": "all", "dropout": 0.1}
    assert config["noise"] == {"timesteps": "shift", "shift": 3.0}
    assert config["memory"] == {"checkpointing": "block"}
    assert config["optimizer"]["lr"] == 4e-7
    assert config["data"]["sets"][0]["sources"][0]["captions"]["dropout"] == 0.1
    assert config["precision"] == {"vae": "bf16"}
    assert config["checkpoint"]["resume"] == "auto"
    assert "sample" not in config
    assert result.options == 4


@pytest.mark.parametrize(
    ("family", "flavour", "repository"),
    [
        ("flux", "krea", "black-forest-labs/FLUX.1-Krea-dev"),
        ("flux", "schnell", "black-forest-labs/FLUX.1-schnell"),
        ("chroma", "hd", "lodestones/Chroma1-HD"),
        ("sd3", "large", "stabilityai/stable-diffusion-3.5-large"),
    ],
)
def test_a_flavour_of_simpletuner_chooses_the_repository(family, flavour, repository, tmp_path: Path) -> None:
    result = backends(tmp_path, {"id": "a", "instance_data_dir": "a"}, model_family=family, model_flavour=flavour)
    assert result.config["model"]["path"] == repository
    assert status(result, "model_flavour") == "mapped"


def test_a_flavour_of_simpletuner_that_is_not_known_leads_to_no_other_weights(tmp_path: Path) -> None:
    folder = {"id": "a", "instance_data_dir": "a"}
    result = backends(tmp_path, folder, model_family="flux", model_flavour="kontext")
    assert "path" not in result.config["model"]
    assert status(result, "model_flavour") == "not_applicable"
    named = {"model_flavour": "kontext", "pretrained_model_name_or_path": "some/weights"}
    result = backends(tmp_path, folder, model_family="flux", **named)
    assert result.config["model"]["path"] == "some/weights"


def test_schedules_of_simpletuner_are_explained(tmp_path: Path) -> None:
    result = backends(tmp_path, {"id": "a", "instance_data_dir": "a"}, lr_scheduler="cosine", lr_warmup_steps=50)
    assert result.config["schedule"] == {"name": "cosine", "warmup": 50}
    assert status(result, "lr_scheduler") == "changed"
    assert "sawtooth" in row(result, "lr_scheduler").note
    result = backends(tmp_path, {"id": "a", "instance_data_dir": "a"}, lr_scheduler="sine", lr_warmup_steps=50)
    assert result.config["schedule"] == {"name": "sine", "period": 50, "end_lr": 4e-7}


def test_an_environment_file_is_read_with_its_own_names(tmp_path: Path) -> None:
    text = (
        "# SimpleTuner\nexport MODEL_FAMILY='sd3'\nexport OUTPUT=runs\nexport OUTPUT_DIR=\"${OUTPUT}/one\"\n"
        "MAX_NUM_STEPS=200\nNUM_EPOCHS=0\nLR_SCHEDULE=constant\nMODEL_TYPE=lora\nVALIDATION_PROMPT='a cat'\nWHAT=1\n"
        'TRAINER_EXTRA_ARGS="--lora_rank=8 --lora_alpha 8"\n'
    )
    result = import_path(write(tmp_path, "config.env", text), CATALOG, model=None, base=tmp_path)
    assert result.config["checkpoint"]["dir"] == "runs/one"
    assert result.config["train"]["steps"] == 200
    assert result.config["network"]["rank"] == 8
    assert result.config["sample"]["prompts"] == ["a cat"]
    assert (status(result, "OUTPUT"), status(result, "WHAT")) == ("mapped", "unknown")
    assert result.options == 10


def test_options_for_data_backends_that_are_not_there_are_not_said_to_be_mapped(tmp_path: Path) -> None:
    write(tmp_path, "config.json", {"model_family": "sd3", "resolution": 512, "data_backend_config": "none.json"})
    result = import_path(tmp_path, CATALOG, model=None, base=tmp_path)
    assert status(result, "resolution") == "missing"


def test_a_table_of_options_may_be_called_general(tmp_path: Path) -> None:
    path = write(tmp_path, "run.toml", "[general]\nlearning_rate = 1e-3\nshuffle_caption = true\n")
    result = import_files([path], CATALOG, model="flux", base=tmp_path)
    assert result.config["optimizer"]["lr"] == 1e-3


def test_a_toml_file_of_simpletuner_is_read(tmp_path: Path) -> None:
    write(tmp_path, "config.toml", 'model_family = "sd3"\nmodel_type = "lora"\nlora_rank = 4\n')
    result = import_path(tmp_path, CATALOG, model=None, base=tmp_path)
    assert result.config["network"]["rank"] == 4


def test_a_prompt_library_becomes_prompt_lines(tmp_path: Path) -> None:
    write(tmp_path, "library.json", {"one": "a cat", "two": "a dog"})
    keys = {"user_prompt_library": "elsewhere/library.json", "validation_prompt": "a bird", "validation_steps": 10}
    result = backends(tmp_path, {"id": "a", "instance_data_dir": "a"}, **keys)
    assert result.config["sample"]["prompts"] == ["a bird", "a cat", "a dog"]


def test_an_adapter_for_pictures_is_taken_over_with_its_strength(tmp_path: Path) -> None:
    source = {"id": "a", "instance_data_dir": "a"}
    keys = {"validation_prompt": "a bird", "validation_steps": 10, "validation_adapter_path": "style.safetensors"}
    result = backends(tmp_path, source, **keys, validation_adapter_strength=0.5, validation_guidance_rescale=0.7)
    assert result.config["sample"]["adapters"] == [{"path": "style.safetensors", "strength": 0.5}]
    assert result.config["sample"]["cfg_rescale"] == 0.7
    assert status(result, "validation_adapter_path") == "changed"
    result = backends(tmp_path, source, **{**keys, "validation_adapter_path": "someone/style"})
    assert status(result, "validation_adapter_path") == "not_built"


def test_every_model_of_simpletuner_that_a_plugin_knows_imports(tmp_path: Path) -> None:
    for name in [name for tool, each in FAMILIES if tool == "simpletuner" for name in each.family.names]:
        result = backends(tmp_path, {"id": "a", "instance_data_dir": "a"}, model_family=name)
        _, problems = examine_config(RawConfig(result.config), model_schema(CATALOG, result.config["model"]["family"]))
        assert problems == []
        assert list(unusable_keys(RawConfig(result.config))) == []
