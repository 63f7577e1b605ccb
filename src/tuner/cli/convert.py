"""Rewrite an adapter in another format, or a model in another layout. Values are kept; the source is not touched.

For an adapter FORMAT is one of the model's adapter formats, as `tuner plugins show NAME` lists them. For a model it is
single (one file, the denoiser under its original names), all-in-one (one file with text encoders and autoencoder too)
or diffusers (a folder with the denoiser under diffusers' names, and the text encoders of SOURCE)."""

from __future__ import annotations

import argparse
from pathlib import Path

from tuner.cli.console import out, out_json, warn
from tuner.cli.files import (
    ModelNames,
    add_model_argument,
    model_names,
    new_file,
    new_folder,
    shown_progress,
    sources_of,
    writing,
)
from tuner.core.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="an adapter file, a model file, or a folder of diffusers")
    parser.add_argument("target", metavar="TARGET", help="the file to write, or the folder")
    parser.add_argument("--to", required=True, metavar="FORMAT", help="the format to write")
    parser.add_argument(
        "--with",
        nargs="+",
        action="extend",
        default=[],
        dest="parts",
        metavar="[COMPONENT=]FILE",
        help="files of further components that go into an all-in-one file",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16", "fp8", "fp8-scaled"),
        help="number format of a model's tensors (unchanged)",
    )
    add_model_argument(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET when it exists")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    names = model_names(arguments.model, arguments.source)
    from tuner.core.adapters.inspecting import is_adapter
    from tuner.core.files import safetensors_header

    source = Path(arguments.source)
    if not source.is_file() or source.suffix == ".json" or not is_adapter(safetensors_header(source)):
        return _convert_base(arguments, names)
    for option, given in (("--with", arguments.parts), ("--dtype", arguments.dtype)):
        if given:
            raise UsageError(f"{option} is for whole models", why=f"{source} is an adapter", fix=f"leave out {option}")
    return _convert_adapter(arguments, names)


def _convert_adapter(arguments: argparse.Namespace, names: ModelNames) -> int:
    from tuner.core.adapters.convert import convert_adapter

    source = Path(arguments.source)
    target = new_file(arguments.target, overwrite=arguments.overwrite, sources=[source])
    with writing(target):
        done = convert_adapter(source, target, arguments.to, names.adapters, overwrite=arguments.overwrite)
    if arguments.json:
        out_json({"from": done.source_format, "to": done.format, "modules": done.modules, "path": str(done.path)})
    else:
        out(f"{done.source_format} -> {done.format}: {done.modules} modules, {done.path}")
    return 0


def _convert_base(arguments: argparse.Namespace, names: ModelNames) -> int:
    from tuner.core.adapters.bases import open_files
    from tuner.core.adapters.layouts import LAYOUTS, convert_base

    maps = names.require_weights()
    layout = next((each for each in LAYOUTS if each == arguments.to), None)
    if layout is None:
        raise UsageError(
            f"a model has no format {arguments.to!r}",
            where="--to",
            why="adapter formats are for adapters",
            fix=f"use one of: {', '.join(LAYOUTS)}",
        )
    if arguments.parts and layout != "all-in-one":
        raise UsageError(
            "--with is for --to all-in-one", why=f"{layout} takes what SOURCE holds", fix="leave out --with"
        )
    files = open_files(maps, [arguments.source, *arguments.parts], "SOURCE")
    new = new_folder if layout == "diffusers" else new_file
    target = new(arguments.target, overwrite=arguments.overwrite, sources=sources_of(files))
    with shown_progress("converting", "tensors") as progress, writing(target):
        done = convert_base(files, maps, layout, target, arguments.dtype, progress=progress)
    if arguments.json:
        written = [{"path": str(path), "tensors": count} for path, count in done.files.items()]
        out_json({"to": layout, "files": written, "left_out": list(done.left_out), "dropped": list(done.dropped)})
        return 0
    for path, count in done.files.items():
        out(f"{path}: {count} tensors ({layout})")
    if done.left_out:
        out(f"components that this layout does not hold: {', '.join(done.left_out)}")
    if done.dropped:
        warn(f"tensors that are no parameters of the model were left out: {', '.join(done.dropped)}")
    return 0
