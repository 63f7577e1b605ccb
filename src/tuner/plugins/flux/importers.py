"""What kohya-ss/sd-scripts and bghira/SimpleTuner call the options of FLUX.1 and Chroma."""

from __future__ import annotations

from typing import Any

from tuner.core.config.foreign import (
    PREVIEWS,
    ForeignFamily,
    ForeignOption,
    Given,
    Refused,
    Settings,
    block_choice,
    encoder_options,
    ignored,
    low_bits,
    option,
    outer_ranks,
    preview_options,
    rank_rules,
    repositories,
    rotates,
    unbuilt,
)

from .names import CLASSES, EMBEDDERS


def _chroma(given: Given) -> bool:
    return given.get("model_type") == "chroma"


def _prediction(value: Any, given: Given) -> Settings:
    if value == "raw":
        return Settings({}, "the velocity itself, as here")
    if value == "additive":
        note = "the output stands for the velocity less the noisy input; another function than the model was made for"
        return Settings({"loss.prediction": value}, note)
    return Settings(
        {},
        f"{value} changes the output there and keeps the target, so it trains another function; here it is the velocity"
        " itself (raw), which that program recommends; left out",
        changed=True,
    )


def _guidance(value: Any, given: Given) -> Settings | Refused:
    if _chroma(given):
        return Refused("not_applicable", "Chroma has no embedded guidance")
    if "schnell" in str(given.get("pretrained_model_name_or_path")).replace("\\", "/").rpartition("/")[2].lower():
        return Refused("not_applicable", "schnell has no embedded guidance, and it is not used there either")
    note = "the embedded guidance is 3.5 there unless it is given, and 1 here"
    return Settings({"guidance.embedded": float(value)}, "" if "guidance_scale" in given else note)


def _sampling(value: Any, given: Given) -> Settings:
    return Settings({"noise.timesteps": value})


def _weighting(value: Any, given: Given) -> Settings | Refused:
    """Where levels of the table are drawn, or a weight that counts with one type of prediction alone."""
    if value in ("logit_normal", "mode"):
        if given.get("timestep_sampling", "sigma") == "sigma":
            return Settings({"noise.density": value})
        return Refused("not_applicable", "levels are drawn by weighting_scheme with timestep_sampling sigma only")
    if value not in ("sigma_sqrt", "cosmap"):
        return Settings({}, "no weighting, as here")
    if given.get("model_prediction_type", "sigma_scaled") != "sigma_scaled":
        return Refused("not_applicable", "errors are weighted there with model_prediction_type sigma_scaled only")
    return Settings({"loss.weighting": value}, "the weight of sigma_scaled errors there, of velocities here", True)


def _shift(value: Any, given: Given) -> Settings:
    used = given.get("timestep_sampling", "sigma") in ("sigma", "shift")
    return Settings({"noise.shift": float(value)} if used else {}, "" if used else "not used by this sampling")


def _format(value: Any, given: Given) -> Settings:
    return Settings({"checkpoint.format": "sd-scripts-oft" if rotates(given) else value})


def _rotated(value: Any, given: Given) -> Settings | Refused:
    """Rotations are on the attention of the blocks of two streams, or on all linears of all blocks."""
    if not rotates(given):
        return Settings() if "network_args.enable_all_linear" not in given else Refused(
            "not_applicable", "it belongs to networks.oft_flux")  # fmt: skip
    note = "rotations are on the attention of double blocks there unless enable_all_linear is given"
    return (
        Settings({}, "all blocks, as here") if value else Settings({"network.targets": ["img_attn", "txt_attn"]}, note)
    )


def _train_blocks(value: Any, given: Given) -> Settings | Refused:
    groups = {"all": {}, "single": {"network.blocks.double": "none"}, "double": {"network.blocks.single": "none"}}
    if value not in groups:
        return Refused("not_applicable", "all, single or double")
    return Settings(groups[value])


MOST_UNITS = 35
"""Two blocks of each kind stay on the device there."""
SPLIT_MODE = 18
"""Units that an old option stands for."""


def _units(units: int) -> Settings | Refused:
    """One unit is half a double block and one and a half single ones, about 640 MB in bfloat16."""
    if units > MOST_UNITS:
        return Refused("not_applicable", f"sd-scripts refuses more than {MOST_UNITS} as well")
    double, single = units // 2, 2 * (units - units // 2)
    return Settings({"memory.swap_blocks": double + single}, f"{double} double blocks and {single} single ones there")


def _swapped(value: Any, given: Given) -> Settings | Refused:
    return _units(value)


def _swapped_by_kind(value: Any, given: Given) -> Settings | Refused:
    double, single = (int(given.get(name) or 0) for name in ("double_blocks_to_swap", "single_blocks_to_swap"))
    return _units(double + single // 2)


_SWAPPED: tuple[ForeignOption, ...] = (
    option("blocks_to_swap", kind="int", convert=_swapped, off=(None, 0),
           note="n there are n // 2 double blocks and twice the rest of single ones, 35 at most"),
    option("double_blocks_to_swap", kind="int", convert=_swapped_by_kind, off=(None, 0)),
    option("single_blocks_to_swap", kind="int", convert=_swapped_by_kind, off=(None, 0)),
    option("split_mode", kind="flag", convert=lambda value, given: _units(SPLIT_MODE), off=(None, False),
           note="an old option that stands for 18 swapped blocks"),
)  # fmt: skip

_SHARED: tuple[ForeignOption, ...] = (
    *_SWAPPED,
    option("model_type", kind="text", convert=lambda value, given: Settings(
        {"model.flavour": "chroma"} if value == "chroma" else {}, "the flavour is read from the weights")),
    option("clip_l", "model.text_encoders.clip_l.path", "text"),
    option("t5xxl", "model.text_encoders.t5.path", "text"),
    option("t5xxl_max_token_length", "text_encoder.max_tokens.t5", "int"),
    option("apply_t5_attn_mask", "text_encoder.mask_padding.t5", "flag", off=(None, False)),
    option("guidance_scale", kind="float", convert=_guidance, default=3.5),
    option("timestep_sampling", kind="text", convert=_sampling, default="sigma"),
    option("weighting_scheme", kind="text", convert=_weighting),
    option("discrete_flow_shift", kind="float", convert=_shift, default=3.0),
    option("sigmoid_scale", "noise.sigmoid_scale", "float"),
    option("model_prediction_type", kind="text", convert=_prediction, default="sigma_scaled"),
    *ignored("min_timestep max_timestep", "it does nothing for this model there, although it is accepted"),
    option("controlnet_model_name_or_path", "network.controlnet.path", "text"),
    *preview_options(size=512, steps=20, cfg=1.0),
)  # fmt: skip

_RANKS = {f"{name}_dim": name for name in CLASSES}


_NETWORK: tuple[ForeignOption, ...] = (
    *encoder_options(
        ("clip_l", "t5"), ("clip_l",), "t5", absent=lambda given: ("clip_l",) if _chroma(given) else ()
    ),
    option("script.format", kind="text", convert=_format, default="sd-scripts",
           note="files there have sd-scripts names; the default here suits ComfyUI and diffusers"),
    *rank_rules(_RANKS),
    option("network_args.in_dims", kind="literal", convert=outer_ranks(tuple(EMBEDDERS))),
    option("network_args.train_blocks", kind="text", convert=_train_blocks),
    block_choice("network_args.train_double_block_indices", "double"),
    block_choice("network_args.train_single_block_indices", "single"),
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
    option("flux_lora_target", kind="text", convert=_lora_target, default="all", needs=("model_type", ("lora",))),
    option("pretrained_t5_model_name_or_path", "model.text_encoders.t5.path", "text"),
    option("flux_attention_masked_training", "text_encoder.mask_padding.t5", "flag", off=(None, False)),
    option("t5_padding", "text_encoder.zero_padding", "text", values={"zero": True}, off=(None, "unmodified")),
    *unbuilt("flux_fast_schedule", "timesteps from a list", "flag"),
    option("tokenizer_max_length", "text_encoder.max_tokens.t5", "int"),
)

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
            option("validation_guidance", "sample.embedded_guidance", "float", default=7.5, default_with=PREVIEWS,
                   note="for this model it is the embedded guidance"),
            option("validation_guidance_real", "sample.cfg", "float"),
            low_bits("text_encoder_1_precision", "quantize.text_encoder.clip_l"),
            low_bits("text_encoder_2_precision", "quantize.text_encoder.t5"),
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
            option("validation_guidance", "sample.cfg", "float", default=7.5, default_with=PREVIEWS),
            option("validation_guidance_real", "sample.cfg", "float"),
            low_bits("text_encoder_1_precision", "quantize.text_encoder.t5"),
            *_SIMPLETUNER_SHARED,
        ),
    ),
)  # fmt: skip

IMPORTERS = {"sd-scripts": _SD_SCRIPTS, "simpletuner": _SIMPLETUNER}
