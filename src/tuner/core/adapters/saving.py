"""What the ``save`` hooks of models share: the file in the configured format, and strings that all of them write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from tuner.core.adapters.checkpoints import checkpoint_dtype, save_checkpoint, stored_files
from tuner.core.adapters.files import save_adapter
from tuner.core.adapters.formats import format_by_name, key_maps
from tuner.core.compute.dtypes import dtype_by_name
from tuner.core.config.network import SPLITTING, has_rank

if TYPE_CHECKING:
    from tuner.core.config import LossConfig, NoiseConfig, RunConfig
    from tuner.core.types import ModelFacts


def save_configured(
    tensors: Mapping[str, Tensor],
    config: RunConfig,
    facts: ModelFacts,
    path: Path,
    metadata: Mapping[str, str],
    own: Mapping[str, object],
) -> list[Path]:
    """One safetensors file in ``checkpoint.format`` and ``checkpoint.dtype``, or the files of a whole model in the
    layout that they had; returns the paths.

    own: the model's strings for the header, which win over ``metadata``; neither is written when
    ``checkpoint.metadata.embed`` is off.
    """
    if config.train.mode == "full":
        strings = {**metadata, **_full_strings(facts, own)} if config.checkpoint.metadata.embed else {}
        return save_checkpoint(tensors, stored_files(config, facts), path, strings, checkpoint_dtype(config))
    fmt = format_by_name(key_maps(facts), config.checkpoint.format)
    dtype = dtype_by_name(config.checkpoint.dtype or config.precision.adapter)
    strings = {**metadata, **{key: str(value) for key, value in own.items()}}
    return [save_adapter(tensors, fmt, path, strings if config.checkpoint.metadata.embed else {}, dtype)]


def _full_strings(facts: ModelFacts, own: Mapping[str, object]) -> dict[str, str]:
    """The model's strings for an adapter, without what belongs to adapters alone."""
    kept = {key: str(value) for key, value in own.items() if not key.startswith("ss_network_")}
    return {"format": "pt", **kept, "modelspec.architecture": facts.architecture}


def adapter_strings(config: RunConfig, facts: ModelFacts) -> dict[str, object]:
    """Header strings that other programs show for an adapter of any family; keys are those of kohya-ss/sd-scripts."""
    network, noise = config.network, config.noise.resolved(facts.noise)
    sizes = [size for each in config.data.sets for size in each.resolution]
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    values: dict[str, object] = {
        "modelspec.architecture": f"{facts.architecture}/lora",
        "modelspec.resolution": f"{width}x{height}",
        "ss_weighting_scheme": _scheme(noise, config.loss),
        "ss_logit_mean": noise.logit_mean,
        "ss_logit_std": noise.logit_std,
        "ss_mode_scale": noise.mode_scale,
        "ss_network_args": json.dumps(network_args(config)),
    }
    if network.type != "lora":
        # What LyCORIS calls it, so that its users find it.
        values["ss_network_args"] = json.dumps({"algo": network.type, **network_args(config)})
    if network.rank != "from_file" and has_rank(network):
        # A start inside the weights is written as a second adapter beside the first.
        times = 2 if network.init in SPLITTING else 1
        rank, alpha = times * network.rank, times * (network.alpha or network.rank)
        values |= {"ss_network_dim": rank, "ss_network_alpha": alpha}
    return values


def _scheme(noise: NoiseConfig, loss: LossConfig) -> str:
    """One option of sd-scripts names either a weight or a density of noise levels."""
    if loss.weighting in ("none", "uniform"):
        if noise.timesteps == "sigma" and noise.density != "uniform":
            return noise.density
        if noise.timesteps in ("logit_normal", "mode"):
            return noise.timesteps
    return loss.weighting


def network_args(config: RunConfig) -> dict[str, object]:
    """What was adapted, beside rank and alpha: the components and every setting of the network that was changed."""
    kept = {"type", "rank", "alpha", "init_from"}
    changed = config.network.model_dump(mode="json", exclude=kept, exclude_defaults=True)
    return {"components": list(config.train.components), **changed}
