"""Draw pictures with the model of CONFIG and any number of adapters, or with a run: name its folder instead.

Several strengths and seeds make a grid and a contact sheet. A --prompt may carry flags, as lines of prompt files do:
--n negative, --w --h size, --d seed, --s steps, --l guidance, --g embedded guidance, --fs shift, --ss sampler.
Everything that is not given comes from the section 'sample' of CONFIG, then from the model; every key of the section
can be given by --set, such as --set sample.sampler=heun."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.cli.console import out, out_json, warn
from tuner.cli.settings import add_config_arguments, load
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.config import RawConfig
    from tuner.core.train.sample import Drawn, Request
    from tuner.core.train.sample_like import Like
    from tuner.core.train.sample_source import RunSource

ADAPTERS, STRENGTHS, SEEDS = "FILE[:STRENGTH]", "LIST", "LIST"

SETTINGS = {
    "negative": ("negative", str, "TEXT", "negative prompt; has an effect with guidance above 1"),
    "size": ("size", None, "WxH", "width and height in pixels"),
    "steps": ("steps", int, "N", "sampler steps"),
    "cfg": ("cfg", float, "SCALE", "classifier-free guidance; 1 is none"),
}
"""Option to (key of ``sample``, type, metavar, help). Flags of a prompt win over them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument(
        "--step", type=int, metavar="N", help="of a run: the weights after N updates; default: the last"
    )
    parser.add_argument("--ema", action="store_true", help="of a run: the average of its weights")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument("--prompts", metavar="FILE", help="a prompt file: .txt, .json or .toml")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        type=adapter,
        metavar=ADAPTERS,
        help="an adapter file in any format of the model; several add up",
    )
    parser.add_argument(
        "--adapter-strengths",
        type=numbers,
        metavar=STRENGTHS,
        help="a column for each, such as 0,0.5,1: factors on the strengths of the adapters; =-1,0,1 when the first is "
        "negative",
    )
    parser.add_argument("--seed", type=seeds, metavar=SEEDS, help="a picture for each, such as 1,2,3")
    for option, (_, kind, metavar, text) in SETTINGS.items():
        parser.add_argument(f"--{option.replace('_', '-')}", type=kind or size, metavar=metavar, help=text)
    parser.add_argument("--like", metavar="PICTURE", help="draw this picture again, from the settings inside of it")
    parser.add_argument("--out", metavar="DIR", help="folder without pictures; default: a new one below samples")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(command="sample")


def run(arguments: argparse.Namespace) -> int:
    like = _like(arguments)
    source = _source(arguments, like)
    raw = _document(arguments, source, like)
    from rich.console import Console

    from tuner.core.train.logs import set_up_logging
    from tuner.core.train.sample import sample

    # A run's log file is its own.
    log = _section(raw, "log")
    set_up_logging({"log": {"level": log["level"]} if "level" in log else {}})
    if source is not None:
        _warn_of_differences(source, raw, like)
    request = _request(arguments, raw, source, like)
    drawn = sample(raw, request, console=Console(stderr=True) if arguments.json else None)
    _tell(drawn, as_json=arguments.json)
    return 0


def _warn_of_differences(source: RunSource, raw: RawConfig, like: Like | None) -> None:
    """Say what makes other pictures than those of the run."""
    quantize = _section(raw, "quantize")
    if source.split and (quantize.get("denoiser") or quantize.get("text_encoder")):
        warn("network.init of this run quantized other weights than these: its own pictures differ by that rounding")
    if like is not None and like.run not in (None, source.folder.path.resolve()):
        warn(f"{like.path} was made by another run, in {like.run}: the picture will differ")


def _section(raw: RawConfig, name: str) -> Mapping[str, Any]:
    """A section of a configuration that nobody has checked yet."""
    found = raw.get(name)
    return found if isinstance(found, Mapping) else {}


# --- options ----------------------------------------------------------------------------------------------------------


def adapter(text: str) -> tuple[Path, float]:
    """``file.safetensors:0.8`` as path and strength."""
    path, colon, strength = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        found = float(strength)
    except ValueError:
        if Path(path).is_file():
            raise argparse.ArgumentTypeError(f"{strength!r} is no strength such as 0.8") from None
        # Colons stand in paths too.
        return Path(text), 1.0
    if not math.isfinite(found):
        raise argparse.ArgumentTypeError(f"{strength!r} is no strength")
    return Path(path), found


def numbers(text: str) -> list[float]:
    try:
        found = [float(each) for each in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 0,0.5,1")
    return found


def seeds(text: str) -> list[int]:
    parts = text.split(",")
    if not all(each.strip().isdecimal() for each in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 1,2,3")
    return [int(each) for each in parts]


def size(text: str) -> list[int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(each.isdecimal() and int(each) for each in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 1024x768")
    return [int(each) for each in parts]


def _like(arguments: argparse.Namespace) -> Like | None:
    if arguments.like is None:
        return None
    named = ("prompt", "prompts", "step", "ema", *SETTINGS)
    given = [f"--{name.replace('_', '-')}" for name in named if _is_given(getattr(arguments, name))]
    keys = [text.partition("=")[0].strip() for text in arguments.sets]
    given += [f"--set {key}" for key in keys if re.fullmatch(r"sample(\.(?!adapters\b).*)?", key)]
    given += [f"the strength of --adapter {path}" for path, strength in arguments.adapter if strength != 1.0]
    if given:
        raise UsageError(
            f"{given[0]} has no effect with --like",
            why="the picture decides it; --seed and --adapter-strengths may differ",
            fix="take one of the two out",
        )
    from tuner.core.train.sample_like import read_like

    return read_like(Path(arguments.like))


def _is_given(value: object) -> bool:
    return value is not None and value is not False and value != []


def _source(arguments: argparse.Namespace, like: Like | None) -> RunSource | None:
    if arguments.config is not None and Path(arguments.config).suffix == ".safetensors":
        raise UsageError(
            "this is a file of weights, a configuration is wanted here",
            where=arguments.config,
            fix="give an adapter as --adapter FILE; a base model as --model NAME --set model.path=FILE",
        )
    if arguments.config is None or not Path(arguments.config).is_dir():
        for name in ("step", "ema"):
            if _is_given(getattr(arguments, name)):
                raise UsageError(f"--{name} needs the folder of a run", fix="name it in the place of CONFIG")
        if like is not None and like.step is not None:
            raise UsageError(
                "this picture was made by a run", where=str(like.path), fix="name the folder of the run as well"
            )
        return None
    if arguments.preset:
        raise UsageError("--preset has no effect on a run, which has its configuration", fix="take it out")
    from tuner.core.train.sample_source import open_source

    if like is None:
        return open_source(Path(arguments.config), step=arguments.step, ema=arguments.ema)
    return open_source(Path(arguments.config), step=like.step or None, ema=like.ema, named=like.file)


def _document(arguments: argparse.Namespace, source: RunSource | None, like: Like | None) -> RawConfig:
    """The configuration with the options in its section ``sample``."""
    if arguments.prompt and arguments.prompts:
        raise UsageError("--prompt and --prompts do not go together", fix="put all of them into the file")
    if source is None:
        from tuner.core.registry import Catalog

        raw = load(arguments, Catalog())
    else:
        from tuner.core.config import load_config

        raw = load_config(source.config, model=arguments.model, sets=arguments.sets)
    if like is not None:
        raw.overlay(("sample", "prompts"), [like.prompt.text], "--like")
    elif arguments.prompt:
        raw.overlay(("sample", "prompts"), list(arguments.prompt), "--prompt")
    elif arguments.prompts:
        raw.overlay(("sample", "prompts"), str(Path(arguments.prompts).expanduser().absolute()), "--prompts")
    for option, (key, *_) in SETTINGS.items():
        value = getattr(arguments, option)
        if value is not None:
            raw.overlay(("sample", key), value, f"--{option.replace('_', '-')} {json.dumps(value)}")
    return raw


def _request(arguments: argparse.Namespace, raw: RawConfig, source: RunSource | None, like: Like | None) -> Request:
    from tuner.core.train.sample import Request

    given: list[tuple[Path, float]] = arguments.adapter
    own = None if source is None or (like is not None and like.step == 0) else source
    shared: dict[str, Any] = {
        "strengths": arguments.adapter_strengths or (1.0,),
        "seeds": arguments.seed,
        "weights": own.file if own is not None and own.whole else None,
        "arithmetic": None if source is None else source.arithmetic,
        "out": None if arguments.out is None else Path(arguments.out),
    }
    strength = (raw.get("sample") or {}).get("adapter_strength", 1.0) if like is None else like.strength
    trained = [(own.file, strength)] if own is not None and not own.whole else []
    if like is None:
        return Request(adapters=[*trained, *given], **shared)
    known: Iterable[Path] = ()
    if source is not None:
        from tuner.core.train.sample_source import files_of

        known = files_of(source.folder.path)
    offered = [path for path, _ in given]
    return Request(adapters=trained if like.step is not None else (), like=like, offered=offered, known=known, **shared)


def _tell(drawn: Drawn, *, as_json: bool) -> None:
    if as_json:
        images = [{"path": str(path), **each} for path, each in zip(drawn.images, drawn.settings, strict=True)]
        sheet = None if drawn.sheet is None else str(drawn.sheet)
        out_json({"folder": str(drawn.folder), "sheet": sheet, "seconds": drawn.seconds, "images": images})
        return
    count = len(drawn.images)
    out(f"drawn: {count} picture{'s' if count > 1 else ''}, {drawn.seconds:.0f} s, {drawn.folder}")
    if drawn.sheet is not None:
        out(f"sheet: {drawn.sheet}")
