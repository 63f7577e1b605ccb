"""``checkpoint``, ``sample``, ``validate``, ``log``: what a run writes and shows."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from tuner.core.config.base import (
    Count,
    Dtype,
    Every,
    EveryFields,
    NotNegative,
    Positive,
    Section,
    Share,
    is_int,
    not_zero,
)


class MetadataConfig(Section):
    """Text embedded in exported files."""

    embed: bool = True
    """Off: write no training metadata."""
    title: str | None = None
    """Title."""
    author: str | None = None
    """Author."""
    description: str | None = None
    """Description."""
    license: str | None = None
    """License."""
    tags: tuple[str, ...] = ()
    """Tags."""
    comment: str | None = None
    """Free text."""


class RollingConfig(Section):
    """A second series of checkpoints, of which only the newest stay: to lose little when the machine stops."""

    every: Every
    """When to save one. Where a checkpoint of ``checkpoint.every`` is due as well, that is the one that is written."""
    keep: Count = 1
    """Keep so many of this series."""


class CheckpointConfig(Section):
    """What is saved, and where."""

    dir: str
    """Run folder: configuration, events, checkpoints, samples and the final file."""
    name: str | None = Field(None, pattern=r"^[^/\\]+$")
    """Base name of adapter files. Left out: the name of the folder."""
    every: Every | None = None
    """When to save besides the end of the run. Left out: only at the end."""
    keep_last: Count | None = None
    """Keep so many checkpoints; older ones are removed. Left out: all."""
    rolling: RollingConfig | None = None
    """Further checkpoints, more often, that replace each other. Left out: none."""
    state: Literal["none", "every", "last"] = "last"
    """Which checkpoints keep what is needed to resume."""
    format: str | None = None
    """Names of the tensors in exported files. Left out: the model's default."""
    dtype: Dtype | None = None
    """Dtype of exported tensors. Left out: the adapter's."""
    save_ema: bool = True
    """Save the average as well, where ``ema`` keeps one: ``ema_`` and the name of the file."""
    resume: str = "none"
    """``none``, ``auto`` for the newest state in the run folder, or the path of a checkpoint."""
    start_at: Annotated[int, Field(ge=1)] | None = None
    """Begin a run that has no state to resume as if so many updates were done: for weights that trained elsewhere, as
    ``network.init_from``. Rates, dates, names of files and the order of the data go on from there; ``train.steps``
    still is the whole length, and the optimizer knows nothing yet."""
    strict_data: bool = False
    """Refuse to resume when images or captions changed. Off: say what changed and go on with the next epoch."""
    on_interrupt: Literal["save", "stop"] = "save"
    """At SIGINT or SIGTERM: finish the step and save, or just stop."""
    metadata: MetadataConfig = MetadataConfig()
    """Embedded text."""


def _size(value: Any) -> Any:
    return (value, value) if is_int(value) else tuple(value) if isinstance(value, list) else value


Size = Annotated[
    tuple[Count, Count], BeforeValidator(_size, json_schema_input_type=Annotated[int, Field(ge=1)] | tuple[int, int])
]


class SampleAdapter(Section):
    """An adapter that acts in pictures and in nothing else."""

    path: str
    """Adapter file in any format that the model knows."""
    strength: Annotated[float, AfterValidator(not_zero)] = 1.0
    """Factor on what the adapter changes; below 0 it is taken away."""


class SampleConfig(Section):
    """Pictures made during training."""

    enabled: bool = True
    """Off: none at all."""
    every: Every | None = None
    """When to draw. Left out: at the end of the run only."""
    at_start: bool = False
    """Also before the first step."""
    prompts: str | tuple[str, ...] = ()
    """Prompt lines, or the path of a prompt file. A line may set ``--n --w --h --d --s --l --g --fs --ss``."""
    negative: str = ""
    """Negative prompt."""
    seed: int = Field(0, ge=0)
    """Seed of the first picture; picture number i uses seed + i."""
    size: Size | None = None
    """Edge, or ``[width, height]``. Left out: the model's default."""
    steps: Count | None = None
    """Sampler steps. Left out: the model's default."""
    cfg: NotNegative | None = None
    """Strength of classifier-free guidance. Left out: the model's default."""
    embedded_guidance: NotNegative | None = None
    """Value of the embedded guidance, for models with that input. Left out: the model's default."""
    shift: Positive | Literal["auto"] | None = None
    """Shift of the sampler's noise levels; ``auto`` goes by the size of the picture. Left out: the model's default."""
    count: Count = 1
    """Pictures per prompt."""
    sampler: Literal["euler", "heun"] = "euler"
    """How the flow is followed. ``heun`` predicts twice in every step but the last and is closer to the flow's path. A
    line may set ``--ss``."""
    cfg_rescale: Share = 0.0
    """Bring the contrast of guided predictions back towards that without guidance: 0 not at all, 1 fully. Against the
    burnt look of strong ``cfg``."""
    adapter_strength: Annotated[float, AfterValidator(not_zero)] = 1.0
    """Factor on what the adapter that trains changes, in pictures alone. Files and the training do not know of it."""
    adapters: tuple[SampleAdapter, ...] = ()
    """Further adapters, in all pictures, those of the base model too. Their changes of the base add up with that of the
    adapter that trains."""
    weights: Literal["train", "ema", "both"] = "train"
    """Draw with the weights as they train, with their average, or with both side by side. Before the first step
    there is no average yet, so one column is drawn."""


class ValidateConfig(Section):
    """Loss on held-out images, at fixed noise."""

    split: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training images that is held out."""
    seed: int | None = Field(None, ge=0)
    """Seed of the split and of the noise. Left out: ``train.seed``."""
    every: Every | None = EveryFields(epochs=1)
    """When to measure; null for the end of the run only."""
    max_batches: Count | None = None
    """Use so many batches. Left out: all."""
    timesteps: tuple[Annotated[float, Field(ge=0, le=1000)], ...] = Field((200, 400, 600, 800), min_length=1)
    """Every image is measured at each of these timesteps."""
    pool: bool = True
    """One result over all held-out images. Off: one for each source as well, to tell what is learned from what is
    forgotten."""
    weights: Literal["train", "ema", "both"] = "train"
    """Measure the weights as they train, their average, or both."""


class LogConfig(Section):
    """What is recorded besides the event log, which is always written."""

    to: tuple[str, ...] = ()
    """Further places for the numbers: ``tensorboard``, ``wandb``, or the name of an installed logger plugin."""
    dir: str | None = None
    """Folder for trackers. Left out: inside the run folder."""
    config: bool = True
    """Tell ``tensorboard`` and ``wandb`` the settings as well, without folders."""
    project: str | None = None
    """Project at ``wandb``. Left out: ``tuner``."""
    run: str | None = None
    """Name of the run at ``wandb``. Left out: the name of the run folder."""
    args: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Further arguments by tracker: ``{"wandb": {"entity": "us", "tags": ["style"]}}`` for its ``init``."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """Messages shown."""
    plain: bool | None = None
    """Plain lines instead of live progress. Left out: plain when there is no terminal."""
    file: str | None = None
    """Also write messages to this file."""
