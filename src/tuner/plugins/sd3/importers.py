"""What kohya-ss/sd-scripts and bghira/SimpleTuner call the options of SD3 and SD3.5."""

from __future__ import annotations

from typing import Any

from tuner.core.config.foreign import (
    PREVIEWS,
    ForeignFamily,
    ForeignOption,
    Given,
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
    unbuilt,
    usual_preset,
)

from .names import CLASSES, EMBEDDER_KINDS

_ENCODERS = ("clip_l", "clip_g", "t5")
_OTHER_SCRIPT = "this model's script does not have it"
_DENSITIES = {"logit_normal": "logit_normal", "mode": "mode"}


def _density(value: Any, given: Given) -> Settings:
    """Here the option always says where levels are drawn; two of its values are weights besides."""
    made = {"noise.timesteps": _DENSITIES.get(value, "uniform")}
    if value in ("sigma_sqrt", "cosmap"):
        made["loss.weighting"] = value
    note = "levels are drawn evenly there unless weighting_scheme says otherwise" if value == "uniform" else ""
    return Settings(made, note)


def _both_masks(value: Any, given: Given) -> Settings:
    return Settings({"text_encoder.mask_padding.clip": True})


_SHARED: tuple[ForeignOption, ...] = (
    option("clip_l", "model.text_encoders.clip_l.path", "text"),
    option("clip_g", "model.text_encoders.clip_g.path", "text"),
    option("t5xxl", "model.text_encoders.t5.path", "text"),
    option("t5xxl_max_token_length", "text_encoder.max_tokens.t5", "int"),
    option("apply_lg_attn_mask", kind="flag", convert=_both_masks, off=(None, False)),
    option("apply_t5_attn_mask", "text_encoder.mask_padding.t5", "flag", off=(None, False)),
    *(option(f"{name}_dropout_rate", f"text_encoder.dropout.{name}", "float", off=(None, 0.0)) for name in _ENCODERS),
    option("pos_emb_random_crop_rate", "model.pos_embed_random_crop", "float", off=(None, 0.0)),
    option("enable_scaled_pos_embed", "model.scaled_pos_embed", "flag", off=(None, False)),
    option("training_shift", "noise.shift", "float"),
    option("weighting_scheme", kind="text", convert=_density, default="uniform"),
    *ignored("ip_noise_gamma ip_noise_gamma_random_strength", "it does nothing for this model there, although it is "
             "accepted"),
    *ignored("timestep_sampling discrete_flow_shift model_prediction_type guidance_scale sigmoid_scale", _OTHER_SCRIPT),
    *ignored("cpu_offload_checkpointing", "it does not work for this model there"),
    *ignored("t5xxl_dtype", "it does nothing there either"),
    option("t5xxl_device", "text_encoder.device.t5", "text", values={"cuda": "accelerator", "cuda:0": "accelerator"}),
    *ignored("use_t5xxl_cache_only", "encoders that do not train are always cached", "flag"),
    *preview_options(size=512, steps=30, cfg=7.5),
)  # fmt: skip


def _whole_encoders(value: Any, given: Given) -> Settings:
    """T5 trains beside the CLIPs or not at all."""
    t5 = _ENCODERS[2:] if given.get("train_t5xxl") else ()
    return Settings({"train.components": ["denoiser", *_ENCODERS[:2], *t5]})


_FULL = (
    option("train_text_encoder", kind="flag", convert=_whole_encoders, off=(None, False)),
    option("train_t5xxl", kind="flag", convert=_whole_encoders, off=(None, False), needs=("train_text_encoder",
                                                                                          (True,))),
    *(option(f"learning_rate_te{number} text_encoder_lr{number}", f"optimizer.lr_by_component.{name}", "float",
             needs=("train_t5xxl" if name == "t5" else "train_text_encoder", (True,)))
      for number, name in enumerate(_ENCODERS, 1)),
    *unbuilt("num_last_block_to_freeze", "freezing the last blocks by number; train.freeze takes patterns", "int",
             off=(None, 0)),
    option("save_clip", "checkpoint.include", "flag", off=(None, False)),
    option("save_t5xxl", "checkpoint.include", "flag", off=(None, False)),
)  # fmt: skip

_NETWORK = (
    *encoder_options(_ENCODERS, ("clip_l", "clip_g"), "t5"),
    *rank_rules({f"{name}_dim": name for name in CLASSES}),
    option("network_args.emb_dims", kind="literal", convert=outer_ranks(tuple(EMBEDDER_KINDS))),
    block_choice("network_args.train_block_indices", "blocks"),
)

_SD_SCRIPTS = (
    ForeignFamily(
        names=("sd3_train_network.py",), modules=("networks.lora_sd3",), options=(*_NETWORK, *_SHARED, *_FULL)
    ),
    ForeignFamily(names=("sd3_train.py",), settings={"train.mode": "full"}, options=(*_FULL, *_SHARED)),
)


def _empty(encoders: tuple[str, ...]) -> Any:
    def convert(value: Any, given: Given) -> Settings:
        return Settings({f"text_encoder.unconditional.{name}": value for name in encoders})

    return convert


_SIMPLETUNER = (
    ForeignFamily(
        names=("sd3",),
        options=(
            *repositories({
                "medium": "stabilityai/stable-diffusion-3.5-medium",
                "large": "stabilityai/stable-diffusion-3.5-large"}, "medium"),
            usual_preset("x_attn", "attention of the image is what that program adapts unless it is told otherwise"),
            option("validation_guidance", "sample.cfg", "float", default=7.5, default_with=PREVIEWS),
            option("pretrained_t5_model_name_or_path", "model.text_encoders.t5.path", "text"),
            option("t5_padding", "text_encoder.zero_padding", "text", values={"zero": True}, off=(None, "unmodified")),
            option("sd3_clip_uncond_behaviour", kind="text", convert=_empty(("clip_l", "clip_g"))),
            option("sd3_t5_uncond_behaviour", kind="text", convert=_empty(("t5",))),
            option("tokenizer_max_length", "text_encoder.max_tokens.t5", "int"),
            *(low_bits(f"text_encoder_{number}_precision", f"quantize.text_encoder.{name}")
              for number, name in enumerate(_ENCODERS, 1)),
        ),
    ),
)  # fmt: skip

IMPORTERS = {"sd-scripts": _SD_SCRIPTS, "simpletuner": _SIMPLETUNER}
