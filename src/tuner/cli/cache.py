"""Encode and store the images and captions of CONFIG ahead; a killed call goes on where it stopped.

info, verify and prune look after a cache instead: what it holds, whether every entry is sound, and removing what none
of the named configurations reads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.cli.console import error, heading, out, out_json, result_alone, table, warn
from tuner.cli.settings import add_setting_options, load, load_valid, same_settings
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.config import RawConfig
    from tuner.core.data.upkeep import CacheInfo
    from tuner.core.track.progress import Progress

ACTIONS = ("info", "verify", "prune")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", nargs="*", metavar="WHAT", help="a configuration; or info, verify or prune and any configurations"
    )
    add_setting_options(parser)
    parser.add_argument("--dir", metavar="DIR", help="info, verify: the cache folder, when no configuration names it")
    parser.add_argument("--yes", action="store_true", help="prune: remove without asking")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(command="cache")


def run(arguments: argparse.Namespace) -> int:
    words: list[str] = arguments.what
    if words and words[0] in ACTIONS:
        _refuse_unused(arguments, words)
        arguments.command = f"cache {words[0]}"
        return {"info": _info, "verify": _verify, "prune": _prune}[words[0]](arguments, words[1:])
    for name in ("dir", "yes"):
        if getattr(arguments, name):
            raise UsageError(f"--{name} is for info, verify and prune", fix=f"tuner cache info --{name}")
    from tuner.core.registry import Catalog

    if len(words) > 1:
        raise UsageError("one configuration at a time", fix=f"tuner cache {words[0]}")
    arguments.config = words[0] if words else None
    raw = load_valid(arguments, Catalog())
    from tuner.core.train.logs import set_up_logging
    from tuner.core.train.run import cache_only

    set_up_logging(raw)

    with result_alone(arguments.json):
        plan = cache_only(raw)
    if arguments.json:
        out_json({"images": plan.images, "validation_images": plan.validation_images})
        return 0
    out(f"cached: {plan.images} images for training, {plan.validation_images} held out")
    out(f"next: {same_settings(arguments, 'train')}")
    return 0


def _refuse_unused(arguments: argparse.Namespace, words: list[str]) -> None:
    """Options that the action would not look at."""
    action = words[0]
    if arguments.yes and action != "prune":
        raise UsageError(f"--yes is for prune, {action} removes nothing", fix=f"tuner cache {action}")
    if arguments.dir is not None and action != "prune" and (words[1:] or arguments.sets):
        raise UsageError(
            "a folder and configurations at once",
            why="configurations name their own folders",
            fix=f"tuner cache {action} --dir {arguments.dir}",
        )


def _load(arguments: argparse.Namespace, config: str | None) -> RawConfig:
    from tuner.core.registry import Catalog

    arguments.config = config
    return load(arguments, Catalog())


def _info(arguments: argparse.Namespace, configs: list[str]) -> int:
    from tuner.core.data.upkeep import cache_info

    if arguments.dir is not None:
        infos = [cache_info(Path(arguments.dir))]
    else:
        infos = [cache_info(folder, used) for folder, used in _used(arguments, configs).items()]
    if arguments.json:
        out_json([info.as_dict() for info in infos])
    else:
        for info in infos:
            _show(info)
    return 0


def _show(info: CacheInfo) -> None:
    from tuner.core.track.progress import byte_size

    heading(str(info.folder))
    rows = [
        (row.kind, row.model or "-", row.entries, byte_size(row.bytes), "-" if row.used is None else row.used)
        for row in info.rows
    ]
    table(("kind", "model", "entries", "size", "used"), rows)
    out(f"{info.entries} entries, {byte_size(info.bytes)}; {info.indices} indices, {byte_size(info.index_bytes)}")
    if info.leftovers:
        out(f"{info.leftovers} files of killed runs: tuner cache prune removes them")
    if info.others:
        out(f"{info.others} files are not of the cache and stay as they are")


def _verify(arguments: argparse.Namespace, configs: list[str]) -> int:
    from tuner.core.data.upkeep import verify_cache

    folders = [Path(arguments.dir)] if arguments.dir is not None else _folders(arguments, configs)
    found = []
    for folder in folders:
        with _reading() as progress:
            found.append(verify_cache(folder, progress.advance_of))
    if arguments.json:
        out_json([each.as_dict() for each in found])
        return int(not all(each.ok for each in found))
    for each in found:
        for path in each.broken:
            error(f"broken, and made again when it is needed: {path}")
        for path in each.changed:
            error(f"not what it was hashed as: {path}\n  fix: its new hash is taken at the next start; then prune")
        sound = each.entries - len(each.broken)
        out(f"{each.folder}: {sound} of {each.entries} entries are sound")
    return int(not all(each.ok for each in found))


def _prune(arguments: argparse.Namespace, configs: list[str]) -> int:
    from tuner.core.data.upkeep import doomed_files, remove
    from tuner.core.track.progress import byte_size

    if arguments.dir is not None:
        raise UsageError(
            "prune needs configurations", why="they say what is still needed", fix="tuner cache prune config.json"
        )
    found = []
    for folder, used in _used(arguments, configs).items():
        with _reading() as progress:
            found.append(doomed_files(folder, used, progress.advance_of))
    count, size = sum(len(each.files) for each in found), sum(each.bytes for each in found)
    if not arguments.json:
        for each in found:
            out(f"{each.folder}: {each.kept} entries are used by what is named here and stay")
            parts = (("unused", each.unused), ("broken", each.broken), ("of killed runs", each.leftovers))
            for name, paths in parts:
                if paths:
                    out(f"  {len(paths)} {name}, such as {paths[0].relative_to(each.folder)}")
        if count and not arguments.yes:
            warn("what is unused here may be used by configurations that are not named; they would encode it again")
    removing = bool(count) and (arguments.yes or (not arguments.json and _agreed(f"remove {count} files?")))
    if removing:
        for each in found:
            remove(each)
    if arguments.json:
        out_json([each.as_dict() | {"removed": removing} for each in found])
    elif not count:
        out("there is nothing to remove")
    else:
        out(f"removed {count} files, {byte_size(size)}" if removing else f"{count} files would go: add --yes")
    return 0


def _reading() -> Progress:
    """Progress of reading a cache, on standard error."""
    from rich.console import Console

    from tuner.core.track.progress import Progress

    return Progress("entries", None, "entries", console=Console(stderr=True))


def _agreed(question: str) -> bool:
    """Ask on a terminal; elsewhere nobody can answer."""
    if sys.stdin is None or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _folders(arguments: argparse.Namespace, configs: list[str]) -> list[Path]:
    from tuner.core.registry import Catalog, typed_config

    configs_here = (typed_config(raw, Catalog()) for raw in _raws(arguments, configs))
    return list(dict.fromkeys(Path(config.cache.dir) for config in configs_here))


def _used(arguments: argparse.Namespace, configs: list[str]) -> dict[Path, set[str]]:
    """The cache folders of the configurations, and the entries that these read."""
    from tuner.core.train.run import used_entries

    used: dict[Path, set[str]] = {}
    for raw in _raws(arguments, configs):
        folder, names = used_entries(raw)
        used.setdefault(folder, set()).update(names)
    return used


def _raws(arguments: argparse.Namespace, configs: list[str]) -> list[RawConfig]:
    """The named configurations; without any, the one that --set and --preset make."""
    return [_load(arguments, config) for config in configs] or [_load(arguments, None)]
