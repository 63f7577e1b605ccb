"""Times one training step of the denoiser: forward, mean squared error, backward; no optimizer.

Rank-16 adapters sit on the ten attention and MLP linears of each block. On a CPU the reduced model (6 blocks, 512
wide) runs with float32 and with bf16 weights; where CUDA is found, the full-size model in bf16. All arms of a case run
in turn in every round, after one round that does not count; the statistic is the median, on a CPU of process CPU time,
which other processes on the machine disturb less than wall time.

    python -m benchmarks.step [--json] [--rounds 5] [--threads 1] [--arms eager,compiled] [--cases "NAME;NAME"]

``MFU`` is the arithmetic of the model (recomputation is no credit) over time and over ``--peak``; without ``--peak``,
over the speed of a large matrix product in the same process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from benchmarks.models import FULL, RANK, REDUCED, TEXT_TOKENS, build, forward_loss, make_inputs, saved_bytes
from tuner.core.memory.checkpointing import apply_checkpointing
from tuner.core.memory.compiling import Band, CompileSettings, compile_blocks
from tuner.core.types import Blocks
from tuner.plugins.anima.denoiser import Denoiser
from tuner.plugins.anima.sizes import DenoiserSizes

ARMS = (
    "eager", "eager, recomputed", "compiled", "compiled, recomputed", "compiled, dynamic", "eager, forward only",
)  # fmt: skip
"""``compiled`` has a graph for the size that is timed, as a run with one picture size; ``dynamic`` one for a range of
sizes around it, which needs a process of its own: arms share what was compiled. The baseline of both is ``eager``."""
AXES = Blocks(
    path="blocks",
    count=0,
    axes={"x": (1, "image"), "rope": (1, "image"), "context": (1, "text"), "context_bias": (0, "text")},
)
PRODUCT = {"cpu": 1024, "cuda": 8192}
"""Side of the square matrices whose product measures the peak."""


@dataclass(frozen=True)
class Case:
    """One model, dtype and shape; height and width in latents (8 pixels)."""

    name: str
    sizes: DenoiserSizes
    dtype: torch.dtype
    batch: int
    height: int
    width: int


@dataclass(frozen=True)
class Result:
    """seconds: median of a step. saved, peak: bytes; None where the device cannot tell."""

    case: str
    arm: str
    seconds: float
    spread: float
    tflops: float
    mfu: float
    saved: int | None
    peak: int | None


def cases(device: str) -> list[Case]:
    if device == "cuda":
        return [
            Case(f"full bf16 {batch} x {pixels}", FULL, torch.bfloat16, batch, pixels // 8, pixels // 8)
            for batch, pixels in ((1, 512), (1, 1024), (4, 1024))
        ]
    shapes = ((1, 64, 64), (1, 32, 32), (2, 64, 64))
    low = ((1, 64, 64), (1, 32, 32), (2, 96, 64), (1, 16, 16))
    exact = [Case(f"fp32 {b}, {h}x{w}", REDUCED, torch.float32, b, h, w) for b, h, w in shapes]
    return exact + [Case(f"bf16 {b}, {h}x{w}", REDUCED, torch.bfloat16, b, h, w) for b, h, w in low]


def step_flops(case: Case, *, forward_only: bool) -> float:
    """Arithmetic of a step with frozen weights: backward has input gradients only, attention's is 2.5 forwards."""
    sizes, tokens = case.sizes, case.height * case.width // 4
    attention_weights = 4 * sizes.width**2 + 2 * sizes.width**2
    wide = attention_weights + 2 * sizes.width * sizes.mlp_width
    text = 2 * sizes.text_width * sizes.width
    products = 2 * tokens * wide + 2 * TEXT_TOKENS * text
    attention = 4 * tokens * (tokens + TEXT_TOKENS) * sizes.width
    adapter_sides = 16 * sizes.width + 2 * (sizes.width + sizes.mlp_width) - 4 * sizes.width
    adapters = 2 * tokens * RANK * adapter_sides
    factors = (1.0, 1.0, 1.0) if forward_only else (2.0, 3.5, 3.0)
    block = sum(cost * factor for cost, factor in zip((products, attention, adapters), factors, strict=True))
    return case.batch * sizes.blocks * block


class Clock:
    """Seconds of a call: process CPU time on a CPU, CUDA events on a GPU."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, work: Callable[[], object]) -> float:
        if self.device == "cpu":
            start = time.process_time()
            work()
            return time.process_time() - start
        start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start_event.record()
        work()
        end_event.record()
        torch.cuda.synchronize()
        return start_event.elapsed_time(end_event) / 1000


def measured_peak(device: str, dtype: torch.dtype, clock: Clock) -> float:
    """FLOP/s of a large square matrix product, median of 10."""
    side = PRODUCT[device]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = [clock(lambda: left @ right) for _ in range(12)]
    return 2 * side**3 / statistics.median(times[2:])


class Runner:
    """One model and its arms; ``run(arm)`` does one step the arm's way."""

    def __init__(self, case: Case, device: str, arms: Sequence[str]) -> None:
        self.case = case
        self.denoiser, self.trained = build(case.sizes, case.dtype, device)
        self.inputs = make_inputs(case.sizes, case.batch, case.height, case.width, case.dtype, device)
        tokens = case.height * case.width // 4
        self.settings = {
            arm: CompileSettings(band=Band(tokens // 2, 2 * tokens) if arm.endswith("dynamic") else None)
            for arm in arms
            if arm.startswith("compiled")
        }

    def prepare(self, arm: str) -> Denoiser:
        apply_checkpointing(self.denoiser.blocks, "off")
        for block in self.denoiser.blocks:
            block.__dict__.pop("forward", None)
        if arm.startswith("compiled"):
            compile_blocks(self.denoiser, [AXES], self.settings[arm])
        apply_checkpointing(self.denoiser.blocks, "block" if arm.endswith("recomputed") else "off")
        for parameter in self.trained:
            parameter.grad = None
        return self.denoiser

    def run(self, arm: str) -> None:
        if arm.endswith("forward only"):
            with torch.no_grad():
                forward_loss(self.denoiser, self.inputs)
        else:
            forward_loss(self.denoiser, self.inputs).backward()


def measure(case: Case, device: str, arms: Sequence[str], rounds: int, peak: float | None) -> list[Result]:
    """Results of all arms of a case, in the order given."""
    clock = Clock(device)
    peak = peak or measured_peak(device, case.dtype, clock)
    runner = Runner(case, device, arms)
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    memory: dict[str, int | None] = dict.fromkeys(arms)
    for number in range(rounds + 1):
        for arm in arms:
            runner.prepare(arm)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = clock(lambda arm=arm: runner.run(arm))
            if number:
                times[arm].append(seconds)
            if device == "cuda":
                memory[arm] = torch.cuda.max_memory_allocated()
    results = []
    for arm in arms:
        seconds = statistics.median(times[arm])
        flops = step_flops(case, forward_only=arm.endswith("forward only"))
        spread = (max(times[arm]) - min(times[arm])) / seconds
        results.append(
            Result(case.name, arm, seconds, spread, flops / seconds / 1e12, flops / seconds / peak,
                   saved(runner, arm), memory[arm])
        )  # fmt: skip
    return results


def saved(runner: Runner, arm: str) -> int | None:
    """Bytes that autograd keeps after the forward; None when nothing is recorded."""
    if arm.endswith("forward only"):
        return None
    denoiser = runner.prepare(arm)
    with saved_bytes(denoiser) as kept:
        output = denoiser(runner.inputs.latents, runner.inputs.sigmas, runner.inputs.context)
    del output
    return kept["bytes"]


def show(results: Sequence[Result]) -> None:
    print(f"{'case':<22}{'arm':<24}{'s/step':>9}{'spread':>8}{'TF/s':>8}{'MFU':>7}{'saved MiB':>11}{'peak GiB':>10}")
    for one in results:
        kept = f"{one.saved / 2**20:.0f}" if one.saved is not None else "-"
        peak = f"{one.peak / 2**30:.1f}" if one.peak is not None else "-"
        print(f"{one.case:<22}{one.arm:<24}{one.seconds:>9.4f}{one.spread:>8.0%}{one.tflops:>8.2f}{one.mfu:>7.0%}"
              f"{kept:>11}{peak:>10}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    named = {arm.replace(", ", "+"): arm for arm in ARMS}
    parser.add_argument("--arms", default="eager,eager+recomputed,eager+forward only", help=f"of: {', '.join(named)}")
    parser.add_argument("--cases", default="", help="names separated by semicolons (default: all of the device)")
    parser.add_argument("--peak", type=float, help="peak of the device in TFLOP/s (default: measured)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arms = [named.get(arm, arm) for arm in arguments.arms.split(",")]
    unknown = [arm for arm in arms if arm not in ARMS]
    chosen = [
        case for case in cases(arguments.device) if not arguments.cases or case.name in arguments.cases.split(";")
    ]
    if unknown or not chosen:
        parser.error(f"unknown arms {unknown}" if unknown else f"no such case; there are {cases(arguments.device)}")
    dynamic = [arm.endswith("dynamic") for arm in arms if arm.startswith("compiled")]
    if any(dynamic) and not all(dynamic):
        parser.error("compiled+dynamic cannot run with other compiled arms: each would use the graphs of the first")
    peak = arguments.peak * 1e12 if arguments.peak else None
    results: list[Result] = []
    for case in chosen:
        found = measure(case, arguments.device, arms, arguments.rounds, peak)
        results += found
        if not arguments.json:
            show(found)
    if arguments.json:
        device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
        about = {"device": device, "torch": torch.__version__, "threads": arguments.threads, "rounds": arguments.rounds}
        print(json.dumps({**about, "results": [asdict(one) for one in results]}, indent=2))


if __name__ == "__main__":
    main()
