"""Tell what a safetensors file is from its header: model, kind, ranks, targets, sizes, metadata, hashes.

With --strip it writes a copy with fewer metadata; the file itself is never changed."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tuner.cli.console import heading, out, out_json, table
from tuner.cli.files import families, new_file, writing
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.adapters.inspecting import Hashes, Inspection
    from tuner.core.files import WeightHeader

HASHED_BYTES = 1_000_000_000
"""Larger files are hashed on demand: it takes seconds per gigabyte."""
SHOWN = 10
WIDTH = 100
READABLE = {
    "ss_base_model_version": "base model", "ss_sd_model_name": "base file", "modelspec.architecture": "architecture",
    "modelspec.title": "title", "modelspec.author": "author", "modelspec.license": "license",
    "modelspec.resolution": "resolution", "modelspec.merged_from": "merged from", "ss_output_name": "name",
    "ss_network_module": "network", "ss_network_dim": "network rank", "ss_network_alpha": "network alpha",
    "ss_network_args": "network options", "ss_learning_rate": "learning rate", "ss_unet_lr": "denoiser rate",
    "ss_text_encoder_lr": "text encoder rate", "ss_optimizer": "optimizer", "ss_lr_scheduler": "schedule",
    "ss_steps": "steps", "ss_max_train_steps": "steps planned", "ss_epoch": "epoch", "ss_num_epochs": "epochs",
    "ss_num_train_images": "images with repeats", "ss_total_batch_size": "batch size",
    "ss_batch_size_per_device": "batch size per device",
    "ss_gradient_accumulation_steps": "accumulation", "ss_mixed_precision": "precision", "ss_seed": "seed",
    "ss_timestep_sampling": "timesteps", "ss_discrete_flow_shift": "shift", "ss_training_comment": "comment",
}  # fmt: skip
"""Metadata that are shown first, in this order and these words."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from tuner.core.adapters.stripping import LEVELS

    parser.add_argument("file", metavar="FILE", help="a safetensors file, a shard index, or a folder with one model")
    parser.add_argument("--modules", action="store_true", help="list every module of an adapter")
    parser.add_argument("--metadata", action="store_true", help="show every metadata string as it is")
    parser.add_argument("--hashes", action="store_true", help="hash the file even when it is large")
    levels = "; ".join(f"{name}: {words}" for name, words in LEVELS.items())
    parser.add_argument("--strip", choices=tuple(LEVELS), metavar="LEVEL", help=f"write a copy without {levels}")
    parser.add_argument("--out", metavar="NEW", help="the copy to write, with --strip")
    parser.add_argument("--overwrite", action="store_true", help="replace NEW when it exists")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(arguments: argparse.Namespace) -> int:
    if (arguments.strip is None) != (arguments.out is None):
        raise UsageError("--strip and --out belong together", fix="--strip private --out clean.safetensors")
    if arguments.overwrite and arguments.out is None:
        raise UsageError("--overwrite is for the copy that --strip writes")
    for option, given in (
        ("--modules", arguments.modules), ("--metadata", arguments.metadata), ("--hashes", arguments.hashes)
    ):  # fmt: skip
        if given and arguments.strip is not None:
            raise UsageError(f"{option} is for looking, --strip writes a copy", fix=f"leave out {option}")
    from tuner.core.adapters.inspecting import hashes, inspect
    from tuner.core.files import weight_header

    header = weight_header(arguments.file)
    if arguments.strip is not None:
        return _strip(arguments, header)
    found = inspect(header, families())
    single = header.path.suffix != ".json"
    if arguments.hashes and not single:
        raise UsageError("--hashes is for one file", where=str(header.path), fix="name one of its shards")
    if arguments.modules and found.what != "adapter":
        raise UsageError(
            "--modules is for adapters", where=str(header.path), why=f"this is a file of kind {found.what}"
        )
    known = hashes(header) if single and (arguments.hashes or found.size <= HASHED_BYTES) else None
    if arguments.json:
        out_json(_as_json(found, known))
        return 0
    _show(found, known)
    if arguments.modules:
        _show_modules(found)
    _show_metadata(found, everything=arguments.metadata)
    return 0


def _strip(arguments: argparse.Namespace, header: WeightHeader) -> int:
    from tuner.core.adapters.stripping import strip

    if header.path.suffix == ".json":
        raise UsageError("--strip is for one file", where=str(header.path), fix="name one of its shards")
    target = new_file(arguments.out, overwrite=arguments.overwrite, sources=[header.path])
    with writing(target):
        removed = strip(header, target, arguments.strip)
    if arguments.json:
        out_json({"path": str(target), "removed": removed})
    else:
        out(f"{target}: the same tensors, {len(removed)} metadata removed or cut")
        for key in removed:
            out(f"  {key}")
    return 0


def _as_json(found: Inspection, known: Hashes | None) -> dict[str, Any]:
    told = asdict(found)
    told["ranks"] = [
        {"kind": kind, "rank": rank, "alpha": alpha, "modules": count}
        for (kind, rank, alpha), count in found.ranks.items()
    ]
    for name in ("dtypes", "parts"):
        told[name] = {key: {"tensors": count, "bytes": size} for key, (count, size) in told[name].items()}
    return {**told, "hashes": None if known is None else asdict(known)}


def _show(found: Inspection, known: Hashes | None) -> None:
    from tuner.core.track.progress import byte_size

    family = " ".join(filter(None, (found.family, found.flavour)))
    spelled = f", format {found.format}" if found.format else ""
    heading(f"{found.path.name}: {found.what}{f' of {family}' if family else ''}{spelled}")
    out(f"{byte_size(found.size)}, {found.tensors} tensors")
    for dtype, (count, size) in found.dtypes.items():
        out(f"  {dtype}: {count} tensors, {byte_size(size)}")
    if known is not None:
        out(f"sha256   {known.sha256}")
        out(f"AutoV2   {known.sha256[:10]}")
        right = {True: " (as stored in the file)", False: " (NOT what the file stores)", None: ""}[known.stored]
        out(f"AutoV3   {known.tensors[:12]}{right}")
    if found.parts:
        out("")
        table(
            ("part", "tensors", "size"), [(name, count, byte_size(size)) for name, (count, size) in found.parts.items()]
        )
    if found.modules:
        out("")
        rows = [(kind, _text(rank), _text(alpha), count) for (kind, rank, alpha), count in found.ranks.items()]
        table(("kind", "rank", "alpha", "modules"), rows[:SHOWN])
        if len(rows) > SHOWN:
            out(f"and {len(rows) - SHOWN} more combinations; --json has all")
    for problem in found.problems:
        out(problem)
    if found.what == "unknown" or (found.what == "adapter" and found.family is None):
        out("\nno installed model knows these names, for example:")
        _list(found.unmapped)
    elif found.unmapped:
        what = "modules" if found.what == "adapter" else "parameters (buffers that are computed again, or leftovers)"
        out(f"\n{len(found.unmapped)} keys belong to no {what} of this family:")
        _list(found.unmapped)
    for program, names in found.unread.items():
        out(f"\n{program} would not understand {len(names)} of {len(found.modules)} modules:")
        _list(names, 3)


def _list(names: Any, limit: int = SHOWN) -> None:
    for name in names[:limit]:
        out(f"  {name}")
    if len(names) > limit:
        out(f"  and {len(names) - limit} more")


def _show_modules(found: Inspection) -> None:
    out("")
    table(
        ("module", "kind", "rank", "alpha", "dtype", "what it is"),
        [
            (row.name, row.kind, _text(row.rank), _text(row.alpha), row.dtype, _target(row.component, row.paths))
            for row in found.modules
        ],
    )


def _target(component: str, paths: tuple[str, ...]) -> str:
    return f"{component}:{' + '.join(paths)}" if paths else "nothing"


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _show_metadata(found: Inspection, *, everything: bool) -> None:
    if not found.metadata:
        return
    out("")
    if everything:
        for key in sorted(found.metadata):
            out(f"{key} = {found.metadata[key]}")
        return
    rows = [(words, _short(found.metadata[key])) for key, words in READABLE.items() if key in found.metadata]
    if rows:
        table(("metadata", ""), rows)
    rest = [key for key in found.metadata if key not in READABLE]
    if rest:
        out(f"{len(rest)} further metadata; --metadata shows all")


def _short(value: str) -> str:
    """One line of a value: JSON without its brackets' ballast, cut where it is long."""
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = value
    if isinstance(parsed, dict):
        value = ", ".join(f"{key}={each}" for key, each in parsed.items())
    value = " ".join(value.split())
    return value if len(value) <= WIDTH else f"{value[: WIDTH - 3]}..."
