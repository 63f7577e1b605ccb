"""The optimizers that have a name: where each comes from, and what is known about how it works."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.core.config import OptimizerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """module, attribute: the class. package: what to install when ``module`` is not there.

    separate: a parameter's update depends on nothing but its own gradient and state, so parameters can be updated one
    after the other, during the backward pass for instance. counts: updates are counted by group, not by parameter, so
    that the count must go back when the next part of a group is updated. own_rate: it scales lr by an estimate of its
    own, so all groups must share one rate near 1. rounds: the argument, on unless it is given, by which it keeps what
    bfloat16 weights lack by itself. bytes: of state per value of a large float32 matrix. fixed: arguments that make the
    name what it is.
    """

    module: str
    attribute: str
    package: str | None = None
    separate: bool = False
    counts: bool = False
    own_rate: bool = False
    rounds: str | None = None
    bytes: float = 8
    fixed: Mapping[str, Any] = field(default_factory=dict)


def _bitsandbytes(attribute: str, state: float, **fixed: float) -> Entry:
    return Entry(
        module="bitsandbytes.optim",
        attribute=attribute,
        package="bitsandbytes",
        separate=True,
        bytes=state,
        fixed=fixed,
    )


def _dadaptation(attribute: str, state: float, module: str = "dadaptation") -> Entry:
    return Entry(module=module, attribute=attribute, package="dadaptation", own_rate=True, bytes=state)


def _optimi(attribute: str, state: float, rounds: str | None = "kahan_sum") -> Entry:
    return Entry(
        module="optimi",
        attribute=attribute,
        package="torch-optimi",
        separate=True,
        counts=True,
        rounds=rounds,
        bytes=state,
    )


def _torchao(attribute: str, state: float) -> Entry:
    return Entry(module="torchao.optim", attribute=attribute, package="torchao", separate=True, bytes=state)


def _collected(attribute: str, state: float) -> Entry:
    return Entry(
        module="pytorch_optimizer",
        attribute=attribute,
        package="pytorch-optimizer",
        separate=True,
        counts=True,
        bytes=state,
    )


def _schedule_free(attribute: str, state: float) -> Entry:
    return Entry(module="schedulefree", attribute=attribute, package="schedulefree", bytes=state)


BUILTIN: Mapping[str, Entry] = {
    "adam": Entry(module="torch.optim", attribute="Adam", separate=True),
    "adamw": Entry(module="torch.optim", attribute="AdamW", separate=True),
    "adamw_bf16": Entry(module="tuner.core.optim.adamw_bf16", attribute="AdamWBf16", separate=True, bytes=4),
    "adagrad": Entry(module="torch.optim", attribute="Adagrad", separate=True, bytes=4),
    "adafactor": Entry(module="tuner.core.optim.adafactor", attribute="Adafactor", separate=True, bytes=0.01),
    "lion": Entry(module="tuner.core.optim.lion", attribute="Lion", separate=True, bytes=4),
    "muon": Entry(module="tuner.core.optim.muon", attribute="Muon", separate=True, bytes=4),
    "radam": Entry(module="torch.optim", attribute="RAdam", separate=True),
    "sgd": Entry(module="torch.optim", attribute="SGD", separate=True, bytes=0),
    "sgd_nesterov": Entry(
        module="torch.optim", attribute="SGD", separate=True, bytes=4, fixed={"momentum": 0.9, "nesterov": True}
    ),
    # Rates that find themselves.
    "prodigy": Entry(module="prodigyopt", attribute="Prodigy", package="prodigyopt", own_rate=True, bytes=16),
    "dadapt_adam": _dadaptation("DAdaptAdam", 12),
    "dadapt_adam_preprint": _dadaptation("DAdaptAdamPreprint", 12, "dadaptation.experimental"),
    "dadapt_adan": _dadaptation("DAdaptAdan", 20),
    "dadapt_adan_ip": _dadaptation("DAdaptAdanIP", 20, "dadaptation.experimental"),
    "dadapt_adagrad": _dadaptation("DAdaptAdaGrad", 12),
    "dadapt_lion": _dadaptation("DAdaptLion", 8),
    "dadapt_sgd": _dadaptation("DAdaptSGD", 12),
    # No schedule.
    "adamw_schedulefree": _schedule_free("AdamWScheduleFree", 8),
    "radam_schedulefree": _schedule_free("RAdamScheduleFree", 8),
    "sgd_schedulefree": _schedule_free("SGDScheduleFree", 4),
    # State in 8 bits, or paged to host memory by the driver.
    "adagrad8bit": _bitsandbytes("Adagrad8bit", 1),
    "adam8bit": _bitsandbytes("Adam8bit", 2),
    "adamw8bit": _bitsandbytes("AdamW8bit", 2),
    "ademamix": _bitsandbytes("AdEMAMix", 12),
    "ademamix8bit": _bitsandbytes("AdEMAMix8bit", 3),
    "lion8bit": _bitsandbytes("Lion8bit", 1),
    "sgd8bit": _bitsandbytes("SGD8bit", 1, momentum=0.9),
    "paged_adamw": _bitsandbytes("PagedAdamW", 8),
    "paged_adamw32bit": _bitsandbytes("PagedAdamW32bit", 8),
    "paged_adamw8bit": _bitsandbytes("PagedAdamW8bit", 2),
    "paged_ademamix": _bitsandbytes("PagedAdEMAMix", 12),
    "paged_ademamix8bit": _bitsandbytes("PagedAdEMAMix8bit", 3),
    "paged_lion": _bitsandbytes("PagedLion", 4),
    "paged_lion8bit": _bitsandbytes("PagedLion8bit", 1),
    "ao_adamw8bit": _torchao("AdamW8bit", 2),
    "ao_adamw4bit": _torchao("AdamW4bit", 1),
    "ao_adamfp8": _torchao("AdamFp8", 2),
    "ao_adamwfp8": _torchao("AdamWFp8", 2),
    # Others that people ask for, from packages that are kept up.
    # Adan has the sum off; Ranger goes back to slow weights that have none.
    "adan": _optimi("Adan", 16, None),
    "ranger": _optimi("Ranger", 12, None),
    "stableadamw": _optimi("StableAdamW", 8),
    "optimi_adam": _optimi("Adam", 8),
    "optimi_adamw": _optimi("AdamW", 8),
    "optimi_lion": _optimi("Lion", 4),
    "optimi_radam": _optimi("RAdam", 8),
    "optimi_sgd": _optimi("SGD", 0),
    "came": _collected("CAME", 4),
    "soap": _collected("SOAP", 28),
}
"""Schedule-free optimizers and those that estimate a rate for all parameters are not ``separate``."""


def entry_of(name: str) -> Entry | None:
    """What is known about ``optimizer.name``: a built-in name in any case, or the import path of what one stands for.
    None for anything else."""
    if "." not in name:
        return BUILTIN.get(name.lower())
    return next((each for each in BUILTIN.values() if f"{each.module}.{each.attribute}" == name), None)


def keeps_rests(config: OptimizerConfig) -> bool:
    """Whether the optimizer keeps what bfloat16 weights lack by itself, with these arguments."""
    entry = entry_of(config.name)
    return entry is not None and entry.rounds is not None and config.args.get(entry.rounds) is not False
