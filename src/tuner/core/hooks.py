"""The hook specifications: the contract between the core and plugins.

Model hooks stop at the first result. "Model" hooks have exactly one implementation, from the model plugin; "default"
hooks have one in the core that the model may override. Extensions may only wrap them (``@hookimpl(wrapper=True)``).
Hooks are called outside compiled code. Shapes: B batch, C latent channels, h/w latent size, H/W pixels.

Adding an argument is compatible: an implementation names only those it wants.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.core.config import RunConfig
    from tuner.core.rng import Rng
    from tuner.core.types import ModelFacts, Models, Network, NoiseTarget, Placement, TextEmbeds

PROJECT = "tuner"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

MODEL_HOOKS = ("load_models", "encode_text", "encode_latents", "decode_latents", "predict", "save")
"""Hooks that the model plugin must implement."""
DEFAULT_HOOKS = ("noise_target", "build_network")
"""Hooks that the core implements and a model may override."""
RUN_HOOKS = ("on_run_start", "on_step_end", "on_checkpoint", "on_run_end", "extra_metrics", "extra_metadata")
"""Hooks for extensions: every implementation is called."""


# --- model hooks: loading ---------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def load_models(config: RunConfig, facts: ModelFacts, components: Collection[str], placement: Placement) -> Models:  # type: ignore[empty-body]
    """Load the named components and nothing else. Called once per phase. Since 1.0. Model.

    components: names from ``facts.components``. The result holds modules in eval mode with ``requires_grad`` False, on
    ``placement.device`` in ``placement.dtype(component)``; tokenizers of named text components come along.
    The device ``meta`` asks for names and shapes without values, for checks of models that do not fit into memory.
    Raises UsageError naming every missing or unknown key; ``files`` of the descriptor has resolved all paths before.
    """


@hookspec(firstresult=True)
def encode_text(  # type: ignore[empty-body]
    models: Models, config: RunConfig, facts: ModelFacts, captions: Sequence[str], components: Collection[str]
) -> TextEmbeds:
    """Encode B captions into the text fields that come from ``components``. Since 1.0. Model.

    ``""`` must work: it is the unconditional. Fields whose components are all frozen are produced under no_grad and
    cached on the CPU; fields of training components are asked for inside the step, with grad. Result tensors are
    [B, ...] on the device of the modules, padded to the longest item only.
    """


@hookspec(firstresult=True)
def encode_latents(models: Models, config: RunConfig, pixels: Tensor, rng: Rng | None) -> Tensor:  # type: ignore[empty-body]
    """Pixels [B,3,H,W] float32 in -1..1 to latents [B,C,h,w] float32, as the denoiser wants them. Since 1.0. Model.

    Called under no_grad. H and W are multiples of ``facts.resolution_multiple``. ``rng`` is keyed by the image for a
    posterior sample; None asks for the mode.
    """


@hookspec(firstresult=True)
def decode_latents(models: Models, config: RunConfig, latents: Tensor) -> Tensor:  # type: ignore[empty-body]
    """Latents [B,C,h,w] float32 to pixels [B,3,H,W] float32 in -1..1. Called under no_grad. Since 1.0. Model."""


# --- model hooks: training --------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def noise_target(config: RunConfig, latents: Tensor, noise: Tensor, sigmas: Tensor) -> NoiseTarget:  # type: ignore[empty-body]
    """Noisy latents and the velocity target ``noise - latents``. Since 1.0. Default: rectified flow.

    latents, noise [B,C,h,w] float32; sigmas [B] float32, drawn by the core. At sigma 0 ``noisy`` equals ``latents``, at
    sigma 1 it equals ``noise``. ``timesteps`` is sigma in the unit of the denoiser.
    """


@hookspec(firstresult=True)
def predict(  # type: ignore[empty-body]
    models: Models,
    config: RunConfig,
    facts: ModelFacts,
    noisy: Tensor,
    timesteps: Tensor,
    text: TextEmbeds,
    guidance: Tensor | None,
    control: Mapping[str, Tensor],
    rng: Rng | None,
) -> Tensor:
    """One denoiser forward: velocity [B,C,h,w] for noisy [B,C,h,w] float32 at timesteps [B] float32. Since 1.0. Model.

    Grad mode is the caller's. Packing, position ids, masks, frame axes and guidance inputs live in here. ``rng`` is set
    in training only, for random draws of the model's own.
    """


@hookspec(firstresult=True)
def build_network(models: Models, config: RunConfig, facts: ModelFacts) -> Network:  # type: ignore[empty-body]
    """Build what trains and inject it in place. Since 1.0. Default: a LoRA.

    The default chooses modules by ``facts.lora`` and ``config.network``.

    Only parameters of the result may require grad afterwards.
    """


@hookspec(firstresult=True)
def save(  # type: ignore[empty-body]
    config: RunConfig,
    facts: ModelFacts,
    network: Network,
    tensors: Mapping[str, Tensor],
    path: Path,
    metadata: Mapping[str, str],
) -> list[Path]:
    """Write the trained tensors as safetensors in the configured format; returns the paths. Since 1.0. Model.

    tensors: trained values by ``component:module path.part``, raw or EMA, on the CPU; those of a whole model are live
    and on the devices where they train. metadata: allow-listed strings the plugin may add its own keys to; no path,
    user name or secret may go in.
    """


# --- extension hooks --------------------------------------------------------------------------------------------------


@hookspec
def on_run_start(run: Any) -> None:
    """A run is about to take its first step. Since 1.0."""


@hookspec
def on_step_end(step: int, metrics: Mapping[str, float]) -> None:
    """An optimizer update is done. Since 1.0."""


@hookspec
def on_checkpoint(step: int, paths: Sequence[Path]) -> None:
    """A checkpoint is complete on disk. Since 1.0."""


@hookspec
def on_run_end(summary: Mapping[str, Any]) -> None:
    """The run has ended and its files are written. Since 1.0."""


@hookspec
def extra_metrics(step: int) -> Mapping[str, float]:  # type: ignore[empty-body]
    """Numbers to log beside the core's own. A name that two extensions use is an error. Since 1.0."""


@hookspec
def extra_metadata() -> Mapping[str, str]:  # type: ignore[empty-body]
    """Strings to embed in exported files. A key that is already there is an error. Since 1.0."""
