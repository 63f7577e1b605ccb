"""What an adapter makes of the weight it was trained on, for every kind: the dense definition, in float32.

The forwards of the layers compute the same without building these matrices where that is cheaper; merging and the
tests use this module. ``parts`` are the internal tensors of one module (`formats.parts_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tuner.core.adapters.rotation import butterfly, limited, rotate, turn
from tuner.core.adapters.spelling import kind_by_parts
from tuner.core.errors import UsageError

Parts = Mapping[str, Tensor]


def kind_of(parts: Parts) -> str:
    """The kind of adapter that the parts of one module make. UsageError for parts that make none."""
    kind = kind_by_parts(parts, parts["oft_blocks"].ndim if "oft_blocks" in parts else 0)
    if kind is not None:
        return kind
    raise UsageError(f"the parts {', '.join(parts) or 'of nothing'} make no adapter")


def merged_weight(weight: Tensor, parts: Parts, strength: float = 1.0) -> Tensor:
    """``weight`` [out, in, ...] with the adapter in it: computed in float32, returned in the dtype of ``weight``.

    strength 0 returns the values of ``weight``. The tensors must be on one device. UsageError: parts that do not fit.
    """
    kind = kind_of(parts)
    flat = weight.detach().float().reshape(weight.shape[0], -1) if kind != "norms" else weight.detach().float()
    values = {name: value.detach().float() for name, value in parts.items()}
    try:
        if kind == "lora":
            # In one operation: the product, which is as large as the weight, is never held.
            scale = strength * float(parts["alpha"]) / parts["down"].shape[0]
            changed = torch.addmm(flat, values["up"].flatten(1), values["down"].flatten(1), alpha=scale)
        else:
            changed = flat + DELTAS[kind](flat, values, strength)
    except RuntimeError as error:
        shapes = ", ".join(f"{name} {[*value.shape]}" for name, value in parts.items())
        raise UsageError(
            f"the {kind} adapter does not fit a weight of shape {[*weight.shape]}", why=f"it has {shapes}"
        ) from error
    return changed.reshape(weight.shape).to(weight.dtype)


def merged_bias(bias: Tensor, parts: Parts, strength: float = 1.0) -> Tensor:
    """``bias`` [rows] with the adapter in it, in its own dtype; kinds that leave it alone return it as it is."""
    for part in ("diff_b", "b_norm"):
        if part in parts:
            return (bias.detach().float() + strength * parts[part].detach().float()).to(bias.dtype)
    return bias


def _low_rank(parts: Parts) -> Tensor:
    down, up = parts["down"].flatten(1), parts["up"].flatten(1)
    product: Tensor = up @ down
    return product * (float(parts["alpha"]) / down.shape[0])


def _lora(weight: Tensor, parts: Parts, strength: float) -> Tensor:
    return strength * _low_rank(parts)


def _dora(weight: Tensor, parts: Parts, strength: float) -> Tensor:
    direction: Tensor = weight + _low_rank(parts)
    length: Tensor = parts["dora_scale"].reshape(-1, 1) / torch.linalg.vector_norm(direction, dim=1, keepdim=True)
    return strength * (direction * length - weight)


def _loha(weight: Tensor, parts: Parts, strength: float) -> Tensor:
    first, second = parts["hada_w1_a"] @ parts["hada_w1_b"], parts["hada_w2_a"] @ parts["hada_w2_b"]
    return first * second * (strength * float(parts["alpha"]) / parts["hada_w1_b"].shape[0])


def _lokr(weight: Tensor, parts: Parts, strength: float) -> Tensor:
    factors = [
        # A convolution's factor has its kernel behind the inputs, as the flattened weight does.
        (parts[name] if name in parts else parts[f"{name}_a"] @ parts[f"{name}_b"]).flatten(1)
        for name in ("lokr_w1", "lokr_w2")
    ]
    return torch.kron(*factors) * (strength * lokr_scale(parts))


def lokr_scale(parts: Parts) -> float:
    """alpha / rank where a factor is of low rank; two full factors have no scale."""
    for factor in ("lokr_w2_b", "lokr_w1_b"):
        if factor in parts:
            return float(parts["alpha"]) / parts[factor].shape[0]
    return 1.0


def _oft(weight: Tensor, parts: Parts, strength: float) -> Tensor:
    return rotate(weight.t(), _turns(weight, parts) * strength).t()


def _boft(weight: Tensor, parts: Parts, strength: float) -> Tensor:
    return butterfly(weight.t(), _turns(weight, parts) * strength).t()


def _turns(weight: Tensor, parts: Parts) -> Tensor:
    constraint = float(parts["alpha"]) if "alpha" in parts else 0.0
    return turn(limited(parts["oft_blocks"], constraint, weight.shape[0]))


def _ia3(weight: Tensor, parts: Parts, strength: float) -> Tensor:
    scale = parts["weight"].flatten()
    return weight * (strength * (scale if bool(parts["on_input"]) else scale.unsqueeze(1)))


def _full(weight: Tensor, parts: Parts, strength: float) -> Tensor:
    return strength * parts["diff"].flatten(1) if "diff" in parts else torch.zeros_like(weight)


FIXED = ("lora", "loha", "lokr", "full", "norms")
"""Kinds that change every weight by the same matrix; the others look at the weight."""


def _norms(weight: Tensor, parts: Parts, strength: float) -> Tensor:
    return strength * parts["w_norm"]


DELTAS: Mapping[str, Callable[[Tensor, Parts, float], Tensor]] = {
    "lora": _lora,
    "dora": _dora,
    "loha": _loha,
    "lokr": _lokr,
    "oft": _oft,
    "boft": _boft,
    "ia3": _ia3,
    "full": _full,
    "norms": _norms,
}
"""Kind of adapter to W_new - W_old, from a float32 weight [out, in] (norms: [width])."""
