"""Optimizer state as flat named tensors plus JSON, and back, bit for bit and without pickle."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tuner.core.errors import UsageError


def optimizer_state_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(live tensors by ``parameter name/state key``, everything else as JSON-able data).

    names: every trained parameter by a name that is stable over runs. Schedule-free optimizers must be in training
    mode, as they are outside `eval_weights`. Raises UsageError for state that is neither tensors nor plain values.
    """
    name_of = {id(parameter): name for name, parameter in names.items()}
    tensors: dict[str, Tensor] = {}
    groups: list[dict[str, Any]] = []
    states: dict[str, dict[str, Any]] = {}
    for index, group in enumerate(optimizer.param_groups):
        members = [name_of[id(parameter)] for parameter in group["params"]]
        plain = {key: value for key, value in group.items() if key != "params"}
        groups.append({"params": members, "values": _pack(plain, f"group{index}", tensors)})
        for name, parameter in zip(members, group["params"], strict=True):
            if parameter in optimizer.state:
                states[name] = _pack(optimizer.state[parameter], name, tensors)
    return tensors, {"optimizer": type(optimizer).__name__, "groups": groups, "states": states}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    names: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    data: Mapping[str, Any],
    *,
    offloaded: bool = False,
) -> None:
    """Put back what `optimizer_state_tensors` returned, into an optimizer built from the same configuration.

    offloaded: the state of parameters lives in host memory between updates (``optimizer.offload``). Raises UsageError
    when the kind of optimizer, a group, a parameter, a shape or a tensor differs; then nothing was changed.
    """
    if data["optimizer"] != type(optimizer).__name__:
        raise _differs(f"it is from {data['optimizer']}, this run uses {type(optimizer).__name__}")
    name_of = {id(parameter): name for name, parameter in names.items()}
    if len(data["groups"]) != len(optimizer.param_groups):
        raise _differs(f"it has {len(data['groups'])} parameter groups, this run has {len(optimizer.param_groups)}")

    used: set[str] = set()
    values: list[dict[str, Any]] = []
    states: list[tuple[nn.Parameter, dict[str, Any]]] = []
    for group, saved in zip(optimizer.param_groups, data["groups"], strict=True):
        members = [name_of[id(parameter)] for parameter in group["params"]]
        if members != saved["params"]:
            odd = sorted(set(members) ^ set(saved["params"])) or members
            raise _differs(f"its parameters are others, for example {odd[0]}")
        values.append(_unpack(saved["values"], tensors, used, group["params"][0].device))
        for name, parameter in zip(members, group["params"], strict=True):
            if name in data["states"]:
                home = torch.device("cpu") if offloaded else parameter.device
                state = _unpack(data["states"][name], tensors, used, home)
                states.append((parameter, _place(state, parameter, group, name, home)))
    unused = sorted(set(tensors) - used)
    if unused:
        raise _differs(f"it holds tensors that nothing asks for, for example {unused[0]}")

    for group, restored in zip(optimizer.param_groups, values, strict=True):
        group.update(restored)
    optimizer.state.clear()
    for parameter, state in states:
        optimizer.state[parameter] = state


def is_schedule_free(optimizer: object) -> bool:
    """Whether the optimizer, or its class, keeps other weights for training than for use, and switches between them."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


@contextmanager
def eval_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, parameters are the ones to sample, validate and export with; afterwards exactly those from before.

    Does nothing for optimizers without the two kinds of weights. Switching there and back rounds, so the training
    weights are kept aside and put back: looking at a model must not change its training.
    """
    if not is_schedule_free(optimizer) or not any(state for state in optimizer.state.values()):
        yield
        return
    params = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [parameter.detach().clone() for parameter in params]
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            for parameter, before in zip(params, kept, strict=True):
                parameter.copy_(before)


def _pack(values: Mapping[str, Any], prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {key: _encode(value, f"{prefix}/{key}", tensors) for key, value in values.items()}


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if is_traceable_wrapper_subclass(value):
        return {"wrapper": _encode_wrapper(value, path, tensors)}
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return {"tensor": path, "cpu": value.device.type == "cpu"}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.Size):
        value = tuple(value)
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_encode(each, f"{path}/{index}", tensors) for index, each in enumerate(value)]}
    raise UsageError(
        "this optimizer cannot be saved",
        where="optimizer.name",
        why=f"its state {path} is a {type(value).__name__}; only tensors and plain values are stored",
        fix="choose another optimizer, or set checkpoint.state to 'none'",
    )


def _encode_wrapper(value: Any, path: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A tensor that is made of others, such as one in 8 bits with its scales."""
    names, context = value.__tensor_flatten__()
    kind = type(value)
    return {
        "class": f"{kind.__module__}:{kind.__qualname__}",
        "parts": {name: _encode(getattr(value, name), f"{path}.{name}", tensors) for name in names},
        "context": _encode(context, f"{path}.context", tensors),
        "size": list(value.size()),
        "stride": list(value.stride()),
    }


def _decode_wrapper(
    value: Mapping[str, Any], tensors: Mapping[str, Tensor], used: set[str], device: torch.device
) -> Any:
    module, _, name = value["class"].partition(":")
    if module.partition(".")[0] != "torchao":
        # A checkpoint must not be able to have anything imported.
        raise _differs(f"it holds a {value['class']}, which is not restored")
    kind = getattr(importlib.import_module(module), name)
    parts = {key: _decode(part, tensors, used, device) for key, part in value["parts"].items()}
    context = _decode(value["context"], tensors, used, device)
    return kind.__tensor_unflatten__(parts, context, torch.Size(value["size"]), tuple(value["stride"]))


def _unpack(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor], used: set[str], device: torch.device
) -> dict[str, Any]:
    return {key: _decode(value, tensors, used, device) for key, value in values.items()}


def _decode(value: Any, tensors: Mapping[str, Tensor], used: set[str], device: torch.device) -> Any:
    if not isinstance(value, Mapping):
        return value
    if "tensor" in value:
        if value["tensor"] not in tensors:
            raise _differs(f"the tensor {value['tensor']} is missing")
        used.add(value["tensor"])
        tensor = tensors[value["tensor"]].clone()
        return tensor if value["cpu"] else tensor.to(device)
    if "float" in value:
        return float(value["float"])
    if "dtype" in value:
        dtype = getattr(torch, value["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise _differs(f"there is no dtype {value['dtype']!r}")
        return dtype
    if "wrapper" in value:
        return _decode_wrapper(value["wrapper"], tensors, used, device)
    kind, items = next(iter(value.items()))
    decoded = [_decode(each, tensors, used, device) for each in items]
    return tuple(decoded) if kind == "tuple" else decoded


_SHAPED = ("exp_avg", "exp_avg_sq", "momentum_buffer", "z")
"""State that has its parameter's shape in every optimizer that uses these names."""


def _place(
    state: dict[str, Any], parameter: nn.Parameter, group: Mapping[str, Any], name: str, home: torch.device
) -> dict[str, Any]:
    """Tensors on the device where they are expected, ``home`` or that of step counters, which may be the CPU."""
    for key, value in state.items():
        if not isinstance(value, Tensor):
            continue
        if key in _SHAPED and value.shape != parameter.shape:
            raise _differs(f"{name} has shape {tuple(parameter.shape)} here and {tuple(value.shape)} there")
        stays = key == "step" and not (group.get("fused") or group.get("capturable"))
        state[key] = value if stays else value.to(home if value.ndim else parameter.device)
    return state


def _differs(why: str) -> UsageError:
    return UsageError(
        "the saved optimizer state does not fit this run",
        where="checkpoint.resume",
        why=why,
        fix="resume with the configuration of the saved run, or start a new run from its adapter (network.init_from)",
    )
