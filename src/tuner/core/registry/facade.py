"""The model of a run, as the rest of the program sees it: typed methods, checked at the first call of each hook."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.core.registry.blank import blank_text
from tuner.core.registry.checks import Contract
from tuner.core.registry.tiles import in_tiles
from tuner.core.types import Models, Placement, TextEmbeds

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.core.config import RunConfig
    from tuner.core.rng import Rng
    from tuner.core.types import ModelFacts, Network, NoiseTarget


@dataclass(slots=True)
class ModelFacade:
    """One model, opened with one configuration. Shapes: B batch, C latent channels, h/w latent size, H/W pixels.

    title: how messages name the plugin. files: component to the files whose bytes make it. Every method raises a
    UsageError that names the plugin when the first result of its hook does not keep the contract.
    """

    title: str
    config: RunConfig
    facts: ModelFacts
    files: Mapping[str, Sequence[Path]]
    _hooks: Any
    _contract: Contract = field(init=False)

    def __post_init__(self) -> None:
        self._contract = Contract(self.title, self.facts)

    def load_models(self, components: Collection[str], placement: Placement | None = None) -> Models:
        """Load the named components. ``placement`` None: the CPU, dtypes of ``config.precision``."""
        chosen = placement or default_placement(self.config, self.facts)
        models: Models = self._hooks.load_models(
            config=self.config, facts=self.facts, components=tuple(components), placement=chosen
        )
        self._contract.loaded(models, components)
        return models

    def encode_text(
        self, models: Models, captions: Sequence[str], components: Collection[str] | None = None
    ) -> TextEmbeds:
        """B captions to the text fields that come from ``components`` (None: all text components)."""
        wanted = self.facts.text_components if components is None else tuple(components)
        embeds: TextEmbeds = self._hooks.encode_text(
            models=models, config=self.config, facts=self.facts, captions=captions, components=wanted
        )
        self._contract.text(embeds, len(captions))
        return self._unconditional(embeds, captions)

    def _unconditional(self, embeds: TextEmbeds, captions: Sequence[str]) -> TextEmbeds:
        """With zeros for empty captions where ``text_encoder.unconditional`` asks for them."""
        zero = [name for name, kind in self.config.text_encoder.unconditional.items() if kind == "zero"]
        if not zero or "" not in captions:
            return embeds
        some = next(iter(embeds.tensors.values()))
        kept = some.new_tensor([caption != "" for caption in captions]).bool()
        return TextEmbeds(tensors=blank_text(embeds.tensors, self.facts.text_fields, dict.fromkeys(zero, kept)))

    def encode_latents(self, models: Models, pixels: Tensor, rng: Rng | None = None) -> Tensor:
        """Pixels [B,3,H,W] float32 in -1..1 to latents [B,C,h,w] float32; ``rng`` None takes the posterior's mode."""
        factor = self.facts.spatial_factor

        def encode(part: Tensor, number: int) -> Tensor:
            # Tiles of one picture draw their own parts of the posterior.
            own = rng if rng is None or number == 0 else rng.child("tile", number)
            found: Tensor = self._hooks.encode_latents(models=models, config=self.config, pixels=part, rng=own)
            self._contract.latents(found, part)
            return found

        edge = self._edge(pixels, 1)
        if edge is None:
            return encode(pixels, 0)
        return in_tiles(pixels, edge, edge // 4 // factor * factor, resized=lambda rows: rows // factor, run=encode)

    def decode_latents(self, models: Models, latents: Tensor) -> Tensor:
        """Latents [B,C,h,w] float32 to pixels [B,3,H,W] float32 in -1..1."""
        factor = self.facts.spatial_factor

        def decode(part: Tensor, number: int) -> Tensor:
            found: Tensor = self._hooks.decode_latents(models=models, config=self.config, latents=part)
            self._contract.pixels(found, part)
            return found

        edge = self._edge(latents, factor)
        if edge is None:
            return decode(latents, 0)
        return in_tiles(latents, edge, edge // 4, resized=lambda rows: rows * factor, run=decode)

    def _edge(self, values: Tensor, factor: int) -> int | None:
        """The edge of tiles in rows of ``values``, each of ``factor`` pixels; None where the picture is one tile."""
        tiling = self.config.latents.tiling
        if tiling is None or max(values.shape[-2:]) * factor <= tiling:
            return None
        return tiling // factor

    def noise_target(self, latents: Tensor, noise: Tensor, sigmas: Tensor) -> NoiseTarget:
        """Noisy latents and target for latents and noise [B,C,h,w] at sigmas [B]."""
        target: NoiseTarget = self._hooks.noise_target(config=self.config, latents=latents, noise=noise, sigmas=sigmas)
        self._contract.target(target, latents)
        return target

    def predict(
        self,
        models: Models,
        noisy: Tensor,
        timesteps: Tensor,
        text: TextEmbeds,
        guidance: Tensor | None = None,
        control: Mapping[str, Tensor] | None = None,
        rng: Rng | None = None,
    ) -> Tensor:
        """Velocity [B,C,h,w] for noisy [B,C,h,w] at timesteps [B]; grad mode is the caller's."""
        velocity: Tensor = self._hooks.predict(
            models=models,
            config=self.config,
            facts=self.facts,
            noisy=noisy,
            timesteps=timesteps,
            text=text,
            guidance=guidance,
            control=control or {},
            rng=rng,
        )
        self._contract.velocity(velocity, noisy)
        # The other reading of a model's output that old settings know: it is the velocity less the input.
        return velocity + noisy if self.config.loss.prediction == "additive" else velocity

    def build_network(self, models: Models) -> Network:
        """Build what trains, in place."""
        network: Network = self._hooks.build_network(models=models, config=self.config, facts=self.facts)
        self._contract.network(network)
        return network

    def save(
        self, network: Network, tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]
    ) -> list[Path]:
        """Write the trained tensors; returns the files written."""
        paths: list[Path] = self._hooks.save(
            config=self.config, facts=self.facts, network=network, tensors=tensors, path=path, metadata=metadata
        )
        self._contract.saved(paths)
        return paths


_LONG = {"bf16": "bfloat16", "fp32": "float32"}


def default_placement(config: RunConfig, facts: ModelFacts, device: str = "cpu") -> Placement:
    """``device`` for everything, dtypes as ``precision`` of a resolved configuration says."""
    precision = config.precision
    dtypes = dict.fromkeys(facts.components, precision.compute) | precision.text_encoder
    if precision.vae is not None:
        dtypes["vae"] = precision.vae
    return Placement(device=device, dtypes={name: _LONG[dtype] for name, dtype in dtypes.items()})
