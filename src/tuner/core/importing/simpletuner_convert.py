"""Conversions of SimpleTuner options that are more than another name."""

from __future__ import annotations

from typing import Any

from tuner.core.config.foreign import Convert, Given, Refused, Settings, literal


def is_lora(given: Given) -> bool:
    return bool(given.get("model_type") == "lora")


def lora_only(key: str) -> Convert:
    """A setting of adapters, which full training does not have."""

    def convert(value: Any, given: Given) -> Settings:
        if not is_lora(given):
            return Settings({}, "no adapter is trained")
        if given.get("lora_type") == "lycoris":
            return Settings({}, "adapters of LyCORIS do not read it; lycoris_config decides")
        return Settings({key: value})

    return convert


def clip(value: Any, given: Given) -> Settings:
    """The limit is on single values there unless ``grad_clip_method`` says norm."""
    if float(value) <= 0:
        return Settings({"train.clip_grad": None})
    kind = str(given.get("grad_clip_method") or "value")
    note = "there it limits single values unless grad_clip_method is norm; the default here is a norm of 1"
    return Settings({"train.clip_grad": {kind: float(value)}}, note, changed=kind == "value")


def steps(value: Any, given: Given) -> Settings | Refused:
    return Settings({"train.steps": int(value)} if int(value) > 0 else {}, "" if int(value) > 0 else "epochs count")


def epochs(value: Any, given: Given) -> Settings | Refused:
    if int(given.get("max_train_steps") or 0) > 0:
        return Settings({}, "max_train_steps counts")
    return Settings({"train.epochs": int(value)} if int(value) > 0 else {}, "" if int(value) > 0 else "steps count")


def schedule(value: Any, given: Given) -> Settings | Refused:
    """Cosine and sine go up and down with a period of the warm-up there; restarts do not restart."""
    warmup = int(given.get("lr_warmup_steps") or 0)
    name = str(value)
    if name == "cosine":
        note = (
            "there it is a sawtooth with the warm-up as its period; here one wave over the whole run, after the warm-up"
        )
        return Settings({"schedule.name": "cosine"}, note, changed=True)
    if name == "cosine_with_restarts":
        return Settings({"schedule.name": name}, "there the rate stays constant; here it restarts", changed=True)
    if name == "sine":
        if warmup < 1:
            return Refused("not_applicable", "sine needs lr_warmup_steps as its period")
        return Settings({"schedule.name": "sine", "schedule.period": warmup})
    return Settings({"schedule.name": name})


def warmup(value: Any, given: Given) -> Settings:
    if given.get("lr_scheduler") == "sine":
        return Settings({}, "the period of sine")
    return Settings({"schedule.warmup": int(value)})


def end_rate(value: Any, given: Given) -> Settings:
    return Settings({"schedule.end_lr": float(value)} if given.get("lr_scheduler") in ("polynomial", "sine") else {},
                    "used by polynomial and sine")  # fmt: skip


def power(value: Any, given: Given) -> Settings:
    return Settings({"schedule.power": float(value)} if given.get("lr_scheduler") == "polynomial" else {},
                    "used by polynomial")  # fmt: skip


OPTIMIZERS: dict[str, str] = {
    "adamw": "adamw",
    "optimi-adamw": "adamw",
    "bnb-adamw": "adamw",
    "bnb-adamw8bit": "adamw8bit",
    "ao-adamw8bit": "ao_adamw8bit",
    "ao-adamw4bit": "ao_adamw4bit",
    "ao-adamfp8": "ao_adamfp8",
    "ao-adamwfp8": "ao_adamwfp8",
    "soap": "soap",
    "bnb-adamw-paged": "paged_adamw",
    "bnb-adamw8bit-paged": "paged_adamw8bit",
    "bnb-adam": "adam",
    "bnb-adam8bit": "adam8bit",
    "bnb-adagrad": "adagrad",
    "bnb-adagrad8bit": "adagrad8bit",
    "bnb-lion": "lion",
    "optimi-lion": "lion",
    "bnb-lion8bit": "lion8bit",
    "bnb-lion-paged": "paged_lion",
    "bnb-lion8bit-paged": "paged_lion8bit",
    "bnb-ademamix": "ademamix",
    "bnb-ademamix8bit": "ademamix8bit",
    "bnb-ademamix-paged": "paged_ademamix",
    "bnb-ademamix8bit-paged": "paged_ademamix8bit",
    "optimi-stableadamw": "stableadamw",
    "optimi-radam": "radam",
    "optimi-ranger": "ranger",
    "optimi-adan": "adan",
    "optimi-adam": "optimi_adam",
    "optimi-sgd": "sgd",
    "prodigy": "prodigy",
    "adamw_schedulefree": "adamw_schedulefree",
}
_ANOTHER_PACKAGE = ("bnb-lion", "optimi-lion", "optimi-radam", "optimi-sgd")


def optimizer(value: Any, given: Given) -> Settings | Refused:
    name = str(value)
    if name == "adamw_bf16" and is_lora(given):
        note = "its averages are bfloat16 in both; the adapter's weights are float32 here"
        return Settings({"optimizer.name": "adamw_bf16"}, note, changed=True)
    if name == "adamw_bf16":
        return Settings({"optimizer.name": "adamw_bf16", "optimizer.rounding": "stochastic"},
                        "updates of bfloat16 weights are rounded at random, there too")  # fmt: skip
    if name not in OPTIMIZERS:
        return Refused("not_built", f"the optimizer {name}")
    found = OPTIMIZERS[name]
    changed = name in _ANOTHER_PACKAGE
    return Settings({"optimizer.name": found}, "the same method from another package" if changed else "", changed)


def optimizer_arguments(value: Any, given: Given) -> Settings | Refused:
    """``name=value,...``; decays, eps and weight decay have keys of their own here."""
    pairs = value if isinstance(value, dict) else dict(
        part.strip().partition("=")[::2] for part in str(value).split(",") if part.strip()
    )  # fmt: skip
    if not all(isinstance(value, dict) or "=" in part for part in str(value).split(",") if part.strip()):
        return Refused("not_applicable", "arguments have the form name=value, separated by commas")
    read = {key.strip(): literal(each.strip()) if isinstance(each, str) else each for key, each in pairs.items()}
    decays = [read.pop(name, default) for name, default in (("beta1", 0.9), ("beta2", 0.999))]
    made = {f"optimizer.{key}" if key in ("eps", "weight_decay", "betas") else f"optimizer.args.{key}": each
            for key, each in read.items()}  # fmt: skip
    if len(read) < len(pairs):
        made["optimizer.betas"] = decays
    return Settings(made)


def betas(value: Any, given: Given) -> Settings:
    first = given.get("adam_beta1", given.get("optimizer_beta1", 0.9))
    second = given.get("adam_beta2", given.get("optimizer_beta2", 0.999))
    return Settings({"optimizer.betas": [float(first), float(second)]})


def density(value: Any, given: Given) -> Settings:
    """Where noise levels are drawn, and the shift that every way of drawing has there."""
    shift = float(given.get("flow_schedule_shift", 3.0) or 0)
    made: dict[str, Any] = {"noise.timesteps": "shift"}
    if given.get("flow_use_uniform_schedule"):
        made = {"noise.timesteps": "uniform"}
    elif given.get("flow_use_beta_schedule"):
        made = {"noise.timesteps": "beta"}
    auto = given.get("flow_schedule_auto_shift") and shift <= 0
    made["noise.shift"] = "auto" if auto else shift if shift > 0 else 1.0
    note = "levels are drawn by a sigmoid and shifted by 3 there unless something else is given"
    return Settings(made, "" if "flow_schedule_shift" in given else note)


def beta(value: Any, given: Given) -> Settings:
    pair = [float(given.get(f"flow_beta_schedule_{name}") or 2.0) for name in ("alpha", "beta")]
    return Settings({"noise.beta": pair} if given.get("flow_use_beta_schedule") else {})


def size(value: Any, given: Given) -> Settings | Refused:
    first = str(value).split(",")[0].strip().lower()
    try:
        sides = [int(float(each)) for each in first.split("x")]
    except ValueError:
        return Refused("not_applicable", "neither a number nor WIDTHxHEIGHT")
    note = "" if "," not in str(value) else "one size here: the first; prompts can have sizes of their own (--w --h)"
    return Settings({"sample.size": sides if len(sides) > 1 else sides[0]}, note, changed=bool(note))


def report_to(value: Any, given: Given) -> Settings:
    names = {"all": ["tensorboard", "wandb"], "comet_ml": ["comet"]}.get(str(value), [str(value)])
    return Settings({"log.to": names})


def resume(value: Any, given: Given) -> Settings | Refused:
    if value == "latest":
        return Settings({"checkpoint.resume": "auto"}, "the newest state of this program in the run folder")
    return Refused("not_applicable", "states of another program cannot be read; network.init_from takes its weights")


def rolling(value: Any, given: Given) -> Settings:
    return Settings({"checkpoint.rolling.every": int(value)} if int(value) > 0 else {})


def mode(value: Any, given: Given) -> Settings:
    note = "whole models train there unless model_type is lora" if "model_type" not in given else ""
    return Settings({"train.mode": value}, note)


_KERNELS = {
    "diffusers": "sdpa", "xformers": "xformers", "cudnn": "cudnn", "flash-attn": "flash", "flash-attn-2": "flash",
    "flash-attn-3": "flash3", "flash-attn-3-varlen": "flash3", "native-efficient": "efficient",
    "native-flash": "sdpa_flash", "native-math": "math",
}  # fmt: skip


def attention(value: Any, given: Given) -> Settings | Refused:
    """The kernel; one that cannot train is for pictures alone, as it is there unless it is told otherwise."""
    name = str(value)
    if name.startswith("sageattention"):
        if "training" in str(given.get("sageattention_usage") or ""):
            return Refused("not_applicable", "this kernel has no gradient, so nothing would be learned with it")
        return Settings({"attention.sample_backend": "sage"}, "for pictures alone")
    if name not in _KERNELS:
        return Refused("not_built", f"{name} attention")
    return Settings({"attention.backend": _KERNELS[name]})


def dynamo(value: Any, given: Given) -> Settings:
    return Settings({"compile.enabled": True, "compile.backend": str(value)})


def whole_epochs(value: Any, given: Given) -> Settings | Refused:
    if float(value) != int(float(value)):
        return Refused("not_built", "parts of an epoch; validate.every takes steps")
    return Settings({"validate.every.epochs": int(float(value))})


def sample_adapter(value: Any, given: Given) -> Settings | Refused:
    """An adapter for pictures alone, which acts in the place of the one that trains there."""
    if not str(value).endswith(".safetensors"):
        return Refused("not_built", "adapters from the hub; download it and name the file in sample.adapters")
    strength = given.get("validation_adapter_strength")
    entry = {"path": str(value), "strength": 1.0 if strength is None else float(strength)}
    note = "there it may stand in for the adapter that trains; here both act, and it is in the base column too"
    return Settings({"sample.adapters[]": entry}, note, changed=True)
