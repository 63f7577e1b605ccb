"""The services of a run that a user switches on, each with what must be true of the outcome when it is on.

A service sets ``keys``; ``needs`` are keys that it has no meaning without, which a service beside it may set otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

from tuner.core.config.document import dotted, merged, walk

Effect = Literal["same", "near", "other"]


@dataclass(frozen=True, kw_only=True)
class Service:
    """effect: on the numbers of a run: the ``same`` to the last bit, ``near`` (summed in another order), or ``other``.
    leaves: patterns of files below the run folder, and kinds of events, that a run has because of it. role: of a second
    source of pictures. rough: it makes every other service's rounding visible."""

    keys: Mapping[str, Any] = field(default_factory=dict)
    needs: Mapping[str, Any] = field(default_factory=dict)
    effect: Effect = "other"
    leaves: tuple[str, ...] = ()
    role: str | None = None
    rough: bool = False

    def is_named_in(self, message: str) -> bool:
        """Whether a key that the service sets or needs, or the value of one, is in the message."""
        given = [(path, value) for path, value in (*walk(self.keys), *walk(self.needs)) if isinstance(path[-1], str)]
        words = [dotted(path) for path, value in given if not isinstance(value, Mapping)]
        words += [repr(value) for _, value in given if isinstance(value, str)]
        return any(word in message for word in (*words, *([repr(self.role)] if self.role else [])))


BF16 = {"precision": {"compute": "bf16", "adapter": "bf16"}}
NO_NORM = {"train": {"clip_grad": None}}
RECOMPUTED = {"memory": {"checkpointing": "block"}}
INT8 = {"quantize": {"denoiser": "int8"}}
PROMPT = {"sample": {"prompts": ["a red dog --w 32 --h 32 --s 1"]}}


def _network(**keys: Any) -> Service:
    return Service(keys={"network": keys})


SERVICES: Mapping[str, Service] = {
    # memory
    "streamed": Service(keys={"memory": {"swap_blocks": 2}}, effect="same"),
    "recomputed": Service(keys=RECOMPUTED, effect="same"),
    "recomputed-keep-attention": Service(keys={"memory": {"checkpointing": "keep_attention"}}, effect="same"),
    "recomputed-selective": Service(keys={"memory": {"checkpointing": "selective"}}, effect="same"),
    "activations-offloaded": Service(
        keys={"memory": {"offload_activations": "async"}}, needs=RECOMPUTED, effect="same"
    ),
    "state-offloaded": Service(keys={"optimizer": {"offload": True}}, effect="same"),
    # few bits
    "int8": Service(keys=INT8),
    "int8-arithmetic": Service(
        keys={"quantize": {"activations": "int8", "parity": {"loss": 0.5, "gradient": 2.0}}}, needs=INT8, rough=True
    ),
    # arithmetic
    "compiled": Service(keys={"compile": {"enabled": True, "backend": "aot_eager"}}, effect="near"),
    "unfused-qkv": Service(keys={"attention": {"fuse_qkv": False}}, effect="near"),
    "attention-split": Service(keys={"attention": {"split": True}}, effect="near"),
    "attention-math": Service(keys={"attention": {"backend": "math"}}, effect="near"),
    "bf16": Service(keys={"precision": {"compute": "bf16"}}, rough=True),
    "no-tf32": Service(keys={"precision": {"tf32": False}}, effect="same"),
    # adapters
    "dora": _network(type="dora"),
    "loha": _network(type="loha"),
    "lokr": _network(type="lokr"),
    "oft": _network(type="oft"),
    "boft": _network(type="boft"),
    "ia3": _network(type="ia3"),
    "whole-change": _network(type="full"),
    "norms": _network(train_norms=True),
    "pissa": Service(keys={"network": {"init": "pissa"}}, needs={"network": {"rank": 4}}),
    "loftq": Service(keys={"network": {"init": "loftq"}}, needs=INT8),
    "max-norm": _network(max_norm=1e-3),
    "dropout": _network(dropout=0.5),
    "module-dropout": _network(module_dropout=0.5),
    "merged": Service(keys={"model": {"merge": [{"path": "MERGED", "strength": 0.7}]}}),
    "preserved": Service(role="preserve"),
    # what trains, and how it moves
    "whole-model": Service(keys={"train": {"mode": "full"}}),
    "text-encoder": Service(keys={"train": {"components": ["denoiser", "qwen3"]}}),
    "accumulated": Service(keys={"train": {"accumulate": 2}}),
    "float32-gradients": Service(
        keys={"precision": {"gradients": "fp32"}}, needs={**BF16, "train": {"accumulate": 2}}, rough=True
    ),
    "stochastic": Service(keys={"optimizer": {"rounding": "stochastic"}}, needs=BF16, rough=True),
    "kahan": Service(keys={"optimizer": {"rounding": "kahan"}}, needs=BF16, rough=True),
    "fused-update": Service(keys={"optimizer": {"fuse": "block"}}, needs=NO_NORM, effect="near"),
    "schedule-free": Service(keys={"optimizer": {"name": "adamw_schedulefree"}}),
    "adafactor": Service(keys={"optimizer": {"name": "adafactor"}}),
    # target
    "guided": Service(keys={"guidance": {"distill": {"scale": 3.0}}}),
    "cfg-zero": Service(
        keys={"guidance": {"distill": {"zero_star": True, "batched": True}}},
        needs={"guidance": {"distill": {"scale": 3.0}}},
    ),
    "differential": Service(keys={"guidance": {"differential": 2.0}}),
    # what is kept and looked at
    "average": Service(keys={"ema": {"enabled": True, "decay": 0.95}}, effect="same", leaves=("ema_run.safetensors",)),
    "average-feedback": Service(
        keys={"ema": {"feedback": True}}, needs={"ema": {"enabled": True, "decay": 0.95}},
        leaves=("ema_run.safetensors",),
    ),
    "validated": Service(role="validation", effect="same", leaves=("validation",)),
    "previews": Service(
        keys={"attention": {"sample_backend": "sdpa_flash"}}, needs=PROMPT, effect="same", leaves=("samples/**/*.png",)
    ),
    "live-text": Service(keys={"cache": {"text": "off"}}, effect="near"),
}  # fmt: skip


def pairs() -> Iterator[tuple[str, str]]:
    """Every two services that do not give one key two values."""
    for first, second in combinations(SERVICES, 2):
        if not _contradict(SERVICES[first].keys, SERVICES[second].keys):
            yield first, second


def _contradict(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    mine, theirs = (
        {path: value for path, value in walk(keys) if not isinstance(value, Mapping)} for keys in (one, other)
    )
    return any(path in theirs and theirs[path] != value for path, value in mine.items())


def document(base: Mapping[str, Any], on: tuple[str, ...], also_needed: tuple[str, ...] = ()) -> dict[str, Any]:
    """``base`` with the services ``on``, and with what those of ``also_needed`` need and nothing of what they do."""
    needs: dict[str, Any] = {}
    for name in (*on, *also_needed):
        needs = merged(needs, SERVICES[name].needs)
    keys: dict[str, Any] = {}
    for name in on:
        keys = merged(keys, SERVICES[name].keys)
    if keys.get("train", {}).get("mode") == "full":
        # Whole models have no adapter whose dtype could be chosen: they train in that of the arithmetic.
        needs["precision"] = {key: value for key, value in needs.get("precision", {}).items() if key != "adapter"}
        base = {key: value for key, value in base.items() if key != "network"}
    return merged(merged(base, needs), keys)
