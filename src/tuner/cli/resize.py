"""Give an adapter other ranks: smaller files that do nearly the same. Works on the factors, never on whole weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from tuner.cli.console import out, out_json
from tuner.cli.extract import layers_as_json, show_layers
from tuner.cli.files import (
    ADAPTER_DTYPES,
    add_model_argument,
    add_output_arguments,
    add_size_arguments,
    model_names,
    new_file,
    writing,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="the adapter file")
    add_size_arguments(parser)
    parser.add_argument("--layers", action="store_true", help="list every module, not only those that lost most")
    parser.add_argument("--dtype", choices=ADAPTER_DTYPES, help="number format of the adapter (that of the file)")
    add_model_argument(parser)
    add_output_arguments(parser, "adapter")


def run(arguments: argparse.Namespace) -> int:
    names = model_names(arguments.model, arguments.adapter)
    from tuner.core.adapters.combining import kept_share, resized
    from tuner.core.adapters.files import read_adapter, save_adapter
    from tuner.core.adapters.formats import format_by_name
    from tuner.core.adapters.low_rank import Wanted
    from tuner.core.adapters.spelling import PEFT_METADATA
    from tuner.core.compute.dtypes import dtype_by_name

    source = Path(arguments.adapter)
    wanted = Wanted(rank=arguments.rank, energy=arguments.energy)
    target = new_file(arguments.out, overwrite=arguments.overwrite, sources=[source])
    read = read_adapter(source, names.adapters)
    fmt = format_by_name(names.adapters, read.format)
    found = resized(read.tensors, fmt, wanted)
    layers, others = found.layers, found.others
    # Rank and alpha are in the tensors now; a reader that took the old ones would scale wrongly.
    metadata = {key: value for key, value in read.metadata.items() if key != PEFT_METADATA}
    ranks = {layer.rank for layer in layers}
    for key in ("ss_network_dim", "ss_network_alpha"):
        if key in metadata:
            metadata[key] = str(ranks.copy().pop()) if len(ranks) == 1 else "Dynamic"
    own = {value.dtype for name, value in read.tensors.items() if name.endswith((".down", ".up"))}
    dtype = own.pop() if len(own) == 1 and arguments.dtype is None else dtype_by_name(arguments.dtype or "fp32")
    with writing(target):
        save_adapter(found.tensors, fmt, target, metadata, dtype)
    kept = kept_share(layers)
    before, after = source.stat().st_size, target.stat().st_size
    if arguments.json:
        told = {"path": str(target), "format": fmt.name, "kept": kept, "bytes": after, "bytes_before": before}
        out_json({**told, "kept_as_they_are": others, "modules": layers_as_json(layers)})
        return 0
    from tuner.core.track.progress import byte_size

    out(f"{target}: {len(layers)} modules, rank {min(ranks)} to {max(ranks)}, {kept:.2%} of the update kept")
    out(f"{byte_size(before)} before, {byte_size(after)} now")
    if others:
        out(f"{len(others)} modules have no rank and stay as they are")
    show_layers(layers, everything=arguments.layers)
    return 0
