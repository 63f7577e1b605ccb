"""Which tensors of the model's files hold which parameters, for writing whole models. No torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from tuner.core.files import WeightHeader, weight_header
from tuner.core.types import StoredFile, StoredTensor, WeightMaps

from . import vae_names
from .names import to_diffusers
from .sizes import ADAPTER_PREFIX, OWN_PROBE, adapter_names, encoder_names, original_names
from .sources import FOLDERS, resolve

if TYPE_CHECKING:
    from tuner.core.config import RunConfig

OWN, ADAPTER = "denoiser:", "llm_adapter:"


def stored(config: RunConfig) -> tuple[StoredFile, ...]:
    """The denoiser's file, which holds the LLM adapter too unless that has a file of its own."""
    sources = resolve(config)
    header = sources.header("denoiser")
    inside = sources.llm_adapter is None
    files = [StoredFile(name="", header=header, tensors=_denoiser(header, adapter=inside))]
    if sources.llm_adapter is not None:
        own = weight_header(sources.llm_adapter)
        files.append(StoredFile(name="llm_adapter", header=own, tensors=_bare(adapter_names(own), ADAPTER)))
    return tuple(files)


def stored_tensors(header: WeightHeader, component: str | None) -> Mapping[str, StoredTensor]:
    """As `WeightMaps.stored`."""
    if component in (None, "denoiser"):
        found = _denoiser(header, adapter=component is None)
        return found if any(OWN + OWN_PROBE in each.names for each in found.values()) else {}
    if component == "vae":
        own = vae_names.names(header)
        known = {"encoder.conv1.weight", "decoder.conv1.weight", "conv1.bias"} <= set(own)
        return _bare(own, "vae:") if known else {}
    names: dict[str, str] = {}
    if component == "llm_adapter" and "out_proj.weight" in (found_names := adapter_names(header)):
        names = found_names
    if component == "qwen3" and "layers.0.self_attn.q_norm.weight" in (found_names := encoder_names(header)):
        names = found_names
    return _bare(names, f"{component}:")


def _denoiser(header: WeightHeader, *, adapter: bool) -> dict[str, StoredTensor]:
    tensors = {}
    for name, key in original_names(header).items():
        if not name.startswith(ADAPTER_PREFIX):
            tensors[key] = StoredTensor(names=(OWN + name,))
        elif adapter:
            tensors[key] = StoredTensor(names=(ADAPTER + name.removeprefix(ADAPTER_PREFIX),))
    return tensors


def _bare(names: Mapping[str, str], component: str) -> dict[str, StoredTensor]:
    return {key: StoredTensor(names=(component + name,)) for name, key in names.items()}


def original(names: Collection[str]) -> dict[str, StoredTensor]:
    """The denoiser's tensors under the names of the published file, the LLM adapter's among them."""
    found = {}
    for name in names:
        if name.startswith(OWN):
            found[name.removeprefix(OWN)] = StoredTensor(names=(name,))
        elif name.startswith(ADAPTER):
            found[ADAPTER_PREFIX + name.removeprefix(ADAPTER)] = StoredTensor(names=(name,))
    return found


def diffusers(names: Collection[str]) -> dict[str, StoredTensor]:
    """The denoiser's in diffusers' layout; the LLM adapter has a folder of its own there."""
    found = {}
    for name in names:
        if name.startswith(OWN):
            module, _, leaf = name.removeprefix(OWN).rpartition(".")
            renamed = to_diffusers(module)
            if renamed is not None:
                found[f"{renamed}.{leaf}"] = StoredTensor(names=(name,))
    return found


WEIGHTS = WeightMaps(
    stored=stored_tensors,
    original=original,
    diffusers=diffusers,
    folders={name: folders for name, folders in FOLDERS.items() if "tokenizer" not in name},
    prefixes={"denoiser": "net."},
    alone="net.",
)
