"""``model``: which weights. A plugin subclasses ``ModelConfigBase`` and adds keys of its own."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field, model_validator

from tuner.core.config.base import Section, changed_keys, not_zero
from tuner.core.types import Ask


class ComponentSource(Section):
    """Where one part of the model comes from."""

    path: str
    """A file, a folder, or a hub id such as ``owner/name``."""
    subfolder: str | None = None
    """Folder inside ``path``."""
    revision: str | None = None
    """Branch, tag or commit, when ``path`` is a hub id."""


class MergedAdapter(Section):
    """An adapter that becomes part of the base model."""

    path: str
    """Adapter file in any format that the model knows."""
    strength: Annotated[float, AfterValidator(not_zero)] = 1.0
    """Factor on what the adapter changes; below 0 it is taken away."""


class ModelConfigBase(Section):
    """Keys that every model has."""

    unused: ClassVar[tuple[str, ...]] = ()
    # Keys below that a subclass does nothing with. Giving one is then an error instead of an option without effect.

    family: str
    """Name of the model plugin; ``--model`` on the command line must agree with it."""
    path: Annotated[str, Ask(question="Where are the weights of the model?", weights=True)]
    """Weights of the denoiser: a safetensors file, a folder, or a hub id."""
    subfolder: str | None = None
    """Folder inside ``path`` that holds the denoiser."""
    revision: str | None = None
    """Branch, tag or commit, when ``path`` is a hub id."""
    variant: str | None = None
    """File variant in a repository, such as ``fp16``."""
    flavour: Annotated[str | None, Ask(question="Which variant of the model is it?", when="missing")] = None
    """Variant of the model. Read from the weights when left out; an error when the weights say otherwise."""
    text_encoders: Annotated[
        dict[str, ComponentSource], Ask(question="Where is the text encoder {name}?", when="missing")
    ] = Field(default_factory=dict)
    """Text encoders by the plugin's names."""
    tokenizers: Annotated[
        dict[str, ComponentSource], Ask(question="Where is the tokenizer {name}?", when="missing")
    ] = Field(default_factory=dict)
    """Tokenizer files by the plugin's names, where they are not beside the text encoder."""
    vae: Annotated[ComponentSource | None, Ask(question="Where is the image autoencoder?", when="missing")] = None
    """Weights of the image autoencoder."""
    merge: tuple[MergedAdapter, ...] = ()
    """Adapters added to the weights as they are loaded, in this order, before quantization. The run trains on the
    result: its adapter needs the same ones at the same strength."""
    mmap: bool = True
    """Map weight files into memory. Off reads them as plain files: faster on network disks and under WSL."""
    download_dir: str | None = None
    """Folder for downloads from the hub; the hub's own cache when left out."""

    @model_validator(mode="after")
    def _refuse_unused(self) -> ModelConfigBase:
        given = [name for name in self.unused if name in changed_keys(self)]
        if given:
            raise ValueError(f"{' and '.join(given)}: of no use to this model, take it out")
        return self
