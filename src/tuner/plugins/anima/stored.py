"""Which tensors of the model's files hold which parameters, for writing whole models. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuner.core.types import StoredFile, StoredTensor

from .sizes import ADAPTER_PREFIX, adapter_names, original_names
from .sources import resolve

if TYPE_CHECKING:
    from tuner.core.config import RunConfig


def stored(config: RunConfig) -> tuple[StoredFile, ...]:
    """The denoiser's file, which holds the LLM adapter too unless that has a file of its own."""
    sources = resolve(config)
    header = sources.header("denoiser")
    inside = sources.llm_adapter is None
    tensors = {}
    for name, key in original_names(header).items():
        if not name.startswith(ADAPTER_PREFIX):
            tensors[key] = StoredTensor(names=(f"denoiser:{name}",))
        elif inside:
            tensors[key] = StoredTensor(names=(f"llm_adapter:{name.removeprefix(ADAPTER_PREFIX)}",))
    files = [StoredFile(name="", header=header, tensors=tensors)]
    if not inside:
        header = sources.header("llm_adapter")
        own = {key: StoredTensor(names=(f"llm_adapter:{name}",)) for name, key in adapter_names(header).items()}
        files.append(StoredFile(name="llm_adapter", header=header, tensors=own))
    return tuple(files)
