"""Predict memory, disk and time of the training that CONFIG describes, before anything is loaded or downloaded.

Neither the weights nor the pictures have to be here: set model.flavour to the published model that is meant.
--vram finds the fastest way to train in so much device memory, and names the keys to set."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from tuner.cli.console import heading, out, out_json, table, warn
from tuner.cli.settings import add_config_arguments, load

if TYPE_CHECKING:
    from tuner.core.plan.plan import Plan
    from tuner.core.plan.search import Choice


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="a device from the table, such as 4090 or h200, or cpu; default: this machine's",
    )
    parser.add_argument(
        "--vram", metavar="SIZE", help="find the fastest way to train in so much device memory, such as 12GB"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(command="plan")


def run(arguments: argparse.Namespace) -> int:
    from tuner.core.errors import UsageError
    from tuner.core.plan.devices import ANY_GPU, device_here, device_named, parse_size
    from tuner.core.plan.plan import predict
    from tuner.core.plan.prepare import prepare
    from tuner.core.plan.search import fit
    from tuner.core.registry import Catalog

    memory = None if arguments.vram is None else parse_size(arguments.vram, "--vram")
    device = device_named(arguments.device) if arguments.device else device_here() or ANY_GPU
    if memory is not None and device.kind == "cpu":
        raise UsageError("a CPU has no memory of its own", where="--vram", fix="name a GPU, or leave --vram out")
    catalog = Catalog()
    config, facts, work = prepare(load(arguments, catalog), catalog=catalog)
    if memory is not None:
        choice = fit(config, facts, work, device, memory)
        if arguments.json:
            out_json(_as_json(choice))
        else:
            _show(choice.best.plan)
            _tell(choice)
        return 0 if choice.fits else 1
    plan = predict(config, facts, work, device)
    fits = plan.memory is None or plan.needed() <= plan.memory
    if arguments.json:
        out_json({**plan.as_dict(), "fits": fits})
    else:
        _show(plan)
        if not fits and plan.memory is not None:
            out(f"does not fit: {_size(plan.needed())} of {_size(plan.memory)}; add --vram to find what does")
    return 0 if fits else 1


def _show(plan: Plan) -> None:
    from tuner.core.track.progress import duration

    heading(f"on {plan.device}: {plan.trained / 1e6:.1f} million values train")
    table(
        ("phase", "on the device", "needed there", "host memory"),
        [(each.name, _size(each.device), _size(plan.needed(each)), _size(each.host)) for each in plan.phases],
    )
    if plan.host_needed < plan.host:
        mapped = "counts pages of the open file, which give way when memory is short"
        out(f"host memory while loading {mapped}: {_size(plan.host_needed)} have to be there")
    step = plan.phase("step")
    if step.device:
        out("a step holds " + ", ".join(f"{name} {_size(size)}" for name, size in step.parts.items()))
    for name, size in plan.disk.items():
        out(f"disk: {name} {_size(size)}")
    if plan.seconds is None:
        out("time: not known for this device; name one with --device")
    else:
        whole = "" if plan.run_seconds is None else f", {plan.updates} steps in {duration(plan.run_seconds)}"
        out(f"time: {plan.seconds:.2f} s per step{whole} (estimated; the first steps of a run correct it)")
    for note in plan.notes:
        warn(note)


def _tell(choice: Choice) -> None:
    best = choice.best
    if not choice.fits:
        out(f"does not fit into {_size(choice.memory)}: the least that is needed is {_size(best.plan.needed())}")
    elif not best.changes:
        out(f"fits into {_size(choice.memory)} as it is: {_size(best.plan.needed())}")
    else:
        as_is = _size(choice.as_is.plan.needed())
        out(f"fits into {_size(choice.memory)} with {_size(best.plan.needed())}; as it is, it needs {as_is}")
    for key, value in best.changes:
        out(f"  --set {key}={_text(value)}")
    for line in choice.lines():
        out(f"  {line}")
    if choice.faster is not None:
        faster = choice.faster
        keys = " ".join(f"--set {key}={_text(value)}" for key, value in faster.changes)
        out(f"{1 - faster.seconds / best.seconds:.0%} faster, with slightly different results: {keys}")


def _as_json(choice: Choice) -> dict[str, Any]:
    faster = choice.faster
    return {
        "fits": choice.fits,
        "memory": choice.memory,
        "needed": choice.best.plan.needed(),
        "needed_unchanged": choice.as_is.plan.needed(),
        "set": dict(choice.best.changes),
        "why": choice.lines(),
        "faster": None if faster is None else {"set": dict(faster.changes), "seconds": faster.seconds},
        "plan": choice.best.plan.as_dict(),
    }


def _text(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _size(size: float) -> str:
    from tuner.core.track.progress import byte_size

    return byte_size(size) if size else "-"
