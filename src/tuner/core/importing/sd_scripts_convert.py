"""Conversions of sd-scripts options that are more than another name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuner.core.config.foreign import Convert, Given, Refused, Settings, literal, rotates
from tuner.core.importing import lycoris

NETWORK = "script.network"
"""Pseudo option: whether the script trains an adapter."""


def lengths(value: Any, given: Given) -> Settings | Refused:
    if given.get("max_train_epochs"):
        return Settings({}, "max_train_epochs wins there")
    return Settings({"train.steps": int(value)})


def steps_or_share(key: str) -> Convert:
    """A number of steps; below 1 it is a share of the run, and text may already be a percentage."""

    def convert(value: Any, given: Given) -> Settings:
        text = str(value)
        if text.endswith("%"):
            return Settings({key: text})
        number = float(text)
        return Settings({key: f"{number * 100:g}%" if 0 < number < 1 else int(number)})

    return convert


FUSED = ("fused_backward_pass", "blockwise_fused_optimizers", "fused_optimizer_groups")


def clip(value: Any, given: Given) -> Settings:
    """A limit on the norm. Where updates happen in the backward pass there is no norm of all gradients."""
    if float(value) > 0 and any(given.get(name) for name in FUSED):
        note = "there each gradient is limited by itself before its update; here there is no limit with optimizer.fuse"
        return Settings({"train.clip_grad": None}, note, changed=True)
    if "max_grad_norm" not in given:
        return Settings()
    return Settings({"train.clip_grad": {"norm": float(value)} if float(value) > 0 else None})


def merged(value: Any, given: Given) -> Settings:
    """Adapters that go into the weights first; a missing strength is 1."""
    paths = given.get("base_weights") or []
    strengths = [float(each) for each in given.get("base_weights_multiplier") or []]
    entries = [{"path": str(path), "strength": strengths[i] if i < len(strengths) else 1.0}
               for i, path in enumerate(paths)]  # fmt: skip
    return Settings({"model.merge": entries} if entries else {}, "" if entries else "without base_weights it is unused")


def file_names(value: Any, given: Given) -> Settings:
    """Names of low-rank factors in files; other kinds of adapters have one layout that every program reads."""
    kind = str(given.get("network_module") or "lora").rpartition(".")[2].partition("_")[0]
    return Settings({"checkpoint.format": value} if given.get(NETWORK) and kind == "lora" else {})


def rank(value: Any, given: Given) -> Settings:
    if not given.get(NETWORK) or given.get("dim_from_weights"):
        return Settings({}, "network_weights decides" if given.get(NETWORK) else "")
    if rotates(given):
        return Settings({"network.block_count": value}, "the number of blocks of every weight")
    if lycoris.in_command_line(given):
        return lycoris.rank(given.get("network_args.algo"), value)
    return Settings({"network.rank": value})


def alpha(value: Any, given: Given) -> Settings | Refused:
    if not given.get(NETWORK):
        return Settings({})
    if given.get("dim_from_weights"):
        return Refused("not_applicable", "network_weights decides")
    if rotates(given):
        note = "of rotations it is the limit, and 1 there unless it is given; 1e-4 to 1e-2 are useful"
        return Settings({"network.constraint": float(value)}, note)
    if value == 0:
        return Settings({}, "0 stands for the rank there, which is what is used without it here")
    if lycoris.in_command_line(given):
        made = lycoris.alpha(given.get("network_args.algo"), given.get("network_dim"), float(value))
        if not made.keys:
            return made
    note = "alpha is 1 there unless it is given, and the rank here: the update would be as many times stronger"
    return Settings({"network.alpha": float(value)}, "" if "network_alpha" in given else note)


_NETWORKS = {
    "lora": None,
    "loha": "loha",
    "lokr": "lokr",
    "oft": "oft",
    "dylora": Refused("not_applicable", "adapters of changing rank are for other models"),
}


def network_module(value: Any, given: Given) -> Settings | Refused:
    module = str(value)
    if lycoris.in_command_line(given):
        kind = lycoris.kind(given.get("network_args.algo"), decomposed=bool(given.get("network_args.dora_wd")))
        return kind if isinstance(kind, Refused) else Settings({"network.type": kind})
    name = module.rpartition(".")[2].partition("_")[0]
    if name not in _NETWORKS:
        return Settings({"network.type": module})
    own = _NETWORKS[name]
    if isinstance(own, Refused):
        return own
    return Settings({"network.type": own} if own else {}, "an adapter is what trains by default")


def loraplus(value: Any, given: Given) -> Settings:
    parts = ["denoiser"] if given.get("network_train_unet_only") else ["denoiser", "text_encoder"]
    return Settings({f"optimizer.loraplus.{part}": float(value) for part in parts})


def optimizer(value: Any, given: Given) -> Settings:
    """The optimizer by name. Adafactor there adapts its own rate unless it is told otherwise."""
    name = str(value)
    made: dict[str, Any] = {"optimizer.name": _OPTIMIZERS.get(name.lower(), name)}
    note, changed = "", False
    if name.lower() == "adafactor":
        made |= {
            f"optimizer.args.{key}": True
            for key in ("relative_step", "scale_parameter")
            if f"optimizer_args.{key}" not in given
        }
        note = "relative_step and scale_parameter are on there unless they are given" if len(made) > 1 else ""
        changed = len(made) > 1
    return Settings(made, note, changed)


_OPTIMIZERS = {
    "adamw": "adamw",
    "adamw8bit": "adamw8bit",
    "pagedadamw": "paged_adamw",
    "pagedadamw8bit": "paged_adamw8bit",
    "pagedadamw32bit": "paged_adamw32bit",
    "lion": "lion",
    "lion8bit": "lion8bit",
    "pagedlion8bit": "paged_lion8bit",
    "sgdnesterov": "sgd_nesterov",
    "sgdnesterov8bit": "sgd8bit",
    "dadaptation": "dadapt_adam_preprint",
    "dadaptadampreprint": "dadapt_adam_preprint",
    "dadaptadagrad": "dadapt_adagrad",
    "dadaptadam": "dadapt_adam",
    "dadaptadan": "dadapt_adan",
    "dadaptadanip": "dadapt_adan_ip",
    "dadaptlion": "dadapt_lion",
    "dadaptsgd": "dadapt_sgd",
    "prodigy": "prodigy",
    "adafactor": "adafactor",
    "radamschedulefree": "radam_schedulefree",
    "adamwschedulefree": "adamw_schedulefree",
    "sgdschedulefree": "sgd_schedulefree",
}


def optimizer_argument(value: Any, given: Given) -> Settings:
    name = str(given["*"]).partition(".")[2]
    made = literal(value) if isinstance(value, str) else value
    made = list(made) if isinstance(made, tuple) else made
    named = name in ("betas", "weight_decay") or (name == "eps" and isinstance(made, int | float))
    return Settings({f"optimizer.{name}" if named else f"optimizer.args.{name}": made})


def scheduler_argument(value: Any, given: Given) -> Settings:
    made = literal(value) if isinstance(value, str) else value
    return Settings({f"schedule.args.{str(given['*']).partition('.')[2]}": made})


def keep_steps(value: Any, given: Given) -> Settings | Refused:
    every = given.get("save_every_n_steps")
    if not every:
        return Refused("not_applicable", "without save_every_n_steps it does nothing there either")
    kept = int(value) // int(every) + 1
    return Settings({"checkpoint.keep_last": kept}, "a number of checkpoints here, not a span of steps", changed=True)


def epoch_ratio(value: Any, given: Given) -> Settings | Refused:
    epochs = given.get("max_train_epochs")
    if not epochs:
        return Refused("not_applicable", "the number of epochs is not known before the data is; use checkpoint.every")
    return Settings({"checkpoint.every.epochs": max(1, int(epochs) // int(value))})


def logging_dir(value: Any, given: Given) -> Settings:
    made: dict[str, Any] = {"log.dir": value}
    return Settings(made if given.get("log_with") else made | {"log.to": ["tensorboard"]})


def swapped_blocks(value: Any, given: Given) -> Settings:
    if value == 1:
        return Settings({}, "one block alone frees nothing here: it needs as much room as it leaves", changed=True)
    return Settings({"memory.swap_blocks": value})


_ATTENTION = ("attn_mode", "mem_eff_attn", "xformers", "flash_attn", "sdpa")


def attention(name: str, backend: str = "") -> Convert:
    """The way of attention that ``name`` asks for; of several the first of ``_ATTENTION`` counts there."""

    def convert(value: Any, given: Given) -> Settings:
        first = next((each for each in _ATTENTION if given.get(each)), name)
        if first != name:
            return Settings({}, f"{first} wins there")
        return Settings({"attention.backend": backend or {"torch": "sdpa", "sageattn": "sage"}.get(value, value)})

    return convert


def low_bits(value: Any, given: Given) -> Settings:
    return Settings({"quantize.denoiser": "fp8_unscaled"}, "a plain cast, as there; 'fp8' with scales is more exact")


def weights_dtype(name: str) -> Convert:
    def convert(value: Any, given: Given) -> Settings:
        if given.get(NETWORK):
            return Settings({"precision.adapter": name})
        if name == "bf16":
            note = "weights are kept in precision.compute; here all updates are rounded at random, not only fused ones"
            return Settings({"optimizer.rounding": "stochastic"}, note, changed=True)
        return Settings({"precision.weights": name})

    return convert


def cached(key: str, disk: str) -> Convert:
    """In memory, unless the option for the disk is given as well."""

    def convert(value: Any, given: Given) -> Settings:
        return Settings({}, f"{disk} says more") if given.get(disk) else Settings({key: "memory"})

    return convert


def density(value: Any, given: Given) -> Settings | Refused:
    """``weighting_scheme`` is two things: where levels are drawn, and how errors are weighted."""
    if value in ("logit_normal", "mode"):
        if given.get("timestep_sampling") == "sigma":
            return Settings({"noise.density": value})
        return Refused("not_applicable", "levels are drawn by weighting_scheme with timestep_sampling sigma only")
    if value in ("sigma_sqrt", "cosmap"):
        return Settings({"loss.weighting": value})
    return Settings({}, "no weighting, as here")


LR_SCHEDULERS: Mapping[str, Any] = {
    "adafactor": Refused("not_applicable", "Adafactor with relative_step brings its own curve"),
    "piecewise_constant": Refused("not_built", "rules of piecewise_constant are written as schedule.pieces here"),
}
