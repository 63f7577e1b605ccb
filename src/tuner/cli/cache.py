"""Encode and store the images and captions of CONFIG ahead; a killed call goes on where it stopped."""

from __future__ import annotations

import argparse

from tuner.cli.console import out
from tuner.cli.settings import add_config_arguments, load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.set_defaults(command="cache")


def run(arguments: argparse.Namespace) -> int:
    from tuner.core.registry import Catalog

    raw = load(arguments, Catalog())
    from tuner.core.train.logs import set_up_logging
    from tuner.core.train.run import cache_only

    set_up_logging(raw)

    plan = cache_only(raw)
    out(f"cached: {plan.images} images for training, {plan.validation_images} held out")
    return 0
