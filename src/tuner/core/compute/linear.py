"""Linear projections with optional low-rank adapters, as one autograd node.

`project(x, linears)` applies several linears to one input. What the node buys over separate `nn.Linear` calls:

* one GEMM for all base weights when they are adjacent views of one storage (`share_storage`), and one for the
  input gradient;
* the low-rank product accumulates into the base output (`addmm_`): no second full-size tensor is made or scaled;
* only `x` and the `[rows, rank]` activations are kept for backward; a frozen base weight is kept by reference.

Formula per linear (Hu et al. 2021, LoRA): `y = x W^T + b + (scale * up) (mask * (down x))` with
`scale = strength * alpha / rank`.
Adapter parameters may be float32 masters while `x` is bfloat16: the small matrices are cast, never the activations.

Attributes of a linear that are read here (all optional, all set from outside, none is a parameter or a submodule):

`adapter`       an object with the `LowRank` fields below, or with a method ``adapt(x, y, linear) -> y'`` that turns the
                output without it into the one with it, or with both: then ``adapt`` gets the low-rank sum;
`base_forward`  a callable `x -> y` that replaces the plain product, for example of a quantized weight;
`storage_group` set by `share_storage`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner.core.compute.dtypes import weight_dtype


class LowRank(Protocol):
    """What `project` needs of an adapter."""

    down: Tensor  # [rank, in_features]
    up: Tensor  # [out_features, rank]
    scale: float  # strength * alpha / rank; exactly 0.0 means that the adapter is not there

    def mid_mask(self, x: Tensor) -> Tensor | None:
        """Factor on the down activation, broadcastable to [*x.shape[:-1], rank]; None outside dropout."""


def project(x: Tensor, linears: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """Apply every linear of `linears` (with its adapter) to `x`.

    `x` is [..., in_features] of rank 2 or more in the weights' dtype. Returns one [..., out_features] per linear, in
    order; with shared storage these are slices of one tensor, so they must not be changed in place.
    """
    adapters = [_active_adapter(linear) for linear in linears]
    low_rank = [cast("LowRank", each) if getattr(each, "down", None) is not None else None for each in adapters]
    if all(_frozen_plain(linear) for linear in linears):
        outs = _frozen_projection(x, linears, low_rank)
    else:
        outs = tuple(_general(x, linear, adapter) for linear, adapter in zip(linears, low_rank, strict=True))
    finish = [getattr(each, "adapt", None) for each in adapters]
    if not any(finish):
        return outs
    return tuple(
        out if adapt is None else adapt(x, out, linear)
        for adapt, out, linear in zip(finish, outs, linears, strict=True)
    )


def plain_product(linear: nn.Linear, x: Tensor) -> Tensor:
    """x W^T without bias and adapter: [..., in_features] -> [..., out_features] in the dtype of the weight."""
    base_forward: Callable[[Tensor], Tensor] | None = getattr(linear, "base_forward", None)
    x = x.to(weight_dtype(linear))
    if base_forward is None:
        return F.linear(x, linear.weight)
    y = base_forward(x)
    return y if linear.bias is None else y - linear.bias.to(y.dtype)


def adapted_forward(linear: nn.Linear, x: Tensor) -> Tensor:
    """`forward` of an adapted linear: [..., in_features] -> [..., out_features]; injection binds it to the instance."""
    return project(x, (linear,))[0]


def _active_adapter(linear: nn.Linear) -> Any:
    adapter: Any = getattr(linear, "adapter", None)
    return None if adapter is None or adapter.scale == 0.0 else adapter


def _frozen_plain(linear: nn.Linear) -> bool:
    if getattr(linear, "base_forward", None) is not None or not _is_stock(linear):
        return False
    return not linear.weight.requires_grad and (linear.bias is None or not linear.bias.requires_grad)


def _is_stock(linear: nn.Linear) -> bool:
    # A subclass with a forward of its own (4-bit weights, say) cannot be computed from `weight`.
    return type(linear).forward is nn.Linear.forward


def _general(x: Tensor, linear: nn.Linear, adapter: LowRank | None) -> Tensor:
    """Trainable or quantized base: ordinary autograd, the low-rank product still added by one `addmm`."""
    base_forward: Callable[[Tensor], Tensor] | None = getattr(linear, "base_forward", None)
    if base_forward is not None:
        y = base_forward(x)
    elif _is_stock(linear):
        y = F.linear(x, linear.weight, linear.bias)
    else:
        y = linear(x)
    if adapter is None:
        return y
    mid = F.linear(x, adapter.down.to(x.dtype))
    mask = adapter.mid_mask(x)
    if mask is not None:
        mid = mid * mask
    up = (adapter.up * adapter.scale).to(y.dtype)
    rows = torch.addmm(y.reshape(-1, y.shape[-1]), mid.reshape(-1, mid.shape[-1]).to(y.dtype), up.t())
    return rows.view(y.shape)


def _frozen_projection(
    x: Tensor, linears: Sequence[nn.Linear], adapters: Sequence[LowRank | None]
) -> tuple[Tensor, ...]:
    sizes = tuple(linear.out_features for linear in linears)
    fused = _shared_weight(linears)
    weights, biases = fused or ([linear.weight for linear in linears], [linear.bias for linear in linears])
    slots = tuple(i for i, adapter in enumerate(adapters) if adapter is not None)
    if not slots:
        outs = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        return torch.split(outs[0], list(sizes), dim=-1) if len(outs) < len(sizes) else tuple(outs)
    live = [adapter for adapter in adapters if adapter is not None]
    # Parts of one adapter bring the same down: it is multiplied once, and handed over once, as compilers demand.
    owners: list[LowRank] = []
    shares = []
    for adapter in live:
        place = next((i for i, owner in enumerate(owners) if owner.down is adapter.down), len(owners))
        if place == len(owners):
            owners.append(adapter)
        shares.append(place)
    result = _Projection.apply(  # type: ignore[no-untyped-call]
        x,
        _stacked_mask(x, owners),
        sizes,
        tuple(zip(slots, shares, (float(adapter.scale) for adapter in live), strict=True)),
        len(weights),
        *weights,
        *biases,
        *[adapter.down for adapter in owners],
        *[adapter.up for adapter in live],
    )
    return cast("tuple[Tensor, ...]", result)


def _stacked_mask(x: Tensor, adapters: Sequence[LowRank]) -> Tensor | None:
    """The adapters' dropout factors side by side, [rows, sum of ranks] in x's dtype, or None when nobody drops."""
    masks = [adapter.mid_mask(x) for adapter in adapters]
    if all(mask is None for mask in masks):
        return None
    full = []
    for adapter, mask in zip(adapters, masks, strict=True):
        shape = (*x.shape[:-1], adapter.down.shape[0])
        full.append(x.new_ones(shape) if mask is None else mask.to(x.dtype).expand(shape))
    stacked = torch.cat(full, dim=-1)
    return stacked.reshape(-1, stacked.shape[-1])


class _Projection(torch.autograd.Function):
    """Frozen base products plus low-rank products of one input.

    `uses` are (linear, down, scale) for each up. `tensors` holds `count` weights (one fused or one per linear), as many
    biases, then the downs and the ups; several ups may use one down.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask: Tensor | None,
        sizes: tuple[int, ...],
        uses: tuple[tuple[int, int, float], ...],
        count: int,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        weights, biases, downs, ups = _unpack(tensors, count, len(uses))
        rows = x.reshape(-1, x.shape[-1])
        mid = rows @ _stack(downs, x.dtype).t()
        if mask is not None:
            mid = mid * mask
        outs = _base_outputs(rows, weights, biases, sizes)
        mids = torch.split(mid, [down.shape[0] for down in downs], dim=1)
        for (slot, share, scale), up in zip(uses, ups, strict=True):
            outs[slot].addmm_(mids[share], _folded(up, scale, x.dtype).t())
        ctx.save_for_backward(x, mid, mask, *weights, *downs, *ups)
        ctx.sizes, ctx.uses, ctx.count = sizes, uses, count
        ctx.set_materialize_grads(False)
        return tuple(out.view(*x.shape[:-1], size) for out, size in zip(outs, sizes, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, mid, mask, *rest = ctx.saved_tensors
        uses, count = ctx.uses, ctx.count
        weights, downs, ups = rest[:count], rest[count : len(rest) - len(uses)], rest[len(rest) - len(uses) :]
        rows = x.reshape(-1, x.shape[-1])
        outs = [None if grad is None else grad.reshape(-1, size) for grad, size in zip(grads, ctx.sizes, strict=True)]
        ranks = [down.shape[0] for down in downs]
        mids = torch.split(mid, ranks, dim=1)
        sums: list[Tensor | None] = [None] * len(downs)
        up_grads = []
        for (slot, share, scale), up in zip(uses, ups, strict=True):
            grad = outs[slot]
            if grad is None:
                up_grads.append(torch.zeros_like(up))
                continue
            part = grad @ _folded(up, scale, x.dtype)
            before = sums[share]
            sums[share] = part if before is None else before + part
            up_grad = (grad.t() @ mids[share]).to(up.dtype)
            up_grads.append(up_grad if scale == 1.0 else up_grad * scale)
        mid_parts = [
            mid.new_zeros(mid.shape[0], rank) if part is None else part for part, rank in zip(sums, ranks, strict=True)
        ]
        mid_grad = mid_parts[0] if len(mid_parts) == 1 else torch.cat(mid_parts, dim=1)
        if mask is not None:
            mid_grad = mid_grad * mask
        stacked = mid_grad.t() @ rows
        down_grads = [part.to(down.dtype) for part, down in zip(stacked.split(ranks), downs, strict=True)]
        x_grad = None
        if ctx.needs_input_grad[0]:
            low_rank = mid_grad @ _stack(downs, x.dtype)
            x_grad = _add_base_gradient(low_rank, outs, weights, ctx.sizes).view(x.shape)
        nothing = [None] * (2 * count)
        return (x_grad, None, None, None, None, *nothing, *down_grads, *up_grads)


def _unpack(
    tensors: Sequence[Tensor | None], count: int, ups_count: int
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor], list[Tensor]]:
    weights = cast("list[Tensor]", list(tensors[:count]))
    biases = list(tensors[count : 2 * count])
    downs = cast("list[Tensor]", list(tensors[2 * count : len(tensors) - ups_count]))
    ups = cast("list[Tensor]", list(tensors[len(tensors) - ups_count :]))
    return weights, biases, downs, ups


def _stack(downs: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return (downs[0] if len(downs) == 1 else torch.cat(list(downs))).to(dtype)


def _folded(up: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    # Scaled before the cast: the small matrix carries alpha/rank, and is rounded once.
    return (up if scale == 1.0 else up * scale).to(dtype)


def _base_outputs(
    rows: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], sizes: Sequence[int]
) -> list[Tensor]:
    if len(weights) == len(sizes):
        return [F.linear(rows, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    joint, outs, start = F.linear(rows, weights[0], biases[0]), [], 0
    for size in sizes:
        outs.append(joint.narrow(1, start, size))
        start += size
    return outs


def _add_base_gradient(
    total: Tensor, grads: Sequence[Tensor | None], weights: Sequence[Tensor], sizes: Sequence[int]
) -> Tensor:
    """total [rows, in] + sum of grad_i W_i, in place; one GEMM when the weights are one tensor."""
    known = [grad for grad in grads if grad is not None]
    if len(weights) < len(sizes) and len(known) == len(sizes):
        return total.addmm_(torch.cat(known, dim=1), weights[0])
    start = 0
    for index, (grad, size) in enumerate(zip(grads, sizes, strict=True)):
        weight = weights[index] if len(weights) == len(sizes) else weights[0].narrow(0, start, size)
        start += size
        if grad is not None:
            total.addmm_(grad, weight)
    return total


class StorageGroup:
    """Linears on one input whose weights are adjacent rows of `weight` [sum of out_features, in_features].

    `weight` is None while the rows are apart (a partial move, a deep copy); `project` then multiplies one by one.
    """

    def __init__(self, members: Sequence[nn.Linear]) -> None:
        self.members = tuple(members)
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.parameters: tuple[Tensor, ...] = ()
        self._moved: set[int] = set()

    def link(self) -> None:
        """Copy the members' weights (and biases) into one tensor each and make the parameters views of it."""
        self.weight = _adjacent([member.weight for member in self.members])
        biases = [member.bias for member in self.members if member.bias is not None]
        self.bias = _adjacent(biases) if biases else None
        self.parameters = tuple(member.weight for member in self.members)
        self._moved.clear()

    def unlink(self) -> None:
        """Forget the joint tensor; the members keep their values."""
        self.weight, self.bias, self.parameters = None, None, ()

    def moved(self, member: nn.Linear) -> None:
        """A member went to another device or dtype; when all have, they are made adjacent again."""
        self.unlink()
        self._moved.add(next(index for index, one in enumerate(self.members) if one is member))
        if len(self._moved) == len(self.members):
            self.link()

    def __deepcopy__(self, memo: dict[int, Any]) -> StorageGroup:
        # A copied parameter owns its storage, so the copy starts apart until the next move or share_storage.
        copied = StorageGroup(())
        memo[id(self)] = copied
        copied.members = tuple(copy.deepcopy(member, memo) for member in self.members)
        return copied


def share_storage(linears: Sequence[nn.Linear]) -> None:
    """Make the weights (and biases) of linears that read the same input adjacent views of one storage, in this order.

    The parameters keep their identity, names, shapes and values; `project` of these linears, or of a run of them, then
    needs one GEMM. Calling it again after weights were replaced renews the views; moves by `.to()` are followed.
    ValueError: different input sizes, dtypes or devices, or biases on some only.
    """
    first = linears[0]
    for linear in linears:
        if linear.in_features != first.in_features or (linear.bias is None) != (first.bias is None):
            raise ValueError("linears that share storage need the same input size and all or no biases")
        if linear.weight.dtype != first.weight.dtype or linear.weight.device != first.weight.device:
            raise ValueError("linears that share storage need one dtype and one device")
    group = StorageGroup(linears)
    group.link()
    for linear in linears:
        linear.__dict__["storage_group"] = group
        linear.__dict__["_apply"] = MethodType(_apply_and_relink, linear)


def give_up_sharing(linear: nn.Linear) -> None:
    """Take a linear's group apart, so that each member's weight can be freed or replaced by itself."""
    group: StorageGroup | None = linear.__dict__.get("storage_group")
    if group is None:
        return
    group.unlink()
    for member in group.members:
        for name in ("storage_group", "_apply"):
            member.__dict__.pop(name, None)
        for parameter in member.parameters(recurse=False):
            parameter.data = parameter.data.clone()
    group.members = ()


def separate_projections(block: nn.Module) -> int:
    """Take apart the groups whose members all lie inside ``block``; returns how many there were."""
    linears = {module for module in block.modules() if isinstance(module, nn.Linear)}
    groups = {id(group): group for each in linears if (group := each.__dict__.get("storage_group")) is not None}
    inside = [group.members[0] for group in groups.values() if linears.issuperset(group.members)]
    for linear in inside:
        give_up_sharing(linear)
    return len(inside)


def _apply_and_relink(linear: nn.Linear, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Linear:
    type(linear)._apply(linear, fn, recurse)  # type: ignore[no-untyped-call]
    linear.__dict__["storage_group"].moved(linear)
    return linear


def _adjacent(parameters: Sequence[Tensor]) -> Tensor:
    joint = torch.cat([parameter.detach() for parameter in parameters])
    start = 0
    for parameter in parameters:
        parameter.data = joint.narrow(0, start, parameter.shape[0])
        start += parameter.shape[0]
    return joint


def _shared_weight(linears: Sequence[nn.Linear]) -> tuple[list[Tensor], list[Tensor | None]] | None:
    """The joint weight and bias of a run of one group's members, or None; reads Python attributes only."""
    group: StorageGroup | None = getattr(linears[0], "storage_group", None)
    if group is None or group.weight is None or len(linears) == 1:
        return None
    first = next((index for index, member in enumerate(group.members) if member is linears[0]), None)
    if first is None or first + len(linears) > len(group.members):
        return None
    start = sum(member.out_features for member in group.members[:first])
    size = 0
    for offset, linear in enumerate(linears):
        # A replaced Parameter (assigned weights, quantization) is no longer part of the joint tensor.
        if group.members[first + offset] is not linear or group.parameters[first + offset] is not linear.weight:
            return None
        size += linear.out_features
    if len(linears) == len(group.members):
        return [group.weight], [group.bias]
    bias = None if group.bias is None else group.bias.narrow(0, start, size)
    return [group.weight.narrow(0, start, size)], [bias]
