"""What an exported file says about its making: an allow-list of plain facts, no path, no user name, no secret.

No time of day either: the same run gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.data.plan import DataPlan


def export_metadata(
    config: RunConfig,
    plan: DataPlan,
    *,
    name: str,
    step: int,
    epoch: int,
    total: int,
    averaged: bool = False,
    merged: Sequence[Mapping[str, object]] = (),
) -> dict[str, str]:
    """Strings for the header of an exported file; empty when ``checkpoint.metadata.embed`` is off.

    averaged: the file holds the average of the weights. merged: the adapters that its base has in it, from the run's
    manifest.

    ``ss_*`` are the names that kohya-ss/sd-scripts writes and other tools show; ``modelspec.*`` follow the Stability AI
    model metadata standard. The model plugin adds its own.
    """
    settings = config.checkpoint.metadata
    if not settings.embed:
        return {}
    clip = config.train.clip_grad
    facts: dict[str, object] = {
        "tuner_version": version("tuner"),
        "ss_output_name": name,
        "ss_steps": step,
        "ss_epoch": epoch,
        "ss_max_train_steps": total,
        "ss_seed": config.train.seed,
        "ss_learning_rate": config.optimizer.lr,
        "ss_optimizer": config.optimizer.name,
        "ss_lr_scheduler": config.schedule.name,
        "ss_gradient_accumulation_steps": config.train.accumulate,
        "ss_max_grad_norm": clip.norm if clip is not None and clip.norm is not None else 0.0,
        "ss_mixed_precision": config.precision.compute,
        "ss_gradient_checkpointing": config.memory.checkpointing != "off",
        "ss_loss_type": config.loss.type,
        "ss_num_train_images": sum(item.repeats for item in plan.items),
        "ss_num_validation_images": len(plan.validation),
        "ss_num_batches_per_epoch": plan.batches_per_epoch,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": settings.title or name,
    }
    optional = {
        "modelspec.author": settings.author,
        "modelspec.description": settings.description,
        "modelspec.license": settings.license,
        "modelspec.tags": ", ".join(settings.tags),
        "ss_training_comment": settings.comment,
    }
    facts.update({key: value for key, value in optional.items() if value})
    facts.update(_guidance(config))
    facts.update(_ema(config, averaged))
    if merged:
        facts["tuner_merged_into_base"] = json.dumps(list(merged))
    return {key: str(value) for key, value in facts.items()}


def _guidance(config: RunConfig) -> dict[str, object]:
    guidance, facts = config.guidance, dict[str, object]()
    if guidance.distill is not None:
        facts["ss_guidance_distill_scale"] = guidance.distill.scale
        facts["ss_guidance_zero_star"] = guidance.distill.zero_star
    if guidance.differential is not None:
        facts["ss_guidance_differential"] = guidance.differential
    return facts


def _ema(config: RunConfig, averaged: bool) -> dict[str, object]:
    """``ss_ema_weights`` tells the two files of a run apart."""
    if not config.ema.enabled:
        return {}
    names = ("decay", "warmup", "start", "every", "feedback", "multiplier")
    return {"ss_ema_weights": averaged} | {f"ss_ema_{name}": getattr(config.ema, name) for name in names}
