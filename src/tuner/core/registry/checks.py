"""What each hook must return. Checked once per hook and run: a wrong shape is told where it arises."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.core.errors import UsageError
from tuner.core.types import Models, Network, NoiseTarget, TextEmbeds

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.core.types import ModelFacts

FLOATS = ("float32", "bfloat16", "float16")


class Contract:
    """Checks the first result of each hook of the plugin called ``title``."""

    def __init__(self, title: str, facts: ModelFacts) -> None:
        self.title, self.facts = title, facts
        self._done: set[str] = set()

    def loaded(self, models: Any, components: Collection[str]) -> None:
        # Every phase loads other components, so every call is checked.
        if not isinstance(models, Models):
            raise self._broken("load_models", "Models", type(models).__name__)
        for name in components:
            if models.component(name) is None:
                raise self._broken("load_models", f"the component {name!r}", "nothing under that name")

    def text(self, embeds: Any, count: int) -> None:
        if not self._first("encode_text"):
            return
        if not isinstance(embeds, TextEmbeds) or not embeds.tensors:
            raise self._broken("encode_text", "TextEmbeds with at least one field", _describe(embeds))
        for name, tensor in embeds.tensors.items():
            field = self.facts.text_fields.get(name)
            if field is None:
                known = ", ".join(self.facts.text_fields)
                raise self._broken("encode_text", f"fields among {known}", f"a field {name!r}")
            dtypes = FLOATS if field.dtype in FLOATS else (field.dtype,)
            self._tensor("encode_text", tensor, (count, *field.shape), dtypes, of=f"{name} ")

    def latents(self, latents: Tensor, pixels: Tensor) -> None:
        if self._first("encode_latents"):
            height, width = pixels.shape[-2:]
            factor = self.facts.spatial_factor
            shape = (pixels.shape[0], self.facts.latent_channels, height // factor, width // factor)
            self._tensor("encode_latents", latents, shape, ("float32",))

    def pixels(self, pixels: Tensor, latents: Tensor) -> None:
        if self._first("decode_latents"):
            height, width = latents.shape[-2:]
            factor = self.facts.spatial_factor
            shape = (latents.shape[0], 3, height * factor, width * factor)
            self._tensor("decode_latents", pixels, shape, ("float32",))

    def target(self, target: Any, latents: Tensor) -> None:
        if not self._first("noise_target"):
            return
        if not isinstance(target, NoiseTarget):
            raise self._broken("noise_target", "NoiseTarget", _describe(target))
        for name in ("noisy", "target"):
            self._tensor("noise_target", getattr(target, name), tuple(latents.shape), FLOATS, of=f"{name} ")
        for name in ("sigmas", "timesteps", "weight"):
            self._tensor("noise_target", getattr(target, name), (latents.shape[0],), FLOATS, of=f"{name} ")

    def velocity(self, velocity: Tensor, noisy: Tensor) -> None:
        if self._first("predict"):
            self._tensor("predict", velocity, tuple(noisy.shape), FLOATS)

    def network(self, network: Any) -> None:
        if not isinstance(network, Network):
            raise self._broken("build_network", "Network", _describe(network))
        if not any(group.params for group in network.param_groups):
            raise self._broken("build_network", "parameters that train", "none")

    def saved(self, paths: Any) -> None:
        if not isinstance(paths, list) or not paths or not all(isinstance(path, Path) for path in paths):
            raise self._broken("save", "a list of paths", _describe(paths))
        for path in paths:
            if not path.is_file():
                raise self._broken("save", "files that exist", str(path))

    def _first(self, hook: str) -> bool:
        if hook in self._done:
            return False
        self._done.add(hook)
        return True

    def _tensor(
        self, hook: str, value: Any, shape: Sequence[int | str], dtypes: Sequence[str], *, of: str = ""
    ) -> None:
        wanted = f"{of}[{','.join(map(str, shape))}] {dtypes[0] if len(dtypes) == 1 else 'floating'}"
        sizes = tuple(getattr(value, "shape", ()))
        fits = len(sizes) == len(shape)
        fits = fits and all(want == got or isinstance(want, str) for want, got in zip(shape, sizes, strict=True))
        if not fits or str(getattr(value, "dtype", "")).removeprefix("torch.") not in dtypes:
            raise self._broken(hook, wanted, f"{of}{_describe(value)}")

    def _broken(self, hook: str, wanted: str, got: str) -> UsageError:
        return UsageError(
            f"{self.title}, hook {hook}: expected {wanted}, got {got}",
            fix="tell the plugin's author: this is its mistake",
        )


def _describe(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is None:
        return "None" if value is None else type(value).__name__
    return f"[{','.join(str(size) for size in shape)}] {str(value.dtype).removeprefix('torch.')}"
