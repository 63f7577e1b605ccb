"""FLUX.1 dev and SD3.5 as their plugins load them, at public size, for one training step under fake tensors."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.models import RANK
from tests.fixtures.full_size import full_size_flux, full_size_sd3
from tuner.core.compute.modulation_cache import cache_modulations
from tuner.core.memory.checkpointing import apply_checkpointing
from tuner.core.registry import Run, open_run
from tuner.core.types import Models, Placement, TextEmbeds


@dataclass(frozen=True)
class Family:
    """files: a folder to the ``model`` section. modulations: kinds of linears that get no adapter. tokens: T5 rows."""

    plugin: str
    files: Callable[[Path], dict[str, Any]]
    modulations: tuple[str, ...]
    tokens: int


FAMILIES = {
    "flux": Family("flux", lambda folder: full_size_flux(folder, "dev"), ("img_mod", "txt_mod", "single_mod"), 512),
    "sd35-medium": Family("sd3", lambda folder: full_size_sd3(folder, "sd35m"), ("x_mod", "context_mod"), 256),
    "sd35-large": Family("sd3", lambda folder: full_size_sd3(folder, "sd35l"), ("x_mod", "context_mod"), 256),
}


@dataclass
class FakeStep:
    """One training step, which works inside the mode it was made in."""

    run: Run
    models: Models
    denoiser: nn.Module
    batch: int
    size: int

    def loss(self) -> Tensor:
        """The forward pass as a training runs it, from latents to the mean squared error."""
        facts = self.run.facts
        side = self.size // facts.spatial_factor
        latents = torch.empty(self.batch, facts.latent_channels, side, side)
        sigmas = torch.empty(self.batch)
        text = TextEmbeds(
            tensors={name: torch.empty(self._shape(field.shape), dtype=getattr(torch, field.dtype))
                     for name, field in facts.text_fields.items()}
        )  # fmt: skip
        prediction = self.run.model.predict(self.models, latents, sigmas, text)
        return F.mse_loss(prediction, torch.empty_like(latents))

    def _shape(self, shape: tuple[int | str, ...]) -> tuple[int, ...]:
        tokens = self.run.facts.max_tokens["t5"]
        return (self.batch, *(tokens if isinstance(size, str) else size for size in shape))


def fake_step(family: str, *, level: str, size: int, batch: int) -> FakeStep:
    """The step of a public model with rank-16 adapters on all linears of the blocks but the frozen modulations.

    level: a value of ``memory.checkpointing``.

    Must be called inside a `FakeTensorMode`, which is left while the modules are built.
    """
    chosen = FAMILIES[family]
    with torch._subclasses.fake_tensor.unset_fake_temporarily(), tempfile.TemporaryDirectory() as name:
        run = open_run(_config(chosen, Path(name)))
        placement = Placement(device="meta", dtypes={"denoiser": "bfloat16"})
        with torch.device("meta"):
            models = run.model.load_models(["denoiser"], placement)
    denoiser = models.denoiser
    assert denoiser is not None
    _materialize(denoiser)
    run.model.build_network(models)
    lists = [blocks.path for blocks in run.facts.block_lists]
    cache_modulations(denoiser, run.facts.modulation, lists)
    for path in lists:
        apply_checkpointing(denoiser.get_submodule(path).children(), level)
    return FakeStep(run, models, denoiser, batch, size)


def _config(family: Family, folder: Path) -> dict[str, Any]:
    source = {"id": "none", "path": str(folder)}
    return {
        "model": {"family": family.plugin, **family.files(folder / "model")},
        "data": {"sets": [{"sources": [source]}]},
        "cache": {"dir": str(folder / "cache")},
        "network": {"rank": RANK, "exclude": list(family.modulations)},
        "optimizer": {"lr": 1e-4},
        "train": {"steps": 1},
        "text_encoder": {"max_tokens": {"t5": family.tokens}},
        "checkpoint": {"dir": str(folder / "run")},
    }


def _materialize(module: nn.Module) -> None:
    """Give meta parameters and buffers storage on the (fake) CPU, adjacent ones adjacent again."""
    assert isinstance(torch._guards.active_fake_mode(), FakeTensorMode)
    groups = []
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            child.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        for name, buffer in child.named_buffers(recurse=False):
            child._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        if "storage_group" in child.__dict__:
            groups.append(child.__dict__["storage_group"])
    for group in {id(group): group for group in groups}.values():
        group.link()
