"""The tiny models of the golden data, and the inputs that belong to them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tests.helpers import golden, golden_path
from tuner.core.files import safetensors_header
from tuner.core.types import Placement
from tuner.plugins.flux.load import load_denoiser

GRIDS = {"forward_0": (4, 6), "forward_1": (5, 3)}


def golden_denoiser(name: str = "dev_bfl", *, dtype: str = "float32", drop: str | None = None) -> nn.Module:
    """The transformer of a golden weight file; ``drop``: prefix of tensors to leave out."""
    header = safetensors_header(golden_path(f"flux/{name}.safetensors"))
    if drop is not None:
        header = header.renamed({name: name for name in header if not name.startswith(drop)})
    return load_denoiser(header, Placement(dtypes={"denoiser": dtype}))


def run(denoiser: nn.Module, case: dict[str, Tensor], grid: tuple[int, int], **changes: Any) -> Tensor:
    """The forward pass of a golden case; ``changes`` replace or (None) remove arguments."""
    inputs: dict[str, Any] = {"grid": grid, "pooled": case.get("y"), "guidance": case.get("guidance"), **changes}
    inputs = {name: value for name, value in inputs.items() if value is not None}
    return denoiser(case["img"], case["txt"], case["timesteps"], **inputs)


def golden_case(name: str) -> tuple[dict[str, Tensor], tuple[int, int]]:
    return golden(f"flux/{name}.safetensors"), GRIDS[name]
