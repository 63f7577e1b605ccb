"""Make a LoRA of the difference between two checkpoints: what a tuned model has learned, as an adapter.

The two may differ in layout and number format. Changed biases and norms, which a LoRA cannot hold, are counted."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tuner.cli.console import out, out_json, table
from tuner.cli.files import (
    ADAPTER_DTYPES,
    add_model_argument,
    add_output_arguments,
    add_size_arguments,
    model_names,
    network_metadata,
    new_file,
    shown_progress,
    sources_of,
    writing,
)
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.adapters.combining import Layer

LISTED = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "base", metavar="BASE", help="the checkpoint before, a file or a folder in the diffusers layout"
    )
    parser.add_argument("tuned", metavar="TUNED", help="the checkpoint after")
    add_size_arguments(parser)
    parser.add_argument(
        "--only", action="append", default=[], metavar="PATTERN", help="modules by path or component:path (all)"
    )
    parser.add_argument("--format", metavar="NAME", help="the adapter format (the model's default)")
    parser.add_argument("--dtype", choices=ADAPTER_DTYPES, default="fp32", help="number format of the adapter (fp32)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (cpu)")
    add_model_argument(parser)
    add_output_arguments(parser, "adapter")


def run(arguments: argparse.Namespace) -> int:
    names = model_names(arguments.model, arguments.base)
    import torch

    from tuner.core.adapters.bases import Parameters, open_files
    from tuner.core.adapters.extracting import extract
    from tuner.core.adapters.files import save_adapter
    from tuner.core.adapters.formats import format_by_name
    from tuner.core.adapters.low_rank import Wanted
    from tuner.core.compute.dtypes import dtype_by_name

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("there is no CUDA device here", where="--device", fix="leave it out to compute on the CPU")
    wanted = Wanted(rank=arguments.rank, energy=arguments.energy)
    fmt = format_by_name(names.adapters, arguments.format, where="--format")
    maps = names.require_weights()
    files = [open_files(maps, [text], where) for text, where in ((arguments.base, "BASE"), (arguments.tuned, "TUNED"))]
    sources = [path for some in files for path in sources_of(some)]
    target = new_file(arguments.out, overwrite=arguments.overwrite, sources=sources)
    base, tuned = (Parameters(some) for some in files)
    with shown_progress("extracting", "matrix") as progress:
        found = extract(
            base,
            tuned,
            names.adapters,
            fmt,
            wanted,
            only=arguments.only,
            device=arguments.device,
            progress=progress,
        )
    ranks = [layer.rank for layer in found.layers]
    metadata = {
        **network_metadata(ranks),
        "ss_training_comment": f"extracted from two checkpoints, {found.kept:.4f} of the squared norm kept",
    }
    with writing(target):
        save_adapter(found.tensors, fmt, target, metadata, dtype_by_name(arguments.dtype))
    if arguments.json:
        out_json(
            {
                "path": str(target),
                "format": fmt.name,
                "kept": found.kept,
                "unchanged": found.unchanged,
                "left_out": list(found.rest),
                "modules": layers_as_json(found.layers),
            }
        )
        return 0
    out(f"{target}: {len(ranks)} modules ({fmt.name}), rank {min(ranks)} to {max(ranks)}, {found.kept:.2%} kept")
    if found.unchanged:
        out(f"{found.unchanged} modules are equal in both checkpoints")
    if found.rest:
        more = f" and {len(found.rest) - 3} more" if len(found.rest) > 3 else ""
        why = "--only leaves out, or a LoRA cannot hold" if arguments.only else "a LoRA cannot hold"
        out(f"changed, but {why}: {', '.join(found.rest[:3])}{more}")
    show_layers(found.layers)
    return 0


def layers_as_json(layers: list[Layer]) -> list[dict[str, object]]:
    """What ``--json`` prints of each module: ranks, the share of its squared norm that was kept, the norm."""
    return [
        {"name": layer.name, "rank": layer.rank, "old_rank": layer.old_rank, "kept": layer.kept, "norm": layer.norm}
        for layer in layers
    ]


def show_layers(layers: list[Layer], *, everything: bool = False) -> None:
    """The modules that lost most, in a table; or all of them, these first."""
    worst = sorted(layers, key=lambda layer: layer.kept)
    if not everything:
        worst = [layer for layer in worst[:LISTED] if layer.kept <= 1 - 1e-6]
    if not worst:
        return
    out("\nall modules:" if everything else "\nmodules that lost most:")
    table(
        ("module", "rank", "of", "kept"),
        [(layer.name, layer.rank, layer.old_rank, f"{layer.kept:.2%}") for layer in worst],
    )
