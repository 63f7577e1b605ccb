"""The pairs of services that are refused, with a part of the reason. Nothing else is: the list is frozen by a test.

Each is one of these: two ways to do one thing, a service whose object is not there, or an exclusion that has a reason
in the arithmetic or in torch.
"""

from __future__ import annotations

from collections.abc import Mapping

_KINDS = ("dora", "loha", "lokr", "oft", "boft", "ia3", "whole-change")
_WITHOUT_FACTORS = ("loha", "lokr", "oft", "boft", "ia3", "whole-change")

_BY_SERVICE: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "activations-offloaded": {
        "weights and activations would wait for each other": ("streamed",),
        "nothing else may be kept": ("recomputed-keep-attention", "recomputed-selective"),
    },
    "attention-math": {"keeps what torch's fused kernels give": ("recomputed-keep-attention",)},
    "compiled": {"a graph is one": ("recomputed-keep-attention", "recomputed-selective")},
    "unfused-qkv": {"quantized weights are multiplied one by one": ("int8", "int8-arithmetic", "loftq")},
    "pissa": {"only with 'lora'": _KINDS},
    "loftq": {"only with 'lora'": _KINDS, "of train.components is not quantized": ("text-encoder",)},
    "max-norm": {
        "only with 'lora'": _KINDS,
        "starts far from zero": ("pissa", "loftq"),
        "a second copy of what trains": ("schedule-free",),
    },
    "dropout": {"only with 'lora', 'dora'": _WITHOUT_FACTORS},
    "whole-model": {
        "has no effect with train.mode 'full'": (
            *_KINDS, "norms", "pissa", "loftq", "max-norm", "dropout", "module-dropout",
        ),
        "quantized weights cannot train": ("int8", "int8-arithmetic", "loftq"),
        "needs the base model": ("preserved",),
        "no program loads": ("text-encoder",),
    },
    "fused-update": {"every backward pass would be an update of its own": ("accumulated", "float32-gradients")},
    "schedule-free": {
        "an average already": ("average", "average-feedback"),
        "switches between two kinds of weights": ("stochastic", "kahan", "state-offloaded"),
        "not known to update every parameter by itself": ("fused-update",),
    },
}  # fmt: skip

REFUSALS: Mapping[frozenset[str], tuple[str, ...]] = {
    pair: tuple(
        reason
        for service, reasons in _BY_SERVICE.items()
        for reason, others in reasons.items()
        if any(pair == {service, other} for other in others)
    )
    for pair in {
        frozenset((service, other))
        for service, reasons in _BY_SERVICE.items()
        for others in reasons.values()
        for other in others
    }
}
"""Two services -> parts of the message; it has each of them."""
