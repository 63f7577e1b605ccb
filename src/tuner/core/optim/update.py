"""Applying an optimizer: all parameters at once, some after the other, or during the backward pass.

The optimizer itself knows nothing of it. Around its step, weights in bfloat16 become float32 and are rounded back, and
its state comes from host memory and goes there again, as do weights that live there, with their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tuner.core.compute.pinned import HostCopies
from tuner.core.errors import UsageError
from tuner.core.optim.names import entry_of
from tuner.core.optim.rounding import fresh_generator, round_kahan, round_stochastic
from tuner.core.optim.state import is_schedule_free

if TYPE_CHECKING:
    from tuner.core.config import OptimizerConfig

CHUNK_BYTES = 1 << 28
"""Float32 copies of weights, and state on loan from host memory, that exist at one time."""
Lent = tuple[Tensor, Tensor]
"""A copy of a parameter and the gradient."""
SWITCHES = "it switches between two kinds of weights by itself"
"""Why a schedule-free optimizer cannot have its weights or its state elsewhere."""
REST = "kahan"
"""Name of the state that Kahan rounding adds: what the bfloat16 weight lacks."""


class Update:
    """One update of the parameters that have a gradient. names: all trained parameters, by a name that is stable.

    device: where updates are computed; None: where the parameters are. Those that are elsewhere come with gradient and
    state, so many at a time as fit into `CHUNK_BYTES`, and go back without gradient: the optimizer must be one that
    updates every parameter by itself then.
    Raises UsageError when what is asked for has no effect on these parameters, or cannot work with the optimizer.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        optimizer: torch.optim.Optimizer,
        names: Mapping[str, nn.Parameter],
        seed: int,
        device: torch.device | None = None,
    ) -> None:
        self.optimizer, self.seed = optimizer, seed
        self.rounding, self.offload = config.rounding, config.offload
        entry = entry_of(config.name)
        self.separate = entry is not None and entry.separate
        self._counts = _Counts() if entry is not None and entry.counts else None
        self.name_of = {parameter: name for name, parameter in names.items()}
        self.group_of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
        self.device, self._host = device, HostCopies("optimizer.offload" if config.offload else "memory.swap_blocks")
        self.away = {each for each in self.group_of if device is not None and each.device != device}
        self._check(config)

    def _check(self, config: OptimizerConfig) -> None:
        trained = [parameter for parameter in self.group_of if parameter.requires_grad]
        if config.rounding != "nearest":
            if all(parameter.dtype == torch.float32 for parameter in trained):
                raise UsageError(
                    f"{config.rounding} rounding has no effect",
                    where="optimizer.rounding",
                    why="everything that trains is kept in float32",
                    fix="take it out",
                )
            if is_schedule_free(self.optimizer):
                raise _cannot(config, "rounding", SWITCHES)
        if config.fuse != "off" and not self.separate:
            raise _cannot(config, "fuse", "it is not known to update every parameter by itself")
        if config.offload and is_schedule_free(self.optimizer):
            raise _cannot(config, "offload", SWITCHES)

    def __call__(self, step: int) -> None:
        """Update number ``step``, counted from 1."""
        if self.rounding == "nearest" and not self.offload and not self.away:
            with fitting_gradients(self.group_of):
                self.optimizer.step()
            return
        with_gradient = [parameter for parameter in self.group_of if parameter.grad is not None]
        for chunk in self._chunks(with_gradient):
            self.apply(chunk, step)
        self.settle()

    def apply(
        self, parameters: Sequence[nn.Parameter], step: int, lent: Mapping[nn.Parameter, Lent] | None = None
    ) -> None:
        """Update these parameters alone; their gradients are gone afterwards if they had to be converted or moved.

        lent: copies to change in place of some of the parameters, and their gradients.
        """
        here = self._here(parameters, lent or {})
        if self._counts is not None:
            self._counts.begin(step, [self.group_of[each] for each in parameters])
        with torch.no_grad(), self._only(parameters), here, self._state_here(parameters):
            kept = [parameter.data for parameter in parameters]
            convert = [self.rounding != "nearest" and data.dtype == torch.bfloat16 for data in kept]
            for parameter, data, converted in zip(parameters, kept, convert, strict=True):
                if converted:
                    self._to_float32(parameter, data)
            with fitting_gradients(parameters):
                self.optimizer.step()
            for parameter, data, converted in zip(parameters, kept, convert, strict=True):
                if converted:
                    self._round_back(parameter, data, step)

    def _to_float32(self, parameter: nn.Parameter, data: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        weights = data.float()
        rest = self.optimizer.state[parameter].pop(REST, None) if parameter in self.optimizer.state else None
        if rest is not None:
            weights += rest
        parameter.data = weights
        assert gradient is not None
        parameter.grad = gradient.float()

    def _round_back(self, parameter: nn.Parameter, data: Tensor, step: int) -> None:
        weights, parameter.grad = parameter.data, None
        parameter.data = data
        if self.rounding == "kahan":
            rounded, self.optimizer.state[parameter][REST] = round_kahan(weights)
        else:
            generator = fresh_generator(data.device, self.seed, step, self.name_of[parameter])
            rounded = round_stochastic(weights, generator)
        data.copy_(rounded)

    def _chunks(self, parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        """So many parameters at a time that their copies stay small; all at once when they cannot be separated."""
        chunk: list[nn.Parameter] = []
        size = 0
        for parameter in parameters:
            more = 4 * parameter.numel()
            if chunk and self.separate and size + more > CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
            chunk.append(parameter)
            size += more
        if chunk:
            yield chunk

    @contextmanager
    def _only(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """The optimizer sees these parameters and no others, in their own groups."""
        if not self.separate:
            yield
            return
        everything = self.optimizer.param_groups
        groups: dict[int, dict[str, Any]] = {}
        chosen: dict[int, list[nn.Parameter]] = {}
        for parameter in parameters:
            group = self.group_of[parameter]
            groups[id(group)] = group
            chosen.setdefault(id(group), []).append(parameter)
        before = {key: group["params"] for key, group in groups.items()}
        for key, group in groups.items():
            group["params"] = chosen[key]
        self.optimizer.param_groups = list(groups.values())
        try:
            yield
        finally:
            self.optimizer.param_groups = everything
            for key, group in groups.items():
                group["params"] = before[key]

    @contextmanager
    def _here(self, parameters: Sequence[nn.Parameter], lent: Mapping[nn.Parameter, Lent]) -> Iterator[None]:
        """Put copies in place of weights that live in host memory, for the time being."""
        guests = [(each, each.data) for each in parameters if each in lent or each in self.away]
        for parameter, data in guests:
            gradient, parameter.grad = parameter.grad, None
            if parameter in lent:
                parameter.data, gradient = lent[parameter]
            else:
                parameter.data = data.to(self.device, non_blocking=True)
            assert gradient is not None
            parameter.grad = gradient.to(parameter.device, non_blocking=True)
        yield
        for parameter, data in guests:
            changed, parameter.grad = parameter.data, None
            parameter.data = data
            home = lent[parameter][0] if parameter in lent else data
            if home.data_ptr() != changed.data_ptr():
                home.copy_(changed, non_blocking=True)

    @contextmanager
    def _state_here(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Bring state that lives in host memory to the parameters' device for the time being."""
        guests = [parameter for parameter in parameters if self.offload or parameter in self.away]
        if guests:
            self._move(guests, lambda parameter: parameter.device)
        yield
        if guests:
            self._move(guests, lambda parameter: torch.device("cpu"))

    def _move(self, parameters: Sequence[nn.Parameter], place: Callable[[nn.Parameter], torch.device]) -> None:
        for parameter in parameters:
            state, group = self.optimizer.state.get(parameter, {}), self.group_of[parameter]
            # Counters stay where the optimizer put them, unless a resumed one found them with the weights.
            counters = bool(parameter in self.away and (group.get("fused") or group.get("capturable")))
            for key, value in state.items():
                state[key] = self._moved((parameter, key), value, place(parameter), counters)

    def _moved(self, key: tuple[object, ...], value: Any, target: torch.device, counters: bool) -> Any:
        if isinstance(value, list):
            return [self._moved((*key, number), each, target, counters) for number, each in enumerate(value)]
        if not isinstance(value, Tensor) or not (value.ndim or counters):
            return value
        there = target.type == "cpu" and value.device.type != "cpu"
        return self._host.put(key, value) if there else value.to(target, non_blocking=True)

    def settle(self) -> None:
        """Wait for what is on its way to host memory: until then nobody may look at it there."""
        if self.device is not None and self.device.type == "cuda" and (self.offload or self.away):
            torch.cuda.current_stream(self.device).synchronize()


class _Counts:
    """What an optimizer keeps by group and not by parameter: every part of a group must find it as the first did."""

    def __init__(self) -> None:
        self._step: int | None = None
        self._before: dict[int, dict[str, Any]] = {}

    def begin(self, step: int, groups: Iterable[dict[str, Any]]) -> None:
        """Before a part of update ``step``, whose parameters are in these groups."""
        if step != self._step:
            self._step, self._before = step, {}
        for group in groups:
            before = self._before.get(id(group))
            if before is None:
                self._before[id(group)] = {key: _kept(value) for key, value in group.items() if key != "params"}
                continue
            for key in group.keys() - before.keys() - {"params"}:
                del group[key]
            group.update({key: _kept(value) for key, value in before.items()})


def _kept(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


class FusedUpdate:
    """Updates parameters during the backward pass, as soon as their gradients are there, and frees these.

    units: parameters that are updated together, by names; every other parameter is updated by itself. One backward pass
    makes one update. clip_value: largest absolute value of a gradient's element, or None. finish: what ends the update.
    """

    def __init__(
        self, update: Update, units: Sequence[Sequence[nn.Parameter]], *, clip_value: float | None = None
    ) -> None:
        self.update, self.clip_value = update, clip_value
        single: dict[nn.Parameter, Sequence[nn.Parameter]] = {each: (each,) for each in update.group_of}
        self._unit = single | {parameter: unit for unit in units for parameter in unit}
        self._waiting: dict[int, int] = {}
        self._squares: dict[nn.Parameter, Tensor] = {}
        # Gradients of parameters in host memory arrive in another thread than those on the device.
        self._lock = Lock()
        self._step: int | None = None
        self.finish: Callable[[], None] = update.settle
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._arrived) for parameter in update.group_of
        ]  # fmt: skip

    @contextmanager
    def during(self, step: int) -> Iterator[None]:
        """Around the backward pass of update ``step``; what has got no gradient by then stays as it is."""
        self._step, self._waiting, self._squares = step, {}, {}
        try:
            yield
            for parameter, unit in self._unit.items():
                if parameter.grad is not None:
                    self._apply([each for each in unit if each.grad is not None])
            self.finish()
        finally:
            self._step = None

    def take(self, parameters: Sequence[Tensor], copies: Sequence[Tensor], gradients: Sequence[Tensor]) -> bool:
        """Update copies of parameters with these gradients, in place; False outside of an update."""
        if self._step is None:
            return False
        lent: dict[nn.Parameter, Lent] = {}
        for parameter, copy, gradient in zip(parameters, copies, gradients, strict=True):
            assert isinstance(parameter, nn.Parameter)
            # Of its own: what is upstream may share it, and a limit or an optimizer may change it.
            lent[parameter] = copy, gradient.clone()
        with self._lock:
            for parameter, (_, gradient) in lent.items():
                self._seen(parameter, gradient)
            self.update.apply(list(lent), self._step, lent)
        return True

    def norm(self) -> Tensor:
        """Norm of all gradients of the last update, before they were limited."""
        squares = [self._squares[each] for each in self._unit if each in self._squares]
        if not squares:
            return torch.zeros(())
        return torch.stack([each.to(squares[0].device) for each in squares]).sum().sqrt()

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _arrived(self, parameter: Tensor) -> None:
        # Without a gradient where one was taken before it got here.
        if self._step is None or parameter.grad is None:
            return
        assert isinstance(parameter, nn.Parameter)
        with self._lock:
            unit = self._unit[parameter]
            left = self._waiting.get(id(unit), len(unit)) - 1
            self._waiting[id(unit)] = left
            if left == 0:
                self._apply(unit)

    def _seen(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        self._squares[parameter] = gradient.float().square().sum()
        if self.clip_value is not None:
            gradient.clamp_(-self.clip_value, self.clip_value)

    def _apply(self, parameters: Sequence[nn.Parameter]) -> None:
        assert self._step is not None
        for parameter in parameters:
            assert parameter.grad is not None
            self._seen(parameter, parameter.grad)
        self.update.apply(parameters, self._step)
        for parameter in parameters:
            parameter.grad = None


def add_up_in_float32(parameters: Iterable[nn.Parameter]) -> None:
    """Let the gradients of these parameters be summed in float32, whatever dtype the parameters have.

    Raises UsageError when they have float32 already.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if all(parameter.dtype == torch.float32 for parameter in parameters):
        raise UsageError(
            "gradients in float32 have no effect",
            where="precision.gradients",
            why="everything that trains is kept in float32, and its gradients with it",
            fix="take it out",
        )
    for parameter in parameters:
        parameter.grad_dtype = torch.float32


@contextmanager
def fitting_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gradients have the dtype of their parameters, as torch's optimizers want it; those that had not are gone
    afterwards."""
    changed = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None or gradient.dtype == parameter.dtype:
            continue
        changed.append((parameter, gradient.dtype))
        parameter.grad = None
        parameter.grad_dtype = parameter.dtype
        parameter.grad = gradient.to(parameter.dtype)
    yield
    for parameter, dtype in changed:
        parameter.grad = None
        parameter.grad_dtype = dtype


def _cannot(config: OptimizerConfig, key: str, why: str) -> UsageError:
    return UsageError(
        f"the optimizer {config.name!r} cannot be used with optimizer.{key}",
        where=f"optimizer.{key}",
        why=why,
        fix=f"take optimizer.{key} out, or choose another optimizer, such as adamw, adamw_bf16, adafactor or lion",
    )
