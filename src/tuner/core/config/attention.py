"""``attention``: which kernel computes softmax attention, and what each kernel can do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator

from tuner.core.config.base import Section
from tuner.core.config.data_checks import Problem, Unused

if TYPE_CHECKING:
    from tuner.core.config.run import RunConfig
    from tuner.core.types import ModelFacts

_ELSEWHERE = {
    "torch": "use 'sdpa'",
    "diffusers": "use 'sdpa'",
    "flash-attn": "use 'flash'",
    "flash-attn-2": "use 'flash'",
    "flash-attn-3": "use 'flash3'",
    "sageattn": "use 'sage'",
    "sageattention": "use 'sage'",
    "native-flash": "use 'sdpa_flash'",
    "native-efficient": "use 'efficient'",
    "native-math": "use 'math'",
    "mem_eff": "use 'efficient'",
    "flex": "it is fast only when compiled by itself, which compiled blocks cannot hold; use 'sdpa'",
    "sla": "sparse attention is another model: it would need training of its own",
}
"""What other trainers call their kernels."""


def _known_elsewhere(value: Any) -> Any:
    if isinstance(value, str) and value in _ELSEWHERE:
        raise ValueError(f"not offered under this name: {_ELSEWHERE[value]}")
    return value


def _trains(value: Any) -> Any:
    if value == "sage":
        raise ValueError("'sage' has no gradient, so nothing would be learned: use it as attention.sample_backend")
    return _known_elsewhere(value)


TrainingKernel = Annotated[
    Literal["sdpa", "sdpa_flash", "efficient", "cudnn", "math", "flash", "flash3", "xformers"], BeforeValidator(_trains)
]
SamplingKernel = Annotated[
    Literal["sdpa", "sdpa_flash", "efficient", "cudnn", "math", "flash", "flash3", "xformers", "sage"],
    BeforeValidator(_known_elsewhere),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """What a kernel can do. module: the package that has it, None for torch; install: how to get that.

    cuda: runs on NVIDIA GPUs only. fp32: computes in float32 on a GPU. masks: can hide keys on a GPU. capabilities:
    major compute capabilities that it is built for; empty: any.
    """

    module: str | None = None
    install: str = ""
    cuda: bool = True
    fp32: bool = False
    masks: bool = False
    capabilities: tuple[int, ...] = ()


KERNELS: Mapping[str, Kernel] = {
    "sdpa": Kernel(cuda=False, fp32=True, masks=True),
    "sdpa_flash": Kernel(cuda=False),
    "efficient": Kernel(fp32=True, masks=True),
    "cudnn": Kernel(masks=True),
    "math": Kernel(cuda=False, fp32=True, masks=True),
    "flash": Kernel(module="flash_attn", install="pip install flash-attn --no-build-isolation"),
    "flash3": Kernel(
        module="flash_attn_interface",
        install="build the folder hopper of github.com/Dao-AILab/flash-attention",
        capabilities=(9,),
    ),
    "xformers": Kernel(module="xformers", install="pip install xformers", fp32=True),
    "sage": Kernel(module="sageattention", install="pip install sageattention"),
}


class AttentionConfig(Section):
    """The attention kernel. Kernels other than torch's own choice have not been run on a GPU by this project yet."""

    backend: TrainingKernel = "sdpa"
    """``sdpa``: torch chooses among its kernels, which is right nearly always. ``sdpa_flash``, ``efficient``, ``cudnn``
    and ``math`` name one of them. ``flash`` (flash-attn 2), ``flash3`` and ``xformers`` are packages of their own."""
    sample_backend: SamplingKernel | None = None
    """Another kernel for samples; here ``sage`` is possible too. Left out: the one that trains."""
    split: bool = False
    """One sample at a time: less memory."""
    fuse_qkv: bool = True
    """Queries, keys and values as one matrix product, where a model makes them from one input. Off: one product each.
    Files are the same either way."""


def attention_problems(config: RunConfig) -> Iterator[Problem]:
    """Combinations that cannot work, and keys without effect."""
    attention = config.attention
    chosen = attention.backend
    if attention.sample_backend is not None:
        if not config.sample.prompts:
            yield ("attention", "sample_backend"), "has no effect without sample.prompts", "add prompts"
        elif attention.sample_backend == chosen:
            why = "has no effect: it is attention.backend as well"
            yield Unused(("attention", "sample_backend"), why, "take it out")
    if not attention.fuse_qkv and config.quantize.denoiser is not None:
        why = "has no effect with quantize.denoiser: quantized weights are multiplied one by one"
        yield Unused(("attention", "fuse_qkv"), why, "take it out")
    if config.memory.checkpointing == "keep_attention" and (KERNELS[chosen].module or chosen == "math"):
        why = f"'keep_attention' keeps what torch's fused kernels give, and {chosen!r} is none of them"
        yield ("memory", "checkpointing"), why, "use 'block', or attention.backend 'sdpa'"
    for key, name in _kernels(config):
        kernel = KERNELS[name]
        if kernel.module and config.compile.enabled:
            why = f"{name!r} does not work with compile: its calls would break the graph"
            yield ("attention", key), why, "use 'sdpa', or set compile.enabled to false"
        if kernel.cuda and not kernel.fp32 and config.precision.compute == "fp32":
            yield ("attention", key), f"{name!r} cannot compute in float32", "set precision.compute to 'bf16'"


def unsupported_masks(config: RunConfig, facts: ModelFacts) -> Iterator[Problem]:
    """Kernels that cannot hide keys, for a model that does."""
    if not facts.hides_keys:
        return
    for key, name in _kernels(config):
        if KERNELS[name].cuda and not KERNELS[name].masks:
            able = ", ".join(each for each, kernel in KERNELS.items() if kernel.masks)
            why = f"{name!r} cannot hide tokens, which this model does with padding"
            yield ("attention", key), why, f"one of: {able}"


def _kernels(config: RunConfig) -> Iterator[tuple[str, str]]:
    yield "backend", config.attention.backend
    if config.attention.sample_backend is not None:
        yield "sample_backend", config.attention.sample_backend
