"""What kohya-ss/sd-scripts and bghira/SimpleTuner call the options of this model."""

from __future__ import annotations

from typing import Any

from tuner.core.config.foreign import (
    PREVIEWS,
    ForeignFamily,
    ForeignOption,
    Given,
    Refused,
    Settings,
    encoder_options,
    ignored,
    low_bits,
    option,
    patterns,
    preview_options,
    repositories,
    split_pairs,
    usual_preset,
)

_NO_SHIFT = "it does nothing for this model there, although it is accepted"


def _rate(group: str, pattern: str) -> ForeignOption:
    """A learning rate of part of the denoiser; in LoRA runs it matches the adapters of those modules."""

    def convert(value: Any, given: Given) -> Settings:
        return Settings({"optimizer.lr_rules[]": {"match": pattern, "lr": float(value)}})

    return option(f"{group}_lr", kind="float", convert=convert)


_OLD = ("dit_path", "qwen3_path", "vae_path", "timestep_sample_method")
"""Options that only the first version of the script had."""


def _is_old(given: Given) -> bool:
    return "timestep_sampling" not in given and any(name in given for name in _OLD)


def _adapter_rate(value: Any, given: Given) -> Settings:
    """Whole models: the LLM adapter is part of what trains, unless its rate is 0."""
    if float(value) == 0:
        return Settings({"train.components": ["denoiser"]}, "the adapter stays as it is")
    return Settings({"optimizer.lr_by_component.llm_adapter": float(value)})


def _sampling(value: Any, given: Given) -> Settings:
    return Settings() if _is_old(given) else Settings({"noise.timesteps": value})


def _old_sampling(value: Any, given: Given) -> Settings | Refused:
    """Of the first version: a normal draw through a sigmoid, or an even one, both shifted."""
    if not _is_old(given):
        return Settings() if "timestep_sample_method" not in given else Refused(
            "not_applicable", "timestep_sampling wins")  # fmt: skip
    names = {"logit_normal": "shift", "uniform": "uniform"}
    if value not in names:
        return Refused("not_applicable", "logit_normal or uniform; the script knows no other")
    made = {"noise.timesteps": names[value], "noise.shift": float(given.get("discrete_flow_shift") or 3.0)}
    return Settings(made, "an old name of timestep_sampling; levels are always shifted, by 3 unless it is given")


def _old_targets(value: Any, given: Given) -> Settings:
    """The first version adapts modulation layers as well."""
    return Settings({"network.include": [r"blocks\..*_modulation.*"]} if _is_old(given) else {})


def _guidance(value: Any, given: Given) -> Settings:
    return Settings({"guidance.distill.scale": float(given.get("guidance_loss_scale") or 1.0)})


def _differential(value: Any, given: Given) -> Settings:
    return Settings({"guidance.differential": float(given.get("differential_guidance_scale") or 3.0)})


_SHARED = (
    option("qwen3", "model.text_encoders.qwen3.path", "text"),
    option("qwen3_path", "model.text_encoders.qwen3.path", "text"),
    option("dit_path", "model.path", "text"),
    option("vae_path", "model.vae.path", "text"),
    option("llm_adapter_path", "model.llm_adapter.path", "text"),
    option("t5_tokenizer_path", "model.tokenizers.t5.path", "text"),
    option("qwen3_max_token_length", "text_encoder.max_tokens.qwen3", "int"),
    option("t5_max_token_length", "text_encoder.max_tokens.t5", "int"),
    option("timestep_sampling", kind="text", convert=_sampling, default="sigmoid"),
    option("timestep_sample_method", kind="text", convert=_old_sampling, default="logit_normal"),
    option("discrete_flow_shift", "noise.shift", "float"),
    option("sigmoid_scale", "noise.sigmoid_scale", "float"),
    *ignored("min_timestep max_timestep", _NO_SHIFT),
    *ignored("network_args.split_qkv", "this model has no fused projections", "flag"),
    *ignored("apply_t5_attn_mask", "padding is always hidden from this model", "flag"),
    *ignored("fp8_base fp8_base_unet", "this model is not offered unscaled fp8, and the script goes on without it; "
             "quantize.denoiser fp8 has scales", "flag"),
    option("transformer_dtype", "precision.compute", "text", values={"float16": "fp16", "bfloat16": "bf16",
                                                                     "float32": "fp32"}),
    *preview_options(size=512, steps=30, cfg=7.5),
    option("vae_chunk_size", "latents.chunk_size", "int"),
    *ignored("vae_disable_cache", "single images need no feature cache; there is none to switch off", "flag"),
    # averages and guidance
    option("ema", "ema.enabled", "flag"),
    option("ema_decay", "ema.decay", "float", needs=("ema", (True,)), default=0.9999),
    option("ema_device", "ema.device", "text", values={"cuda": "accelerator"}, needs=("ema", (True,)), default="cuda"),
    option("ema_use_num_updates", "ema.warmup", "flag", values={True: "updates"}, off=(None, False),
           needs=("ema", (True,))),
    option("ema_sample", "sample.weights", "flag", values={True: "both"}, off=(None, False), needs=("ema", (True,))),
    option("ema_resume_path", "ema.init_from", "text", needs=("ema", (True,))),
    option("ema_use_feedback", "ema.feedback", "flag", off=(None, False), needs=("ema", (True,))),
    option("ema_param_multiplier", "ema.multiplier", "float", needs=("ema", (True,))),
    option("do_guidance_loss", kind="flag", convert=_guidance, off=(None, False)),
    option("guidance_loss_scale", kind="float", note="part of do_guidance_loss", needs=("do_guidance_loss", (True,))),
    option("guidance_loss_cfg_zero", "guidance.distill.zero_star", "flag", off=(None, False),
           needs=("do_guidance_loss", (True,))),
    option("do_differential_guidance", kind="flag", convert=_differential, off=(None, False)),
    option("differential_guidance_scale", kind="float", note="part of do_differential_guidance",
           needs=("do_differential_guidance", (True,))),
    # rates by part
    _rate("self_attn", r"denoiser:.*self_attn.*"),
    _rate("cross_attn", r"denoiser:.*cross_attn.*"),
    _rate("mlp", r"denoiser:.*mlp\.layer.*"),
    _rate("mod", r"denoiser:.*_modulation.*"),
    # which modules
    option("network_args.exclude_patterns", convert=patterns("network.exclude")),
    option("network_args.include_patterns", convert=patterns("network.include")),
    option("network_args.network_reg_dims", kind="text", convert=split_pairs("rank", int)),
    option("network_args.network_reg_alphas", kind="text", convert=split_pairs("alpha", float)),
    option("network_args.network_reg_lrs", kind="text", convert=split_pairs("lr", float)),
    *(option(f"network_args.{name}", refused="not_applicable", note="an old argument; write network.rules with the "
             "names of the modules") for name in ("self_attn_dim", "cross_attn_dim", "mlp_dim", "mod_dim",
                                                  "llm_adapter_dim", "emb_dims", "train_block_indices")),
)  # fmt: skip

_SD_SCRIPTS = (
    ForeignFamily(
        names=("anima_train_network.py",),
        modules=("networks.lora_anima",),
        options=(
            *encoder_options(
                ("qwen3",), ("qwen3",), cached_rest=True, parts={"network_args.train_llm_adapter": "llm_adapter"}
            ),
            option(
                "script.targets",
                kind="text",
                convert=_old_targets,
                default="modulation",
                note="the first version of the script adapts modulation layers as well",
            ),
            _rate("llm_adapter", r"llm_adapter:.*"),
            *_SHARED,
        ),
    ),
    ForeignFamily(
        names=("anima_train.py",),
        settings={"train.mode": "full", "train.components": ["denoiser", "llm_adapter"]},
        options=(option("llm_adapter_lr", kind="float", convert=_adapter_rate), *_SHARED),
    ),
)

_SIMPLETUNER = (
    ForeignFamily(
        names=("anima",),
        options=(
            *repositories({
                "base-v1.0": "circlestone-labs/Anima-Base-v1.0-Diffusers",
                "release": "circlestone-labs/Anima-Base-v1.0-Diffusers",
                "preview-3": "CalamitousFelicitousness/Anima-Preview-3-sdnext-diffusers",
                "preview-2": "CalamitousFelicitousness/Anima-Preview-2-sdnext-diffusers",
                "preview": "CalamitousFelicitousness/Anima-sdnext-diffusers"}, "preview-3"),
            usual_preset("attention", "attention is what that program adapts unless it is told otherwise"),
            option("validation_guidance", "sample.cfg", "float", default=7.5, default_with=PREVIEWS),
            low_bits("text_encoder_1_precision", "quantize.text_encoder.qwen3"),
        ),
    ),
)  # fmt: skip

IMPORTERS = {"sd-scripts": _SD_SCRIPTS, "simpletuner": _SIMPLETUNER}
