"""Weight files in another layout: one file or diffusers' folders, tensor by tensor, values unchanged unless asked.

Scaled 8-bit weights are as ComfyUI reads them: beside a weight w in float8 stands ``scale_weight`` s, and the value is
s w; a tensor ``scaled_fp8`` with two elements says that the file is of this kind and computes in 16 bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, KeysView, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from tuner.core.adapters.bases import Parameters
from tuner.core.adapters.checkpoints import assembled
from tuner.core.adapters.streams import FILE_NAMES, Planned, about, silent, write_tensors
from tuner.core.compute.dtypes import DTYPES, fitting
from tuner.core.compute.weights import FILE_DTYPES
from tuner.core.errors import UsageError
from tuner.core.types import OUTER_LAYERS, StoredTensor

if TYPE_CHECKING:
    from tuner.core.types import StoredFile, WeightMaps

Layout = Literal["single", "all-in-one", "diffusers"]
LAYOUTS: Mapping[Layout, str] = {
    "single": "one file with the denoiser alone, under its original names",
    "all-in-one": "one file with all components that are given",
    "diffusers": "a folder with the denoiser under diffusers' names, and the encoders that are given",
}
BASE_DTYPES = ("fp32", "bf16", "fp16", "fp8", "fp8-scaled")
FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
IN_A_BLOCK = re.compile(rf"(?!vae:|\w+:({'|'.join(OUTER_LAYERS)})$).*\.\d+\..*(?<!_bias)\.weight")
"""Weights that become float8: matrices of numbered blocks, but no tables of biases; everything around them passes
errors to all."""
WEIGHT_FILE, ENCODER_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """Written files with their numbers of tensors, and what of the source is in none of them.

    left_out: components. dropped: tensors that are no parameters, such as buffers that loaders compute again.
    """

    files: Mapping[Path, int]
    left_out: Sequence[str]
    dropped: Sequence[str]


def convert_base(
    files: Sequence[StoredFile],
    maps: WeightMaps,
    layout: Layout,
    target: Path,
    dtype: str | None = None,
    *,
    progress: Callable[[int, int], None] = silent,
) -> Converted:
    """Write the model that ``files`` hold in another layout: to the file ``target``, or below it for diffusers.

    dtype: one of `BASE_DTYPES`; None keeps that of each tensor.
    UsageError: no denoiser among the files, or a tensor without a place in the layout.
    """
    parameters = Parameters(files)
    # In the order of the files, so that the same model gives the same bytes.
    names = dict.fromkeys(parameters).keys()
    if not any(name.startswith("denoiser:") for name in names):
        raise UsageError("none of the files holds the denoiser", fix="name its file first")
    own = {name for stored in maps.original(names).values() for name in stored.names}
    plans: dict[Path, dict[str, StoredTensor]] = {}
    prefix = {"single": maps.alone, "all-in-one": maps.prefixes["denoiser"], "diffusers": ""}[layout]
    if layout == "diffusers":
        plans[target / maps.folders["denoiser"][0] / WEIGHT_FILE] = dict(maps.diffusers(names))
        beside = {name.partition(":")[0] for name in own}
        # Encoders are named alike in all layouts; the autoencoder is not.
        for component in sorted({name.partition(":")[0] for name in names} - {"denoiser", "vae"}):
            file = WEIGHT_FILE if component in beside else ENCODER_FILE
            plans[target / maps.folders[component][0] / file] = _alone(names, component, "")
    else:
        plans[target] = {prefix + key: stored for key, stored in maps.original(names).items()}
        if layout == "all-in-one":
            plans[target] |= _others(names, plans[target], maps)
    held = {name for plan in plans.values() for stored in plan.values() for name in stored.names}
    lost = sorted(name for name in names - held if name.startswith("denoiser:"))
    if lost:
        raise UsageError(
            f"{len(lost)} tensors have no place in the layout {layout}", why=f"one of them is {lost[0]}",
            fix="use a file without added tensors",
        )  # fmt: skip
    # Title, author, licence: they belong to the model in every layout.
    metadata = {key: value for file in files if not file.name for key, value in about(file.header).items()}
    written = {}
    for path, plan in plans.items():
        planned = _planned(plan, parameters, dtype, prefix, own)
        whole = any(name.startswith("denoiser:") for stored in plan.values() for name in stored.names)
        write_tensors(path, planned, {**(metadata if whole else {}), "format": "pt"}, progress)
        written[path] = len(planned)
    left_out = {name.partition(":")[0] for name in names - held} - {"denoiser"}
    dropped = [key for file in files for key in file.header if key not in file.tensors]
    return Converted(files=written, left_out=sorted(left_out), dropped=dropped)


def _alone(names: KeysView[str], component: str, prefix: str) -> dict[str, StoredTensor]:
    start = f"{component}:"
    own = sorted(name for name in names if name.startswith(start))
    return {prefix + name.removeprefix(start): StoredTensor(names=(name,)) for name in own}


def _others(names: KeysView[str], plan: Mapping[str, StoredTensor], maps: WeightMaps) -> dict[str, StoredTensor]:
    """The components that do not belong into the denoiser's own file."""
    held = {name for stored in plan.values() for name in stored.names}
    found: dict[str, StoredTensor] = {}
    for component in sorted({name.partition(":")[0] for name in names - held} - {"denoiser"}):
        if component not in maps.prefixes:
            raise UsageError(
                f"this model has no layout with {component} in one file",
                why="no program would find it there",
                fix="leave it out: it is used as a file of its own",
            )
        found |= _alone(names, component, maps.prefixes[component])
    return found


def _planned(
    plan: Mapping[str, StoredTensor], parameters: Parameters, dtype: str | None, prefix: str, own_names: set[str]
) -> dict[str, Planned]:
    planned: dict[str, Planned] = {}
    scaled = dtype == "fp8-scaled"
    for key, stored in plan.items():
        shapes = [parameters.shape(name) for name in stored.names]
        shape = (sum(each[0] for each in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]
        own = _common_dtype(parameters, stored)
        # Programs look for scales in the denoiser's file; an encoder beside it stays as it is.
        passed = scaled and not own_names.issuperset(stored.names)
        target = own if passed else _target(stored, len(shape), own, dtype)
        make = partial(_made, parameters, stored, own)
        if target == FLOAT8 and scaled:
            scale = _Scale(make)
            planned[key] = Planned(FILE_NAMES[FLOAT8], shape, scale.weight)
            planned[key.removesuffix("weight") + "scale_weight"] = Planned("F32", (), scale.value)
        else:
            planned[key] = Planned(FILE_NAMES[target], shape, partial(_cast, make, target, key))
    if scaled and any(key.endswith("scale_weight") for key in planned):
        marker = prefix + "scaled_fp8"
        planned[marker] = Planned(FILE_NAMES[FLOAT8], (2,), partial(torch.zeros, 2, dtype=FLOAT8))
    return planned


def _common_dtype(parameters: Parameters, stored: StoredTensor) -> torch.dtype:
    """The dtype that holds all values of one tensor to come."""
    spelled = {parameters.dtype(name) for name in stored.names}
    try:
        return reduce(torch.promote_types, (FILE_DTYPES[each] for each in sorted(spelled)))
    except (KeyError, RuntimeError) as error:
        raise UsageError(
            f"{stored.names[0]} has a number format that cannot be converted",
            why=f"it is stored as {', '.join(sorted(spelled))}",
            fix="use a BF16, F16 or F32 file",
        ) from error


def _target(stored: StoredTensor, axes: int, own: torch.dtype, dtype: str | None) -> torch.dtype:
    if dtype is None or not own.is_floating_point:
        return own
    if dtype in DTYPES:
        return DTYPES[dtype]
    return FLOAT8 if axes == 2 and all(IN_A_BLOCK.fullmatch(name) for name in stored.names) else own


def _made(parameters: Parameters, stored: StoredTensor, dtype: torch.dtype) -> Tensor:
    return assembled({name: parameters.read(name) for name in stored.names}, stored, dtype)


def _cast(make: Callable[[], Tensor], dtype: torch.dtype, key: str) -> Tensor:
    return fitting(make(), dtype, key)


class _Scale:
    """A weight in float8 and its scale, which is known once the weight was made."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self.make = make
        self.scale = torch.ones(())

    def weight(self) -> Tensor:
        value = self.make().float()
        self.scale = (value.abs().amax() / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
        return (value / self.scale).to(FLOAT8)

    def value(self) -> Tensor:
        return self.scale
