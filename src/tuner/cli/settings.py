"""The options that every command with a configuration has, and what they lead to."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.config import RawConfig
    from tuner.core.registry import Catalog


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """``config``, ``--model``, ``--preset`` and ``--set``."""
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="a JSON file; comments are allowed")
    add_setting_options(parser)


def add_setting_options(parser: argparse.ArgumentParser) -> None:
    """``--model``, ``--preset`` and ``--set``."""
    parser.add_argument("--model", metavar="NAME", help="the model plugin, when the file does not name it")
    parser.add_argument("--preset", metavar="MODEL/NAME", help="start from a preset; the file wins over it")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="sets", help="override: --set optimizer.lr=2e-4"
    )


def same_settings(arguments: argparse.Namespace, command: str) -> str:
    """``command`` with the configuration of these arguments, as one would type it."""
    words = ["tuner", *command.split(), *([arguments.config] if arguments.config else [])]
    for name, value in (("--model", arguments.model), ("--preset", arguments.preset)):
        words += [name, value] if value else []
    for value in arguments.sets:
        words += ["--set", value]
    return shlex.join(words)


def load(arguments: argparse.Namespace, catalog: Catalog) -> RawConfig:
    """The merged document that the arguments describe."""
    from tuner.core.config import load_config
    from tuner.core.registry import read_preset

    if arguments.config is None and not arguments.preset and not arguments.sets:
        raise UsageError("which configuration?", fix=f"tuner {arguments.command} config.json")
    preset = read_preset(catalog, arguments.preset) if arguments.preset else None
    return load_config(
        Path(arguments.config) if arguments.config else {}, model=arguments.model, sets=arguments.sets, preset=preset
    )


def load_valid(arguments: argparse.Namespace, catalog: Catalog) -> RawConfig:
    """``load``, with the schema checked at once: a misspelt key does not wait for torch to be imported."""
    from tuner.core.registry import typed_config

    raw = load(arguments, catalog)
    typed_config(raw, catalog)
    return raw
