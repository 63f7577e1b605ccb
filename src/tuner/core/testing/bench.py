"""What the conformance tests share: pictures, a complete configuration, open runs, loaded models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuner.core.config.document import merged
from tuner.core.data.text_cache import cached_fields
from tuner.core.optim import build_optimizer
from tuner.core.registry import Catalog, Opened, Run, open_facts, open_run, typed_config
from tuner.core.rng import Rng
from tuner.core.track.events import read_events
from tuner.core.train.empty import EmptyCaption
from tuner.core.train.run import train
from tuner.core.train.step import TrainStep
from tuner.core.train.updates import build_update, rate_scale
from tuner.core.types import Batch, Item, ModelFacts, Models, Network, TextEmbeds

CAPTIONS = ("a red dog on grass", "", "two green birds, a blue wall, and a long story about what they see there")
STEPS = 5


@dataclass
class Bench:
    """One plugin with one tiny model. ``settings`` is what the test class gave; ``folder`` is for files.

    Everything is in float32 where the model allows it, so that runs can be compared up to rounding.
    """

    plugin: str
    settings: Mapping[str, Any]
    folder: Path
    lr: float

    # --- configuration ------------------------------------------------------------------------------------------------

    @cached_property
    def opened(self) -> Opened:
        """Facts of the tiny model under the settings of the test class alone."""
        return open_document(self._merged(self.settings))

    @property
    def facts(self) -> ModelFacts:
        return self.opened.facts

    @property
    def sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(height, width) in pixels of two aspect ratios on the model's grid, about 64 pixels or four units wide."""
        multiple = self.facts.resolution_multiple
        side = max(4 * multiple, -(-64 // multiple) * multiple)
        return (side, side), (side - multiple, side + multiple)

    def config(self, name: str = "run", **sections: Any) -> dict[str, Any]:
        """A complete configuration with the run folder ``name``; ``sections`` win over all other settings."""
        facts = self.facts
        (side, _), _ = self.sizes
        compute = "fp32" if "float32" in facts.dtypes.compute else "bf16"
        source = {"id": "pictures", "path": str(self.pictures)}
        cache = sections.get("cache", {})
        live = cache.get("latents") == cache.get("text") == "off"
        buckets = {"min": side // 2, "step": facts.resolution_multiple}
        exact = {
            "precision": {
                "compute": compute,
                "vae": "fp32",
                "text_encoder": dict.fromkeys(facts.text_components, compute),
            },
            "data": {"sets": [{"resolution": side, "batch_size": 2, "buckets": buckets, "sources": [source]}]},
            "cache": {} if live else {"dtype": "fp32"},
            "checkpoint": {"dir": str(self.folder / name), "name": "adapter"},
        }
        return self._merged(exact, self.settings, sections)

    def _merged(self, *documents: Mapping[str, Any]) -> dict[str, Any]:
        document: dict[str, Any] = {
            "model": {"family": self.plugin},
            "data": {
                "sets": [{"sources": [{"id": "none", "path": str(self.folder)}]}],
                "workers": {"scan": 0, "cache": 0, "load": 0},
            },
            "cache": {"dir": str(self.folder / "cache")},
            "network": {"rank": 4},
            "optimizer": {"lr": self.lr},
            "schedule": {"name": "constant"},
            "train": {"steps": STEPS, "seed": 3},
            "checkpoint": {"dir": str(self.folder / "run")},
            "log": {"plain": True},
        }
        for each in documents:
            document = merged(document, each)
        if document["train"].get("mode") == "full":
            del document["network"]
        return document

    @cached_property
    def pictures(self) -> Path:
        """Six captioned pictures of two aspect ratios."""
        from PIL import Image

        folder = self.folder / "pictures"
        folder.mkdir()
        for number in range(6):
            height, width = self.sizes[number % 2]
            noise = Image.effect_noise((2 * width, 2 * height), 30 + 20 * number)
            noise.convert("RGB").save(folder / f"{number}.png")
            (folder / f"{number}.txt").write_text(f"a red dog, number {number}, on grass", encoding="utf-8")
        return folder

    # --- runs and models ----------------------------------------------------------------------------------------------

    def open(self, **sections: Any) -> Run:
        return open_run(self.config(**sections))

    @cached_property
    def run(self) -> Run:
        """The run that most checks look at: the denoiser trains, all else is frozen."""
        return self.open()

    @cached_property
    def models(self) -> Models:
        """All components of `run`, without an adapter."""
        return self.run.model.load_models(self.facts.components)

    def text(self, captions: Sequence[str]) -> TextEmbeds:
        """What a step without caches hands to ``predict``."""
        return self.frozen_text(self.run, self.models, captions)

    def frozen_text(self, run: Run, models: Models, captions: Sequence[str]) -> TextEmbeds:
        """The fields of ``run`` that its cache would hold, encoded by frozen ``models``."""
        fields = cached_fields(run.config, run.facts)
        used = {name for field in fields.values() for name in field.of}
        if not used:
            return TextEmbeds(tensors={})
        with torch.no_grad():
            return run.model.encode_text(models, captions, [name for name in run.facts.components if name in used])

    def pixels(self, count: int, size: tuple[int, int]) -> Tensor:
        """Smooth pictures [B,3,H,W] float32 in -1..1."""
        coarse = Rng(7, "pixels", count, *size).uniform((count, 3, 4, 4)) * 2 - 1
        return torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")

    def latents(self, count: int, size: tuple[int, int]) -> Tensor:
        with torch.no_grad():
            return self.run.model.encode_latents(self.models, self.pixels(count, size))

    def batch(self, count: int = 2, run: Run | None = None) -> Batch:
        """Square pictures with their captions, encoded as the caches of ``run`` (None: the bench's) hold them."""
        items = tuple(Item(id=str(number), source="bench", caption=CAPTIONS[number]) for number in range(count))
        return Batch(
            latents=self.latents(count, self.sizes[0]),
            text=self.frozen_text(run or self.run, self.models, [item.caption for item in items]),
            loss_mask=None,
            loss_weight=torch.ones(count),
            items=items,
        )

    def predict(self, run: Run, models: Models, batch: Batch, sigma: float = 0.6) -> Tensor:
        """Velocity of a batch at one noise level and fixed noise, under no_grad."""
        noise = Rng(7, "noise").normal(batch.latents.shape)
        sigmas = torch.full((batch.latents.shape[0],), sigma)
        with torch.no_grad():
            target = run.model.noise_target(batch.latents, noise, sigmas)
            return run.model.predict(models, target.noisy, target.timesteps, batch.text).float()

    def adapted(self, run: Run) -> tuple[Models, Network]:
        """Fresh components of a step with the network of ``run`` in them."""
        wanted = {"denoiser", *run.config.train.components, *run.facts.step_components, *live_components(run)}
        models = run.model.load_models([name for name in run.facts.components if name in wanted])
        return models, run.model.build_network(models)

    def step(self, run: Run, models: Models, network: Network) -> TrainStep:
        """The update of a training; called again with one step number it draws the same noise."""
        config, live = run.config, live_components(run)
        optimizer = build_optimizer(
            config.optimizer,
            network.param_groups,
            torch.device("cpu"),
            run.facts.text_components,
            scale=rate_scale(config),
        )
        return TrainStep(
            model=run.model,
            models=models,
            network=network,
            optimizer=optimizer,
            config=config,
            device=torch.device("cpu"),
            live_text=live,
            update=build_update(config, optimizer, network, run.facts, torch.device("cpu")),
            total=1000,
            empty=EmptyCaption(
                config.guidance,
                run.facts.text_fields,
                cached=lambda texts: self.frozen_text(run, self.models, texts),
                live=lambda texts: run.model.encode_text(models, texts, live),
            ),
        )

    # --- whole trainings ----------------------------------------------------------------------------------------------

    @cached_property
    def trained(self) -> Path:
        """The folder of a plain training on caches."""
        return self.train("trained")

    def train(self, name: str, *, resume: str | None = None, **sections: Any) -> Path:
        """Train into the folder ``name``; the configuration is that of `config`."""
        summary = train(self.config(name, **sections), resume=resume)
        return summary.folder


def live_components(run: Run) -> tuple[str, ...]:
    """The components behind text that cannot be cached because something of it trains."""
    cached = cached_fields(run.config, run.facts)
    live = {name for field, spec in run.facts.text_fields.items() if field not in cached for name in spec.of}
    return tuple(name for name in run.facts.components if name in live)


def open_document(document: Mapping[str, Any]) -> Opened:
    """The facts of a configuration; no weight is read."""
    catalog = Catalog()
    return open_facts(typed_config(document, catalog), catalog)


def losses(folder: Path) -> dict[int, float]:
    """Loss by step; a step that was done again after a resume counts as it ended."""
    return {event["step"]: event["loss"] for event in read_events(folder / "events.jsonl") if event["kind"] == "step"}


def assert_near(found: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal up to what other batch shapes round differently; a mistake is larger by orders of magnitude."""
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=lambda text: f"{what} {text}".strip())
