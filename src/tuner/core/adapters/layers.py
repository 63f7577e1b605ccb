"""What every adapter layer shares, the low-rank layer, and putting a layer into a module in place.

A low-rank layer stands for `up(mask * down(x)) * strength * alpha / rank` beside the frozen module it belongs to; that
module computes the sum (`tuner.core.compute.linear`), so only parameters live here. Formula: Hu et al. 2021, LoRA.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner.core.compute.linear import adapted_forward
from tuner.core.errors import UsageError
from tuner.core.rng import Rng

if TYPE_CHECKING:
    from tuner.core.adapters.targets import Target

ELEMENT, COMPONENT, MODULE = 1, 2, 3
"""What a dropout draw decides about: keeps the three draws of one sample apart."""
LOW32 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropout:
    """Rates in [0, 1).

    element: entries of the down activation; rank: whole rank components of a sample; both scale what is left by
    1/(1-p). module: the whole layer for a sample, nothing is rescaled.
    """

    element: float = 0.0
    rank: float = 0.0
    module: float = 0.0

    def __bool__(self) -> bool:
        return max(self.element, self.rank, self.module) > 0


@dataclass(slots=True)
class DropoutKeys:
    """Keys of the samples of the running step, int64 [samples], shared by all layers; None outside `adapter_rng`."""

    samples: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Making:
    """What layers are made with, beside their own settings.

    dtype: of the parameters. init, init_norm: those of ``network``.
    """

    init: str = "default"
    init_norm: float | None = None
    dropout: Dropout
    keys: DropoutKeys
    dtype: torch.dtype
    device: torch.device
    rng: Rng


class AdapterLayer(nn.Module, ABC):
    """What is trained beside one module, or beside several linears of one input. Its parameters are named as its parts.

    strength: 1 is the adapter as trained, 0 is exactly the base model. alpha: the fixed number that files keep, None
    where the kind has none.
    """

    kind: ClassVar[str]
    faster: ClassVar[frozenset[str]] = frozenset()
    """Parameters that the LoRA+ ratio speeds up."""
    factors: ClassVar[tuple[str, ...]] = ()
    """Parts of which the first that is present may carry a factor on the whole update."""
    dropout_key: Tensor
    strength: float = 1.0
    alpha: float | None = None
    rows: tuple[int, ...]

    def __init__(self, dropout: Dropout, keys: DropoutKeys, rng: Rng, device: torch.device) -> None:
        super().__init__()
        self.dropout, self.keys = dropout, keys
        if dropout:
            key = torch.tensor(rng.child("dropout").key(), dtype=torch.int64, device=device)
            self.register_buffer("dropout_key", key, persistent=False)

    @classmethod
    def make(
        cls, bases: Sequence[nn.Module], target: Target, making: Making, stored: Mapping[str, Tensor] | None
    ) -> Self:
        """The layer for the modules of ``target``, at its start. stored: parts of a file that decide its sizes."""
        return cls(bases[0], target, making, stored)  # type: ignore[arg-type]

    def set_strength(self, strength: float) -> None:
        self.strength = strength

    @property
    @abstractmethod
    def settings(self) -> str:
        """What distinguishes this layer from another of its kind, for a line of the log."""

    @property
    def scale(self) -> float:
        """0 means that the layer is not there; a low-rank layer has its factor alpha / rank in it."""
        return self.strength

    def parts(self) -> Sequence[object]:
        """What each module computes with (the attribute ``adapter``): the layer itself, or its share of the rows."""
        return [self]

    def tensors(self) -> list[dict[str, Tensor]]:
        """The parts of each module, detached and live, or copies where modules share them."""
        found = {name: value.detach() for name, value in self.named_parameters()}
        return [found | self.fixed()]

    def exported(self) -> list[dict[str, Tensor]]:
        """The parts of each module as a file for other programs holds them: what changes the model's own weights."""
        return self.tensors()

    def load(self, members: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> None:
        """Set the values of `tensors`. names: what errors call the modules. UsageError: another shape."""
        for name, parameter in self.named_parameters():
            copy_into(parameter, members[0][name], f"{names[0]}.{name}")

    def start(self, stored: Mapping[str, Mapping[str, Tensor]], names: Sequence[str]) -> None:
        """Take up what a file holds for some of the modules, by name; the update stays that of the file.

        names: what errors call the modules. UsageError: other shapes, or a number that is fixed otherwise.
        """
        for name, parts in stored.items():
            parts = self.rescaled(parts, name)
            for part, value in self.tensors()[0].items():
                if part not in parts or parts[part].shape != value.shape:
                    shapes = f"{[*parts[part].shape]}" if part in parts else "nothing"
                    raise UsageError(
                        f"the file has {shapes} as {name}.{part}, the configuration {[*value.shape]}",
                        where="network.init_from",
                        fix='set network.rank to "from_file"',
                    )
            self.load([parts], [name])

    def rescaled(self, parts: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
        """The parts of one module with this layer's alpha and the same update."""
        if self.alpha is None or float(parts["alpha"]) == self.alpha:
            return dict(parts)
        factor = next((part for part in self.factors if part in parts), None)
        if factor is None:
            raise UsageError(f"{name} has alpha {float(parts['alpha']):g}, this network {self.alpha:g}")
        value = parts[factor].float() * (float(parts["alpha"]) / self.alpha)
        return {**parts, factor: value, **self.fixed()}

    def fixed(self) -> dict[str, Tensor]:
        """Parts that are numbers of the configuration."""
        return {} if self.alpha is None else {"alpha": torch.tensor(self.alpha, dtype=torch.float32)}

    def samples(self, x: Tensor) -> Tensor | None:
        """The key of each row of the batch ``x`` [B, ...], [B, 1], or None where nothing is dropped.

        Row b belongs to sample b modulo the number of samples (guidance stacks batches).
        """
        if not self.dropout or not self.training:
            return None
        if self.keys.samples is None:
            if torch.is_grad_enabled():
                raise RuntimeError("an adapter with dropout trains outside adapter_rng")
            return None
        samples = self.keys.samples[torch.arange(x.shape[0], device=x.device) % self.keys.samples.shape[0]]
        return (samples ^ self.dropout_key).reshape(-1, 1)

    def module_mask(self, x: Tensor) -> Tensor | None:
        """1 for the samples of ``x`` [B, ...] that keep this adapter, 0 for the others, [B, 1, ...]; None: all do."""
        key = self.samples(x)
        if key is None or self.dropout.module == 0:
            return None
        return keep(key, 1, self.dropout.module, MODULE).reshape(-1, *(1,) * (x.ndim - 1)).to(x.dtype)


class ChangeLayer(AdapterLayer):
    """A layer that is computed from what its module got and gave, when that is done."""

    def adapt(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """The output with the adapter: x [..., in] is what ``base`` got, y [..., out] what it made of it."""
        change = self.change(x, y, base)
        mask = self.module_mask(x)
        return y + (change if mask is None else change * mask).to(y.dtype)

    @abstractmethod
    def change(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """What the adapter adds to ``y`` at its strength."""


class LoraLayer(AdapterLayer):
    """down [rank, in, *kernel] drawn uniformly within 1/sqrt(fan in), up [out, rank, *ones] zero; so it starts neutral.

    The draw is Kaiming's with a = sqrt(5), from a stream of its own: order of creation and device do not matter.
    others: further linears on the same input; the rows of up are then those of all of them, one below the other.
    """

    kind = "lora"
    faster = frozenset({"up"})
    factors = ("up",)
    alpha: float

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int,
        alpha: float,
        dropout: Dropout,
        keys: DropoutKeys,
        dtype: torch.dtype,
        rng: Rng,
        others: Sequence[nn.Module] = (),
    ) -> None:
        device = base_device(base)
        super().__init__(dropout, keys, rng, device)
        down_shape, up_shape = factor_shapes(base, rank)
        self.rows = (up_shape[0], *(factor_shapes(each, rank)[1][0] for each in others))
        up_shape = (sum(self.rows), *up_shape[1:])
        bound = 1 / math.sqrt(math.prod(down_shape[1:]))
        drawn = rng.uniform(down_shape).mul_(2 * bound).sub_(bound)
        self.down = nn.Parameter(drawn.to(device=device, dtype=dtype))
        self.up = nn.Parameter(torch.zeros(up_shape, device=device, dtype=dtype))
        self.rank, self.alpha = rank, float(alpha)

    @classmethod
    def make(
        cls, bases: Sequence[nn.Module], target: Target, making: Making, stored: Mapping[str, Tensor] | None
    ) -> Self:
        layer = cls(
            bases[0],
            others=bases[1:],
            rank=target.rank,
            alpha=target.alpha,
            dropout=making.dropout,
            keys=making.keys,
            dtype=making.dtype,
            rng=making.rng,
        )
        if making.init == "gaussian":
            drawn = making.rng.child("gaussian").normal(layer.down.shape) / target.rank
            layer.down.data.copy_(drawn)
        return layer

    @property
    def scale(self) -> float:
        return self.strength * self.alpha / self.rank

    @property
    def settings(self) -> str:
        return f"rank {self.rank}, alpha {self.alpha:g}"

    def tensors(self) -> list[dict[str, Tensor]]:
        down, ups = self.down.detach(), torch.split(self.up.detach(), list(self.rows))
        if len(ups) == 1:
            return [{"down": down, "up": ups[0], **self.fixed()}]
        return [{"down": down.clone(), "up": up.clone(), **self.fixed()} for up in ups]

    def load(self, members: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> None:
        for parts, name, rows in zip(members, names, torch.split(self.up.data, list(self.rows)), strict=True):
            if not torch.equal(parts["down"], members[0]["down"]):
                raise UsageError(f"{name} has an adapter of its own, this network one for {', '.join(names)}")
            copy_into(rows, parts["up"], f"{name}.up")
        copy_into(self.down, members[0]["down"], f"{names[0]}.down")

    def start(self, stored: Mapping[str, Mapping[str, Tensor]], names: Sequence[str]) -> None:
        first, down = next((name, parts["down"].float()) for name, parts in stored.items())
        if down.shape[0] != self.rank:
            raise UsageError(
                f"the file has rank {down.shape[0]} at {first}, the configuration {self.rank}",
                where="network.init_from",
                fix='set network.rank to "from_file"',
            )
        if not all(torch.equal(parts["down"].float(), down) for parts in stored.values()):
            raise UsageError(
                f"the file has separate adapters inside {', '.join(names)}, the configuration has one for all",
                where="network.init_from",
                fix="set network.split_fused to true",
            )
        copy_into(self.down, down, f"{first}.down")
        for name, rows in zip(names, torch.split(self.up.data, list(self.rows)), strict=True):
            if name in stored:
                copy_into(rows, self.rescaled(stored[name], name)["up"], f"{name}.up")

    def mid_mask(self, x: Tensor) -> Tensor | None:
        """Factor on the down activation of `x` [B, ..., in]: broadcastable to [B, ..., rank]; None without dropout.

        A draw depends on the layer, the sample, the step and the position alone: recomputation, another batch size and
        a resumed run see the same.
        """
        key = self.samples(x)
        if key is None:
            return None
        middle = x.shape[1:-1]
        ones = (1,) * len(middle)
        mask: Tensor | None = None
        for rate, salt, shape, rescale in (
            (self.dropout.element, ELEMENT, (*middle, self.rank), True),
            (self.dropout.rank, COMPONENT, (*ones, self.rank), True),
            (self.dropout.module, MODULE, (*ones, 1), False),
        ):
            if rate > 0:
                kept = keep(key, math.prod(shape), rate, salt).reshape(x.shape[0], *shape).to(x.dtype)
                factor = kept / (1 - rate) if rescale else kept
                mask = factor if mask is None else mask * factor
        return mask

    def parts(self) -> Sequence[LoraLayer | LoraPart]:
        if len(self.rows) == 1:
            return [self]
        starts = accumulate(self.rows, initial=0)
        return [LoraPart(self, start, size) for start, size in zip(starts, self.rows, strict=False)]


class LoraPart:
    """One linear's rows of a layer that several linears share: the same down, scale and dropout for all of them."""

    def __init__(self, layer: LoraLayer, start: int, size: int) -> None:
        self.layer, self.start, self.size = layer, start, size

    @property
    def down(self) -> Tensor:
        return self.layer.down

    @property
    def up(self) -> Tensor:
        return self.layer.up.narrow(0, self.start, self.size)

    @property
    def scale(self) -> float:
        return self.layer.scale

    def mid_mask(self, x: Tensor) -> Tensor | None:
        return self.layer.mid_mask(x)


def keep(key: Tensor, count: int, rate: float, salt: int) -> Tensor:
    """[rows, count] booleans, True with probability 1 - rate: a counter-based hash of (key [rows, 1], salt, position).

    Integer arithmetic on tensors, so that it runs inside compiled graphs and gives the same on every device.
    """
    position = torch.arange(count, device=key.device, dtype=torch.int64)
    hashed = _mix(_mix(position + salt * 0x9E3779B1 & LOW32) ^ (key & LOW32))
    hashed = _mix(hashed ^ (key >> 32))
    return hashed >= int(rate * 2**32)


def _mix(value: Tensor) -> Tensor:
    """A bijection of 32-bit integers held in int64; the multipliers are below 2**31, so no product overflows."""
    value = (value ^ (value >> 15)) * 0x2C1B3C6D & LOW32
    value = (value ^ (value >> 12)) * 0x297A2D39 & LOW32
    return value ^ (value >> 15)


def copy_into(parameter: Tensor, value: Tensor, name: str) -> None:
    """Set a parameter's value, or that of some of its rows, in place. UsageError: other numbers of rows or columns."""
    if value.numel() != parameter.numel() or value.shape[:2] != parameter.shape[:2]:
        raise UsageError(
            f"{name} has shape {list(value.shape)}, the model wants {list(parameter.shape)}",
            why="the adapter was trained for another model",
        )
    parameter.data.copy_(value.reshape(parameter.shape))


# --- base modules -----------------------------------------------------------------------------------------------------


def is_adaptable(module: nn.Module) -> bool:
    """Linears (quantized ones too: they have no children and tell their sizes) and ungrouped convolutions."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1
    if isinstance(module, nn.Linear):
        return True
    sized = all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))
    return sized and "linear" in type(module).__name__.lower()


def factor_shapes(base: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of down and up for a base module."""
    if isinstance(base, nn.Conv2d):
        return (rank, base.in_channels, *base.kernel_size), (base.out_channels, rank, 1, 1)
    sizes: Any = base
    return (rank, sizes.in_features), (sizes.out_features, rank)


def only_linear(base: nn.Module, target: Target, kind: str) -> nn.Linear:
    """``base`` as a linear. UsageError for a convolution, which kinds other than lora and full do not adapt."""
    if isinstance(base, nn.Conv2d):
        raise UsageError(
            f"{target.key} is a convolution, which network.type {kind!r} cannot adapt",
            where="network",
            fix="exclude it by network.exclude, or use network.type 'lora' or 'full'",
        )
    return cast("nn.Linear", base)


def base_device(base: nn.Module) -> torch.device:
    """Where a layer for ``base`` is made: where its weight is, the CPU for one on the meta device or without any."""
    tensor: Tensor | None = next(base.parameters(), None)
    if tensor is None:
        tensor = next(base.buffers(), None)
    return torch.device("cpu") if tensor is None or tensor.device.type == "meta" else tensor.device


@dataclass(frozen=True, slots=True, kw_only=True)
class Injection:
    """One adapted module and what to put back when the adapter goes."""

    base: nn.Module
    forward: Callable[..., Tensor] | None
    base_forward: Callable[..., Tensor] | None
    kind: type[nn.Module] | None = None


def inject(base: nn.Module, layer: object) -> Injection:
    """Make `base` compute with `layer`. Names, parameters and the state dict of the model stay as they are."""
    slots = base.__dict__
    record = Injection(base=base, forward=slots.get("forward"), base_forward=slots.get("base_forward"))
    if isinstance(base, nn.Conv2d):
        slots["base_forward"] = base.forward
        slots["forward"] = MethodType(_adapted_convolution, base)
    else:
        # Anything but a stock linear (a quantized one) keeps computing its own product.
        if record.base_forward is None and (record.forward is not None or type(base).forward is not nn.Linear.forward):
            slots["base_forward"] = base.forward
        slots["forward"] = MethodType(adapted_forward, base)
    # Past nn.Module's own attribute handling: a registered submodule would change the model's names.
    slots["adapter"] = layer
    return record


def eject(record: Injection) -> None:
    """Undo `inject`."""
    slots = record.base.__dict__
    slots.pop("adapter", None)
    if record.kind is not None:
        record.base.__class__ = record.kind
    for name, value in (("forward", record.forward), ("base_forward", record.base_forward)):
        if value is None:
            slots.pop(name, None)
        else:
            slots[name] = value


def _adapted_convolution(base: nn.Conv2d, x: Tensor) -> Tensor:
    """`forward` of an adapted convolution: [B, in, H, W] -> [B, out, H', W']."""
    y: Tensor = base.base_forward(x)  # type: ignore[operator]
    layer: Any = base.adapter
    if layer.scale == 0.0:
        return y
    if not isinstance(layer, LoraLayer | LoraPart):
        adapted: Tensor = layer.adapt(x, y, base)
        return adapted
    return y + convolved(layer, x, base)


def convolved(layer: LoraLayer | LoraPart, x: Tensor, base: nn.Conv2d) -> Tensor:
    """What a low-rank layer adds to the output of a convolution: [B, in, H, W] -> [B, out, H', W']."""
    mid = F.conv2d(x, layer.down.to(x.dtype), None, base.stride, base.padding, base.dilation)
    mask = layer.mid_mask(mid.permute(0, 2, 3, 1))
    if mask is not None:
        mid = mid * mask.permute(0, 3, 1, 2)
    return F.conv2d(mid, (layer.up * layer.scale).to(x.dtype))
