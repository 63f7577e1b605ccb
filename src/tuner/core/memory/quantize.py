"""Which linears of a component are quantized, and doing it in place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tuner.core.compute.low_bits import can_encode
from tuner.core.compute.quantized import QuantizedLinear, quantize_linear
from tuner.core.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """What happened to a component. before, after: bytes of the weights of the quantized linears.

    kept: paths of the linears that stay as they are.
    """

    component: str
    method: str
    count: int
    before: int
    after: int
    kept: tuple[str, ...]


def quantize_component(
    module: nn.Module,
    method: str,
    *,
    component: str,
    no_quantize: Sequence[str] = (),
    exclude: Sequence[str] = (),
    device: torch.device | str | None = None,
    keep_original: bool = False,
) -> Quantized:
    """Store the weights of a component's plain linears in few bits. Comes before adapters: they attach to the result.

    no_quantize, exclude: full-match patterns on module paths inside the component; those of the user must match
    something. device: where the codes are made and stay, one weight at a time; the rest of the module is left where it
    is. keep_original: see `quantize_linear`. UsageError when nothing is left to quantize and for weights that are not
    finite.
    """
    linears, chosen = quantizable(module, method, component=component, no_quantize=no_quantize, exclude=exclude)
    if not chosen:
        raise UsageError(f"no linear of {component} is left to quantize", where="quantize", fix="exclude less")
    before = after = 0
    for path, linear in chosen.items():
        before += linear.weight.numel() * linear.weight.element_size()
        after += _quantize(linear, method, f"{component}.{path}", device, keep_original).stored_bytes
    kept = tuple(path for path in linears if path not in chosen)
    return Quantized(component=component, method=method, count=len(chosen), before=before, after=after, kept=kept)


def quantizable(
    module: nn.Module, method: str, *, component: str, no_quantize: Sequence[str], exclude: Sequence[str]
) -> tuple[dict[str, nn.Linear], dict[str, nn.Linear]]:
    """All plain linears of a component by path, and those of them that `quantize_component` stores in few bits."""
    linears = {path: each for path, each in module.named_modules() if type(each) is nn.Linear}
    for pattern in exclude:
        if not any(re.fullmatch(pattern, path) for path in linears):
            raise UsageError(
                f"the pattern {pattern!r} matches no linear of {component}",
                where="quantize.exclude",
                why=f"it has {len(linears)}, for example {', '.join(list(linears)[:3])}",
                fix="patterns match the whole path of a module",
            )
    patterns = [re.compile(pattern) for pattern in (*no_quantize, *exclude)]
    chosen = {
        path: linear
        for path, linear in linears.items()
        if can_encode(method, linear.in_features) and not any(pattern.fullmatch(path) for pattern in patterns)
    }
    return linears, chosen


def _quantize(
    linear: nn.Linear, method: str, where: str, device: torch.device | str | None, keep_original: bool
) -> QuantizedLinear:
    try:
        return quantize_linear(linear, method, device=device, keep_original=keep_original)
    except ValueError as error:
        raise UsageError(f"this weight cannot be quantized: {error}", where=where) from error
