"""Keys that are known but cannot be used: features still to be built, and options that have no meaning here.

They are errors that say so, which is more help than "unknown key". A pattern names a key and everything below it; ``*``
stands for any one name or index. A test checks that no pattern names a key of the schema.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tuner.core.config.document import RawConfig, dotted, walk
from tuner.core.config.jsonc import Path
from tuner.core.errors import UsageError

PLANNED: Mapping[str, str] = {
    # whole sections
    "quantize.args": "arguments of quantization libraries",
    "evaluate": "scores of sample pictures",
    "webhook": "notifications",
    "hooks": "commands after checkpoints and uploads",
    "publish": "uploading",
    "distributed": "training on several GPUs",
    # model and encoders
    "model.control_channels": "control inputs",
    "model.delete_downloads_after_load": "removing downloads",
    "model.token_routing": "token routing",
    "text_encoder.weighted_prompts": "weighted captions",
    # data
    "data.conditioning": "conditioning images",
    "data.storage": "remote storage",
    "data.sets.*.sources.*.storage": "storage other than local folders",
    "data.sets.*.sources.*.active": "sources that take part for a while",
    "data.sets.*.sources.*.adapter_strength": "adapter strength by source",
    "data.sets.*.sources.*.attributes": "free values of a source",
    "data.sets.*.sources.*.conditioning": "conditioning images",
    "data.sets.*.sources.*.slider": "slider training",
    "data.sets.*.sources.*.timestep_offset": "timestep offset by source",
    "cache.compress": "compressed cache files",
    "cache.crops_per_image": "several cached crops per image",
    "cache.when": "encoding on demand",
    # noise and loss
    "noise.bias": "biased timesteps",
    "noise.list": "timesteps from a list",
    "noise.pyramid": "multi-resolution noise",
    "noise.rollout": "scheduled sampling",
    "loss.debiased": "debiased estimation",
    "loss.layersync": "alignment of layers",
    "loss.scale": "a constant factor on the loss",
    "loss.soft_min_snr": "the soft form of min-SNR",
    # network and optimizer
    "network.controlnet": "control networks",
    "network.perturbation": "weight perturbation",
    # training, arithmetic, memory
    "memory.group_offload": "grouped offload",
    "memory.stream_linear": "streamed linear layers",
    "attention.args": "arguments of attention kernels",
    # outputs
    "checkpoint.include": "a choice of exported components",
    "checkpoint.min_free_gb": "a low-disk guard",
    "sample.cfg_start": "guidance from a later step on",
    "sample.command": "an external program for samples",
    "sample.preview_every": "previews while sampling",
    "sample.skip_layers": "skip-layer guidance",
    "log.images": "pictures in trackers",
}

NOT_APPLICABLE: Mapping[str, str] = {
    "model.prediction_type": "models here predict the velocity of a flow; it is not a choice",
    "model.unet": "models here are transformers; give their weights as model.path",
    "model.clip_skip": "it belongs to the text encoders of older models",
    "model.load_to": "tensors go straight to where they are used, quantized and streamed ones by way of host memory",
    "text_encoder.when_idle": "encoders leave memory once captions are encoded, unless every step needs them",
    "latents.when_idle": "the autoencoder leaves memory once pictures are encoded or decoded, unless steps need it",
    "latents.slicing": "pictures are decoded one by one; cache.vae_batch_size says how many are encoded together",
    "data.fill_small_buckets": "data.short_batches 'fill' fills every batch, also those of small buckets",
    "data.rescan": "folders are looked through at every start, for one stat per file; see cache.verify",
    "noise.prediction_type": "models here predict the velocity of a flow; it is not a choice",
    "noise.zero_terminal_snr": "it belongs to models with a beta schedule; a flow ends in pure noise anyway",
    "loss.v_pred_like_loss": "it belongs to noise-prediction models",
    "latents.feature_cache": "single images need no feature cache; there is none to switch off",
    "precision.weights": "trained weights are kept in precision.compute; optimizer.rounding says how they are rounded",
    "precision.frozen": "frozen weights are kept in precision.compute, or as quantize says",
    "checkpoint.low_memory": "files are always written tensor by tensor, without a second copy of the model",
    "sample.compare_base": "every contact sheet begins with the pictures of the base model",
    "sample.seed_device": "noise is drawn on the CPU, so that pictures compare across devices",
    "compile.per_block": "blocks are always compiled one by one; a graph of the whole model would fit one picture "
    "size, and neither streamed nor recomputed blocks",
    "sample.compile": "samples run through the blocks that train; compile.enabled compiles them for both",
    "quantize.on": "weights are quantized one at a time on the device where they stay",
    "network.lycoris": "its settings are keys of network, such as type and factor; tuner config import translates them",
    "network.conv_rank": "trained blocks have no 3x3 convolutions",
    "sample.watermark": "it belongs to another model family",
}

PLANNED_VALUES: Mapping[str, Mapping[str, str]] = {
    "checkpoint.format": dict.fromkeys(("ckpt", "pt", "pickle"), ""),
    "log.to.*": {"comet": "this tracker"},
    "network.type": dict.fromkeys(("controlnet", "singlora"), "other adapter types"),
    "noise.timesteps": {"list": "timesteps from a list"},
    "precision.compute": {"fp16": "fp16 with loss scaling"},
}

SECRETS = frozenset(
    {
        "access_key",
        "access_token",
        "api_key",
        "auth_token",
        "aws_access_key_id",
        "aws_secret_access_key",
        "comet_api_key",
        "hf_token",
        "huggingface_token",
        "password",
        "secret",
        "secret_key",
        "token",
        "wandb_api_key",
    }
)
_SECRET = re.compile(r"secret|password|passwd|credential|api_?key|access_?key|auth(?!or)|(^|_)token$", re.IGNORECASE)


def names_secret(name: str) -> bool:
    """Whether a key, an option or a variable of this name is likely to hold a secret, which nobody should be shown."""
    return name.lower() in SECRETS or _SECRET.search(name) is not None


def unusable_keys(raw: RawConfig) -> Iterator[tuple[Path, UsageError]]:
    """An error for each key or value of ``raw`` that cannot be used, with its path; outermost keys only."""
    found: set[Path] = set()
    for path, value in walk(raw):
        if any(path[:length] in found for length in range(1, len(path))):
            continue
        error = _unusable(raw, path, value)
        if error is not None:
            found.add(path)
            yield path, error


def refusal(path: Path) -> tuple[str, str] | None:
    """Why a key cannot be used, as (``planned`` or ``not applicable``, reason); None for one that is not refused."""
    if reason := _lookup(NOT_APPLICABLE, path):
        return "not applicable", reason
    if reason := _lookup(PLANNED, path):
        return "planned", reason
    return None


def refused_values(path: Path) -> Mapping[str, str]:
    """Values of a key that are planned, and the features they are for; empty text for what is never written."""
    found: Mapping[str, str] = _lookup(PLANNED_VALUES, path) or {}
    return found


def _unusable(raw: RawConfig, path: Path, value: Any) -> UsageError | None:
    key = path[-1]
    if isinstance(key, str) and key.lower() in SECRETS:
        return UsageError(
            "a secret does not belong into a configuration",
            where=raw.where(path),
            why="configurations are copied into run folders and shared",
            fix=f"take it out and set it in the environment, for example {key.upper()}",
        )
    if path == ("validation",):
        return UsageError("unknown key 'validation'", where=raw.where(path), fix="the section is called 'validate'")
    if reason := _lookup(NOT_APPLICABLE, path):
        return UsageError(f"{dotted(path)} does not apply", where=raw.where(path), why=reason, fix="take it out")
    if reason := _lookup(PLANNED, path):
        return _not_built(raw, path, dotted(path), reason)
    values = _lookup(PLANNED_VALUES, path)
    if values and isinstance(value, str) and value in values:
        if not values[value]:
            return UsageError(
                f"{dotted(path)} = {value!r} is not written",
                where=raw.where(path),
                why="only safetensors files are safe",
            )
        return _not_built(raw, path, f"{dotted(path)} = {value!r}", values[value], "choose another value")
    return None


def _not_built(raw: RawConfig, path: Path, name: str, feature: str, fix: str = "take it out") -> UsageError:
    return UsageError(
        f"{name} is planned and not built yet", where=raw.where(path), why=f"it is for: {feature}", fix=fix
    )


def _lookup(table: Mapping[str, Any], path: Path) -> Any:
    for form in _forms(path):
        for pattern, found in table.items():
            parts = pattern.split(".")
            if len(parts) == len(form) and all(want in ("*", part) for want, part in zip(parts, form, strict=True)):
                return found
    return None


def _forms(path: Path) -> Iterator[tuple[str, ...]]:
    """The path itself and, for what sources inherit, the path it would have in a source."""
    parts = tuple(str(part) for part in path)
    yield parts
    if parts[:2] == ("data", "defaults") and len(parts) > 2:
        yield ("data", "sets", "0", "sources", "0", *parts[2:])
    elif parts[:2] == ("data", "sets") and len(parts) > 3 and parts[3] != "sources":
        yield ("data", "sets", "0", "sources", "0", *parts[3:])
