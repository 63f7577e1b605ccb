"""Frozen linears with weights in few bits, as autograd nodes of their own.

`QuantizedLinear` is a linear whose weight is stored as codes (`low_bits`). By default every product reads the weight
back first, forward and backward, so nothing of full size outlives it. In *quantized arithmetic* (W8A8) the input is
quantized too, one scale per token, and the product itself runs in int8 or fp8:

    y      = (Q(x) C^T) * a * s            a: scale per token, s: scale per row of the weight C
    dL/dx  = (Q(g * s) C) * b              the rows' scales are folded into the gradient g before it is quantized

Weights have no gradient. An adapter on top sees plain x and y (`linear.base_forward`).

Why not torchao or optimum-quanto, which know the same formats (measured with torch 2.13 on a CPU, one 768 x 768 linear,
bf16, 256 tokens): output and gradient errors are equal to theirs (int8 0.005, fp8 0.026, int4 0.066, NF4 0.091), but

* torchao 0.18 keeps a bf16 copy of every int8 or fp8 weight from the forward to the backward pass, which gives back
  what quantization saved; quanto 0.2.7 keeps the input of every frozen linear and takes twice the time;
* their tensor subclasses do not go into safetensors (torchao), cannot be copied (quanto), and change with each release;
* torchao's dynamic int8 product has no backward: its output is cut from the graph without an error.

Codes and scales here are plain parameters: they stream, copy, save and compile like any others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner.core.compute.linear import give_up_sharing
from tuner.core.compute.low_bits import Codes, decode, encode, stored_bytes, to_e4m3, to_int8

Arithmetic = Literal["weights", "int8", "fp8", "original"]
"""weights: read back, then multiply. int8, fp8: quantized arithmetic. original: the weight as it was loaded."""

ALIGNED = {"int8": 8, "fp8": 16}
"""Multiples that both sizes of a weight need for quantized arithmetic on a GPU; the same rule holds everywhere."""
SMALLEST_GEMM = 32
"""Rows that int8 products on CUDA get at least: they refuse 16 and fewer."""


class QuantizedLinear(nn.Linear):
    """A linear that holds ``codes``, ``scale`` and maybe ``offset`` in place of ``weight``; made by `quantize_linear`.

    arithmetic: how it multiplies. original: the weight as it was, for a comparison; None once that is done.
    """

    codes: nn.Parameter
    scale: nn.Parameter
    offset: nn.Parameter | None
    method: str
    dtype: torch.dtype
    arithmetic: Arithmetic
    original: Tensor | None

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight read back, [out, in] in the dtype it was loaded in: a new tensor at every call."""
        return decode(self.method, self.stored, self.dtype)

    @property
    def stored(self) -> Codes:
        return Codes(self.codes, self.scale, self.offset)

    @property
    def stored_bytes(self) -> int:
        return stored_bytes(self.stored)

    def can_multiply(self, arithmetic: Arithmetic) -> bool:
        """Whether this weight's format and sizes allow quantized arithmetic of that kind."""
        if arithmetic not in ALIGNED:
            return arithmetic == "weights" or self.original is not None
        fits = self.in_features % ALIGNED[arithmetic] == 0 and self.out_features % ALIGNED[arithmetic] == 0
        return fits and self.method == arithmetic

    def product(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the dtype of ``x``, without an adapter."""
        if self.arithmetic in ALIGNED:
            product = multiply(x, self.codes, self.scale, self.arithmetic)
            return product if self.bias is None else product + self.bias.to(x.dtype)
        if self.arithmetic == "original":
            return cast("Tensor", _Product.apply(x, "original", self.original, None, None, self.bias))  # type: ignore[no-untyped-call]
        return cast("Tensor", _Product.apply(x, self.method, *self.stored, self.bias))  # type: ignore[no-untyped-call]

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.product(input)

    base_forward = product

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.method}"

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        # Scales are part of the codes: a cast of the module is one of its arithmetic, which follows the input.
        kept = {name: self._parameters.pop(name) for name in ("codes", "scale", "offset")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, parameter in kept.items():
            if parameter is not None:
                moved = fn(parameter.data)
                same = moved.dtype == parameter.dtype
                parameter.data = moved if same else parameter.data.to(moved.device)
            self._parameters[name] = parameter
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


def quantize_linear(
    linear: nn.Linear, method: str, *, device: torch.device | str | None = None, keep_original: bool = False
) -> QuantizedLinear:
    """Turn ``linear`` into a `QuantizedLinear` in place: the object stays, its weight goes.

    The codes are made on ``device``. keep_original: hold the weight where it is, for a comparison. RuntimeError for a
    linear that has an adapter or trains; ValueError as `low_bits.encode`.
    """
    if type(linear) is not nn.Linear or "forward" in linear.__dict__:
        raise RuntimeError("only plain linears are quantized, and before adapters are attached")
    if linear.weight.requires_grad:
        raise RuntimeError("a weight that trains cannot be quantized")
    weight = linear.weight.detach()
    stored = encode(method, weight, device)
    give_up_sharing(linear)
    del linear._parameters["weight"]
    quantized = cast("QuantizedLinear", linear)
    quantized.__class__ = QuantizedLinear
    for name, tensor in zip(Codes._fields, stored, strict=True):
        parameter = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
        quantized.register_parameter(name, parameter)
    quantized.method, quantized.dtype, quantized.arithmetic = method, weight.dtype, "weights"
    # Past nn.Module's own attribute handling: no move of the model may bring it along.
    quantized.__dict__["original"] = weight if keep_original else None
    return quantized


def quantized_linears(module: nn.Module) -> Iterator[QuantizedLinear]:
    """Every quantized linear inside of ``module``."""
    return (each for each in module.modules() if isinstance(each, QuantizedLinear))


def set_arithmetic(module: nn.Module, arithmetic: Arithmetic) -> int:
    """Let every quantized linear that can multiply that way do so, the others from read-back weights.

    Returns how many can.
    """
    count = 0
    for linear in quantized_linears(module):
        able = linear.can_multiply(arithmetic)
        linear.arithmetic = arithmetic if able else "weights"
        count += able
    return count


@contextmanager
def multiplying(module: nn.Module, kind: Arithmetic) -> Iterator[None]:
    """Multiply as `set_arithmetic` says inside the block, as before after it. Must cover the backward pass."""
    before = [(linear, linear.arithmetic) for linear in quantized_linears(module)]
    set_arithmetic(module, kind)
    try:
        yield
    finally:
        for linear, value in before:
            linear.arithmetic = value


# --- products ---------------------------------------------------------------------------------------------------------


class _Product(torch.autograd.Function):
    """x W^T + b with W read back in the forward pass and again in the backward pass; saves codes, never W nor x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        method: str,
        codes: Tensor,
        scale: Tensor | None,
        offset: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.method = method
        ctx.save_for_backward(codes, scale, offset)
        return F.linear(x, _read(method, codes, scale, offset, x), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            codes, scale, offset = ctx.saved_tensors
            x_grad = grad @ _read(ctx.method, codes, scale, offset, grad)
        if ctx.needs_input_grad[5]:
            bias_grad = grad.reshape(-1, grad.shape[-1]).sum(0)
        return x_grad, None, None, None, None, bias_grad


def _read(method: str, codes: Tensor, scale: Tensor | None, offset: Tensor | None, like: Tensor) -> Tensor:
    if method == "original":
        return codes.to(device=like.device, dtype=like.dtype)
    assert scale is not None
    return decode(method, Codes(codes, scale, offset), like.dtype)


def multiply(x: Tensor, codes: Tensor, scale: Tensor, kind: str) -> Tensor:
    """x [..., in] times a weight of int8 or fp8 codes [out, in] with row scales [out, 1] -> [..., out], in that type.

    kind: ``int8`` or ``fp8``. The gradient of ``x`` is computed the same way; codes and scales have none.
    """
    return cast("Tensor", _Quantized.apply(x, codes, scale, kind))  # type: ignore[no-untyped-call]


class _Quantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, kind: str) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(codes, scale)
        rows = x.reshape(-1, x.shape[-1])
        product = _in_int8 if kind == "int8" else _in_fp8
        return product(rows, codes.t(), scale.t(), x.dtype).view(*x.shape[:-1], codes.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        codes, scale = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1]).float() * scale.t()
        product = _in_int8 if ctx.kind == "int8" else _in_fp8
        x_grad = product(rows, _by_columns(codes), None, grad.dtype)
        return x_grad.view(*grad.shape[:-1], codes.shape[1]), None, None, None


def _by_columns(codes: Tensor) -> Tensor:
    """The same matrix with columns that lie together, the order that 8-bit products want on a GPU; a passing copy."""
    return codes if codes.device.type == "cpu" else codes.t().contiguous().t()


def _in_int8(rows: Tensor, right: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """rows [n, k] times int8 codes [k, m] with column scales [1, m] -> [n, m] in ``dtype``."""
    codes, row_scale = to_int8(rows.float())
    count = codes.shape[0]
    if codes.device.type != "cpu" and (count < SMALLEST_GEMM or count % 8):
        codes = F.pad(codes, (0, 0, 0, max(SMALLEST_GEMM - count, -count % 8)))
    out = torch._int_mm(codes, right)[:count] * row_scale
    return (out if scale is None else out.mul_(scale)).to(dtype)


def _in_fp8(rows: Tensor, right: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """rows [n, k] times e4m3 codes (held as bytes) [k, m] with column scales [1, m] -> [n, m] in ``dtype``."""
    codes, row_scale = to_e4m3(rows.float())
    columns = row_scale.new_ones(1, right.shape[1]) if scale is None else scale.contiguous()
    weight = right.view(torch.float8_e4m3fn)
    # Scales per row and per column exist for bfloat16 results only.
    return torch._scaled_mm(codes, weight, scale_a=row_scale, scale_b=columns, out_dtype=torch.bfloat16).to(dtype)
