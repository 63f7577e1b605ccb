"""Put adapters into the weights of a model, or several adapters into one. The sources are not touched.

With --base the result is a checkpoint with the names, the layout and the number formats of the base; it is written
tensor by tensor. Without --base it is an adapter that does what all of them do together: exact, its rank the sum of
the ranks, or cut to --rank or --energy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.cli.console import out, out_json
from tuner.cli.files import (
    ADAPTER_DTYPES,
    ModelNames,
    add_model_argument,
    add_output_arguments,
    add_size_arguments,
    finite,
    model_names,
    network_metadata,
    new_file,
    number_or_none,
    shown_progress,
    sources_of,
    split_strength,
    writing,
)
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.adapters.merging import Addition


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapters", nargs="+", metavar="ADAPTER[:STRENGTH]", help="an adapter file, and how strongly it counts (1)"
    )
    parser.add_argument(
        "--base",
        nargs="+",
        action="extend",
        default=[],
        metavar="[COMPONENT=]FILE",
        help="weights: files of the denoiser and of encoders, or one folder in the diffusers layout",
    )
    parser.add_argument(
        "--strength",
        action="append",
        default=[],
        metavar="PATTERN=FACTOR",
        help="a factor for modules by path or component:path; the last match counts, 0 takes them out",
    )
    parser.add_argument("--concat", action="store_true", help="without --base: the exact sum, which is the default")
    add_size_arguments(parser)
    parser.add_argument("--format", metavar="NAME", help="without --base: the adapter format (that of the first file)")
    parser.add_argument(
        "--dtype", choices=ADAPTER_DTYPES, help="number format of the result (a checkpoint's own, fp32 for adapters)"
    )
    add_model_argument(parser)
    add_output_arguments(parser, "file")


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    given = [split_strength(text) for text in arguments.adapters]
    names = model_names(arguments.model, given[0][0])
    target = new_file(arguments.out, overwrite=arguments.overwrite, sources=[path for path, _ in given])
    from tuner.core.adapters.baking import with_strengths
    from tuner.core.adapters.merging import read_addition

    additions = [read_addition(path, strength, names.adapters, where="ADAPTER") for path, strength in given]
    chosen = with_strengths(additions, dict(_factor(text) for text in arguments.strength))
    chosen = [addition for addition in chosen if addition.strength]
    if not chosen:
        raise UsageError("nothing is left to merge", where="--strength", why="every module has the strength 0")
    record = ", ".join(f"{path.stem}:{strength:g}" for path, strength in given)
    if arguments.base:
        return _into_base(arguments, names, chosen, target, {"modelspec.merged_from": record})
    return _into_one(arguments, names, chosen, target, {"modelspec.merged_from": record})


def _check(arguments: argparse.Namespace) -> None:
    """Options that would have no effect are errors."""
    for option, given in (
        ("--concat", arguments.concat),
        ("--rank", arguments.rank is not None),
        ("--energy", arguments.energy is not None),
        ("--format", arguments.format is not None),
    ):
        if given and arguments.base:
            raise UsageError(f"{option} is for merging adapters with each other", fix=f"leave out --base or {option}")
    if arguments.concat and (arguments.rank is not None or arguments.energy is not None):
        raise UsageError("--concat keeps every rank", fix="leave out --concat, or --rank and --energy")


def _factor(text: str) -> tuple[str, float]:
    pattern, _, number = text.rpartition("=")
    factor = number_or_none(number) if pattern else None
    if factor is None:
        raise UsageError(f"cannot read the strength {text!r}", where="--strength", fix=r"write blocks\.[0-9]\..*=0.5")
    return pattern, finite(factor, text)


def _into_base(
    arguments: argparse.Namespace, names: ModelNames, chosen: list[Addition], target: Path, metadata: dict[str, str]
) -> int:
    from tuner.core.adapters.baking import bake
    from tuner.core.adapters.bases import open_files
    from tuner.core.adapters.checkpoints import file_beside
    from tuner.core.compute.dtypes import dtype_by_name

    files = open_files(names.require_weights(), arguments.base, "--base")
    sources = [*sources_of(files), *(addition.path for addition in chosen)]
    for file in files:
        new_file(str(file_beside(target, file)), overwrite=arguments.overwrite, sources=sources)
    dtype = None if arguments.dtype is None else dtype_by_name(arguments.dtype)
    with shown_progress("merging", "tensors") as progress, writing(target):
        written = bake(files, chosen, target, metadata, dtype, progress=progress)
    if arguments.json:
        out_json([{"path": str(each.path), "changed": each.changed, "tensors": each.tensors} for each in written])
    for each in written if not arguments.json else ():
        out(f"{each.path}: {each.changed} of {each.tensors} tensors changed")
    return 0


def _into_one(
    arguments: argparse.Namespace, names: ModelNames, chosen: list[Addition], target: Path, metadata: dict[str, str]
) -> int:
    from tuner.core.adapters.combining import Resized, kept_share, ranks_of, sum_resized, summed
    from tuner.core.adapters.files import read_adapter, save_adapter
    from tuner.core.adapters.formats import format_by_name
    from tuner.core.adapters.low_rank import Wanted
    from tuner.core.compute.dtypes import dtype_by_name

    wanted = None
    if arguments.rank is not None or arguments.energy is not None:
        wanted = Wanted(rank=arguments.rank, energy=arguments.energy)
    name = arguments.format or read_adapter(chosen[0].path, names.adapters).format
    fmt = format_by_name(names.adapters, name, where="--format")
    if wanted is None:
        found = Resized(tensors=summed(chosen), layers=[], others=[])
    else:
        found = sum_resized(chosen, fmt, wanted)
    tensors, layers = found.tensors, found.layers
    ranks = ranks_of(tensors, fmt)
    metadata = {**metadata, **network_metadata(ranks)}
    with writing(target):
        save_adapter(tensors, fmt, target, metadata, dtype_by_name(arguments.dtype or "fp32"))
    kept = kept_share(layers) if layers else 1.0
    told = {"path": str(target), "format": fmt.name, "modules": len(ranks), "max_rank": max(ranks), "kept": kept}
    if arguments.json:
        out_json({**told, "kept_as_they_are": found.others})
        return 0
    out(f"{target}: {len(ranks)} modules ({fmt.name}), rank up to {max(ranks)}, {kept:.2%} of the sum kept")
    if wanted is None and 0 in ranks:
        out(f"{ranks.count(0)} modules are whole matrices or norms; --rank and --energy make matrices small")
    if found.others:
        out(f"{len(found.others)} modules have no rank and stay as they are")
    return 0
