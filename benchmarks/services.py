"""What each service of a training step costs, against a named baseline in the same process.

    python -m benchmarks.services [SUITE ...] [--json] [--rounds 5] [--threads 1] [--pixels 256]

- ``streaming``: half of the blocks and all but two in host memory; the baseline keeps them on the device.
- ``recompute``: every level of ``memory.checkpointing``; the baseline keeps everything.
- ``quantized``: weights of the base in few bits, read back or multiplied as they are; the baseline is not quantized.
- ``optimizers``: one update by every optimizer that needs no further package; the baseline is AdamW.
- ``full``: forward, backward and update of all weights in bf16; the baseline rounds to nearest after the backward pass.

The first three run a training step of the denoiser with rank-16 adapters, as `benchmarks.step`: the reduced model on a
CPU, the full-size one in bf16 where CUDA is found. All arms of a suite take turns in every round, after one round that
does not count; the ratio is the median of the ratios of single rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from benchmarks.models import FULL, REDUCED, Inputs, add_adapters, build_frozen, forward_loss, make_inputs
from benchmarks.step import Clock
from tuner.core.compute.low_bits import FORMATS
from tuner.core.compute.quantized import Arithmetic, set_arithmetic
from tuner.core.config.optimizer import OptimizerConfig
from tuner.core.memory.checkpointing import LEVELS, apply_checkpointing
from tuner.core.memory.quantize import quantize_component
from tuner.core.memory.streaming import stream_blocks, stream_limit
from tuner.core.optim import build_optimizer
from tuner.core.optim.names import BUILTIN
from tuner.core.optim.update import FusedUpdate, Update
from tuner.core.types import Blocks, ParamGroup
from tuner.plugins.anima.denoiser import Denoiser

Work = Callable[[], object]
Suite = Mapping[str, Callable[[], Work]]
"""Name of an arm to what builds it; the first is the baseline."""
VALUES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Trained values of the optimizer suite."""
OUTSIDE_BLOCKS = (r"(?!blocks\.).*", r".*adaln_modulation.*")
"""What quantization leaves alone, as it does in a training."""
STREAMED = Blocks(path="blocks", count=0, outside=(r"adaln_modulation_.*",))


@dataclass(frozen=True)
class Result:
    """seconds: median. ratio: to the baseline of the suite. peak: bytes on the device above what was there before."""

    suite: str
    arm: str
    seconds: float
    ratio: float
    spread: float
    peak: int | None


@dataclass(frozen=True)
class Setting:
    """Model, shape and device of a suite. size: side of the latents."""

    device: str
    dtype: torch.dtype
    size: int

    def build(self) -> tuple[Denoiser, Inputs]:
        sizes = FULL if self.device == "cuda" else REDUCED
        denoiser = build_frozen(sizes, self.dtype, self.device)
        return denoiser, make_inputs(sizes, 1, self.size, self.size, self.dtype, self.device)


def adapter_step(setting: Setting, change: Callable[[Denoiser], object]) -> Work:
    """Forward and backward with adapters, after ``change`` of the model."""
    denoiser, inputs = setting.build()
    change(denoiser)
    trained = add_adapters(denoiser)

    def step() -> None:
        for parameter in trained:
            parameter.grad = None
        forward_loss(denoiser, inputs).backward()

    return step


def recompute(setting: Setting) -> Suite:
    def arm(level: str) -> Callable[[], Work]:
        return lambda: adapter_step(setting, lambda model: apply_checkpointing(model.blocks, level))

    return {level: arm(level) for level in sorted(LEVELS, key=lambda level: level != "off")}


def streaming(setting: Setting) -> Suite:
    def arm(count: Callable[[int], int], level: str) -> Callable[[], Work]:
        def change(model: Denoiser) -> None:
            lists = [replace(STREAMED, count=len(model.blocks))]
            if count(stream_limit(lists)):
                stream_blocks(model, lists, count(stream_limit(lists)), torch.device(setting.device))
            apply_checkpointing(model.blocks, level)

        return lambda: adapter_step(setting, change)

    def none(limit: int) -> int:
        return 0

    def half(limit: int) -> int:
        return limit // 2 + 1

    def most(limit: int) -> int:
        return limit

    return {
        "recomputed": arm(none, "block"),
        "recomputed, half streamed": arm(half, "block"),
        "recomputed, all but two streamed": arm(most, "block"),
        "kept": arm(none, "off"),
        "kept, half streamed": arm(half, "off"),
    }


def quantized(setting: Setting) -> Suite:
    def arm(method: str, arithmetic: Arithmetic) -> Callable[[], Work]:
        def change(model: Denoiser) -> None:
            quantize_component(model, method, component="denoiser", no_quantize=OUTSIDE_BLOCKS)
            set_arithmetic(model, arithmetic)

        return lambda: adapter_step(setting, change)

    arms: dict[str, Callable[[], Work]] = {"bf16": lambda: adapter_step(setting, lambda model: None)}
    arms |= {f"{method} weights": arm(method, "weights") for method in FORMATS}
    arms["int8 products"] = arm("int8", "int8")
    if setting.device == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        arms["fp8 products"] = arm("fp8", "fp8")
    return arms


def optimizers(setting: Setting) -> Suite:
    def arm(name: str) -> Callable[[], Work]:
        def make() -> Work:
            side = 1024
            torch.manual_seed(0)
            count = VALUES[setting.device] // side**2
            params = {str(n): nn.Parameter(torch.randn(side, side, device=setting.device)) for n in range(count)}
            optimizer = _optimizer(OptimizerConfig(name=name, lr=1e-4), params, setting.device)
            for parameter in params.values():
                parameter.grad = torch.randn_like(parameter)
            return optimizer.step

        return make

    return {name: arm(name) for name in ("adamw", *BUILTIN) if BUILTIN[name].package is None}


def full(setting: Setting) -> Suite:
    def arm(level: str = "block", **options: str) -> Callable[[], Work]:
        def make() -> Work:
            denoiser, inputs = setting.build()
            denoiser.requires_grad_(True)
            apply_checkpointing(denoiser.blocks, level)
            names = dict(denoiser.named_parameters())
            config = OptimizerConfig.model_validate({"name": "adamw", "lr": 1e-5, **options})
            optimizer = _optimizer(config, names, setting.device)
            update = Update(config, optimizer, names, seed=0)
            fused = None
            if config.fuse != "off":
                units = [list(block.parameters()) for block in denoiser.blocks] if config.fuse == "block" else []
                fused = FusedUpdate(update, units)

            def step() -> None:
                with fused.during(1) if fused is not None else nullcontext():
                    forward_loss(denoiser, inputs).backward()
                if fused is None:
                    update(1)
                optimizer.zero_grad(set_to_none=True)

            return step

        return make

    return {
        "nearest": arm(),
        "stochastic": arm(rounding="stochastic"),
        "kahan": arm(rounding="kahan"),
        "adamw_bf16": arm(name="adamw_bf16"),
        "adafactor": arm(name="adafactor"),
        "stochastic, fused by parameter": arm(rounding="stochastic", fuse="parameter"),
        "stochastic, fused by block": arm(rounding="stochastic", fuse="block"),
        "adafactor, fused by block": arm(name="adafactor", fuse="block"),
    }


def _optimizer(config: OptimizerConfig, params: dict[str, nn.Parameter], device: str) -> torch.optim.Optimizer:
    return build_optimizer(config, [ParamGroup(name="all", component="denoiser", params=params)], device)


SUITES: Mapping[str, Callable[[Setting], Suite]] = {
    "streaming": streaming, "recompute": recompute, "quantized": quantized, "optimizers": optimizers, "full": full,
}  # fmt: skip


def measure(name: str, setting: Setting, rounds: int) -> list[Result]:
    """Results of a suite's arms, the baseline first. On a GPU every arm's model stays in memory until the end."""
    clock = Clock(setting.device)
    arms = {arm: make() for arm, make in SUITES[name](setting).items()}
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    peaks: dict[str, int | None] = dict.fromkeys(arms)
    for number in range(rounds + 1):
        for arm, work in arms.items():
            before = 0
            if setting.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            seconds = clock(work)
            if number:
                times[arm].append(seconds)
            if setting.device == "cuda":
                peaks[arm] = torch.cuda.max_memory_allocated() - before
    baseline = times[next(iter(arms))]
    results = []
    for arm, found in times.items():
        ratios = [one / other for one, other in zip(found, baseline, strict=True)]
        spread = (max(found) - min(found)) / statistics.median(found)
        results.append(
            Result(name, arm, statistics.median(found), statistics.median(ratios), spread, peaks[arm])
        )  # fmt: skip
    return results


def show(results: Sequence[Result]) -> None:
    print(f"\n{results[0].suite:<34}{'s':>10}{'ratio':>8}{'spread':>8}{'peak GiB':>10}")
    for one in results:
        peak = f"{one.peak / 2**30:.2f}" if one.peak is not None else "-"
        print(f"{one.arm:<34}{one.seconds:>10.4f}{one.ratio:>8.2f}{one.spread:>8.0%}{peak:>10}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", default=list(SUITES), help=f"of: {', '.join(SUITES)} (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--pixels", type=int, help="side of the pictures (default: 1024 on CUDA, 256 on a CPU)")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.suites if name not in SUITES]
    if unknown:
        parser.error(f"unknown suites {', '.join(unknown)}; there are {', '.join(SUITES)}")
    torch.set_num_threads(arguments.threads)
    pixels = arguments.pixels or (1024 if arguments.device == "cuda" else 256)
    setting = Setting(arguments.device, torch.bfloat16, pixels // 8)
    results: list[Result] = []
    for name in arguments.suites:
        results += measure(name, setting, arguments.rounds)
        if not arguments.json:
            show([one for one in results if one.suite == name])
    if arguments.json:
        device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
        about = {"device": device, "torch": torch.__version__, "threads": arguments.threads, "pixels": pixels}
        print(json.dumps({**about, "results": [asdict(one) for one in results]}, indent=2))


if __name__ == "__main__":
    main()
