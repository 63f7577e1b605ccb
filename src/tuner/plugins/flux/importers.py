"""What kohya-ss/sd-scripts and bghira/SimpleTuner call the options of FLUX.1 and Chroma."""

from __future__ import annotations

from typing import Any

from tuner.core.config.foreign import (
    ForeignFamily,
    ForeignOption,
    Given,
    Refused,
    Settings,
    block_choice,
    encoder_options,
    ignored,
    option,
    outer_ranks,
    rank_rules,
    repositories,
    unbuilt,
)

from .names import CLASSES, EMBEDDERS


def _chroma(given: Given) -> bool:
    return given.get("model_type") == "chroma"


def _prediction(value: Any, given: Given) -> Settings:
    if value == "raw":
        return Settings({}, "the velocity itself, as here")
    return Settings(
        {},
        f"{value} changes the output there and keeps the target, so it trains another function; here it is the velocity"
        " itself (raw), which that program recommends; left out",
        changed=True,
    )


def _guidance(value: Any, given: Given) -> Settings | Refused:
    if _chroma(given):
        return Refused("not_applicable", "Chroma has no embedded guidance")
    note = "the embedded guidance is 3.5 there unless it is given, and 1 here"
    return Settings({"guidance.embedded": float(value)}, "" if "guidance_scale" in given else note)


def _sampling(value: Any, given: Given) -> Settings:
    return Settings({"noise.timesteps": value})


def _shift(value: Any, given: Given) -> Settings:
    used = given.get("timestep_sampling", "sigma") in ("sigma", "shift")
    return Settings({"noise.shift": float(value)} if used else {}, "" if used else "not used by this sampling")


def _train_blocks(value: Any, given: Given) -> Settings | Refused:
    groups = {"all": {}, "single": {"network.blocks.double": "none"}, "double": {"network.blocks.single": "none"}}
    if value not in groups:
        return Refused("not_applicable", "all, single or double")
    return Settings(groups[value])


_SHARED: tuple[ForeignOption, ...] = (
    option("model_type", kind="text", convert=lambda value, given: Settings(
        {"model.flavour": "chroma"} if value == "chroma" else {}, "the flavour is read from the weights")),
    option("clip_l", "model.text_encoders.clip_l.path", "text"),
    option("t5xxl", "model.text_encoders.t5.path", "text"),
    option("t5xxl_max_token_length", "text_encoder.max_tokens.t5", "int"),
    option("apply_t5_attn_mask", "text_encoder.mask_padding.t5", "flag", off=(None, False)),
    option("guidance_scale", kind="float", convert=_guidance, default=3.5),
    option("timestep_sampling", kind="text", convert=_sampling, default="sigma"),
    option("discrete_flow_shift", kind="float", convert=_shift, default=3.0),
    option("sigmoid_scale", "noise.sigmoid_scale", "float"),
    option("model_prediction_type", kind="text", convert=_prediction, default="sigma_scaled"),
    *ignored("min_timestep max_timestep", "it does nothing for this model there, although it is accepted"),
    option("controlnet_model_name_or_path", "network.controlnet.path", "text"),
)  # fmt: skip

_RANKS = {f"{name}_dim": name for name in CLASSES}


def _rotated(value: Any, given: Given) -> Settings | Refused:
    """Which linears an OFT rotates: those of attention in the double blocks, or all of the blocks."""
    if not str(given.get("network_module", "")).startswith("networks.oft"):
        return Refused("not_applicable", "only networks.oft_flux reads it")
    if value:
        return Settings({}, "all linears of the blocks, as here")
    note = "attention of the double blocks there, unless enable_all_linear is given"
    return Settings({"network.targets": ["img_attn", "txt_attn"]}, note)


_NETWORK: tuple[ForeignOption, ...] = (
    *encoder_options(("clip_l", "t5"), ("clip_l",), "t5"),
    *rank_rules(_RANKS),
    option("network_args.in_dims", kind="literal", convert=outer_ranks(tuple(EMBEDDERS))),
    option("network_args.train_blocks", kind="text", convert=_train_blocks),
    option("network_args.train_double_block_indices", kind="text", convert=block_choice("double")),
    option("network_args.train_single_block_indices", kind="text", convert=block_choice("single")),
    option("network_args.enable_all_linear", kind="flag", convert=_rotated, default=False),
    *unbuilt("network_args.network_reg_dims network_args.network_reg_lrs network_args.network_reg_alphas",
             "patterns on the names of sd-scripts files; write network.rules with the names of the modules here"),
)  # fmt: skip

_CONTROL: dict[str, Any] = {"network.type": "controlnet"}

_SD_SCRIPTS = (
    ForeignFamily(
        names=("flux_train_network.py",),
        modules=("networks.lora_flux", "networks.oft_flux"),
        options=(*_NETWORK, *_SHARED),
    ),
    ForeignFamily(names=("flux_train.py",), settings={"train.mode": "full"}, options=_SHARED),
    ForeignFamily(names=("flux_train_control_net.py",), settings=_CONTROL, options=(*_SHARED,)),
)


def _lora_target(value: Any, given: Given) -> Settings | Refused:
    if "controlnet" in str(value):
        return Refused("not_built", "control networks")
    return Settings({"network.preset": str(value)}, "which modules are adapted", changed=False)


def _guidance_mode(value: Any, given: Given) -> Settings:
    if value == "random-range":
        low, high = float(given.get("flux_guidance_min") or 0.0), float(given.get("flux_guidance_max") or 4.0)
        return Settings({"guidance.embedded": [low, high]})
    return Settings({"guidance.embedded": float(given.get("flux_guidance_value") or 1.0)})


_SIMPLETUNER_SHARED: tuple[ForeignOption, ...] = (
    option("flux_lora_target", kind="text", convert=_lora_target, default="all", needs=("model_type", ("lora", None))),
    option("pretrained_t5_model_name_or_path", "model.text_encoders.t5.path", "text"),
    option("flux_attention_masked_training", "text_encoder.mask_padding.t5", "flag", off=(None, False)),
    option("t5_padding", "text_encoder.zero_padding", "text", values={"zero": True}, off=(None, "unmodified")),
    option("flux_fast_schedule", "noise.timesteps", "flag", values={True: "list"}, off=(None, False)),
    option("tokenizer_max_length", "text_encoder.max_tokens.t5", "int"),
)  # fmt: skip

_SIMPLETUNER = (
    ForeignFamily(
        names=("flux",),
        options=(
            *repositories({
                "dev": "black-forest-labs/FLUX.1-dev",
                "krea": "black-forest-labs/FLUX.1-Krea-dev",
                "schnell": "black-forest-labs/FLUX.1-schnell"}, "dev",
                "older versions of that program take this model, newer ones FLUX.1-Krea-dev: say which"),
            option("flux_guidance_mode", kind="text", convert=_guidance_mode),
            option("flux_guidance_value", "guidance.embedded", "float", needs=("flux_guidance_mode",
                                                                              (None, "constant"))),
            option("flux_guidance_min", note="part of flux_guidance_mode"),
            option("flux_guidance_max", note="part of flux_guidance_mode"),
            option("validation_guidance", "sample.embedded_guidance", "float",
                   note="for this model it is the embedded guidance"),
            option("validation_guidance_real", "sample.cfg", "float"),
            option("text_encoder_1_precision", "quantize.text_encoder.clip_l", "text", off=(None, "", "no_change")),
            option("text_encoder_2_precision", "quantize.text_encoder.t5", "text", off=(None, "", "no_change")),
            *_SIMPLETUNER_SHARED,
        ),
    ),
    ForeignFamily(
        names=("chroma",),
        settings={"model.flavour": "chroma"},
        options=(
            *repositories({
                "base": "lodestones/Chroma1-Base",
                "hd": "lodestones/Chroma1-HD",
                "flash": "lodestones/Chroma1-Flash"}, "base"),
            option("validation_guidance", "sample.cfg", "float"),
            option("validation_guidance_real", "sample.cfg", "float"),
            option("text_encoder_1_precision", "quantize.text_encoder.t5", "text", off=(None, "", "no_change")),
            *_SIMPLETUNER_SHARED,
        ),
    ),
)  # fmt: skip

IMPORTERS = {"sd-scripts": _SD_SCRIPTS, "simpletuner": _SIMPLETUNER}
