"""The front of the command line. It must stay quick: neither torch nor pydantic nor rich is imported here."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from tuner.cli.console import error, never_fail_to_write, out, warn
from tuner.core.errors import UsageError

COMMANDS = {
    "configure": "write or change a configuration by answering questions",
    "train": "train an adapter or a whole model",
    "check": "check everything a training needs, without a GPU",
    "plan": "predict memory, disk and time, and find what fits into a GPU",
    "data": "look at pictures and captions before training: buckets, duplicates, blur, odd files",
    "cache": "encode and store images and captions ahead",
    "verify": "compare what saves time or memory with plain execution, here",
    "sample": "draw pictures with a model, adapters and strengths, or with a run",
    "inspect": "tell what a model or adapter file is, and strip its metadata",
    "merge": "put adapters into a checkpoint, or several adapters into one",
    "extract": "make a LoRA of the difference between two checkpoints",
    "resize": "give an adapter other ranks",
    "convert": "rewrite an adapter in another format, or a model in another layout",
    "config": "print the schema or a configuration with every default, or import another trainer's",
    "explain": "what a key means, or where every value of a configuration comes from",
    "doctor": "look at this environment: versions, devices, plugins, common faults; a bundle for bug reports",
    "report": "what runs came to: losses, speed, memory, and settings that differ",
    "plugins": "list, install, check and write models and extensions",
    "completion": "a script that completes commands, options, keys and presets in bash, zsh or fish",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 a problem of the user's, 3 done in part, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _open_closed_streams()
    never_fail_to_write()
    try:
        if arguments[:1] == ["help"] and len(arguments) > 1:
            arguments = [*arguments[1:], "--help"]
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            return _help()
        if arguments[0] in ("-V", "--version"):
            out(f"tuner {metadata.version('tuner')}")
            return 0
        return _run(arguments[0], arguments[1:])
    except UsageError as problem:
        error(str(problem))
        return problem.exit_code
    except KeyboardInterrupt:
        error("interrupted")
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough.
        sys.stderr.close()
        return 0
    except OSError as problem:
        # A folder that cannot be written, a full disk: what the user's machine refused, not what the program got wrong.
        if problem.filename is None and problem.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        why = "a file is in the way of a folder" if isinstance(problem, FileExistsError) else problem.strerror
        error(str(UsageError("this file or folder cannot be used", where=problem.filename, why=why)))
        return UsageError.exit_code


def _open_closed_streams() -> None:
    """What is written to a stream that the shell has closed (``>&-``) goes nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  # until the process ends


def _run(name: str, arguments: list[str]) -> int:
    if name not in COMMANDS:
        from difflib import get_close_matches

        guess = get_close_matches(name, COMMANDS, n=1)
        fix = f"did you mean 'tuner {guess[0]}'?" if guess else "tuner --help lists the commands"
        raise UsageError(f"there is no command {name!r}", fix=fix)
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UsageError("the current folder is not there any more", fix="go to another one with cd") from None
    parser = command_parser(name)
    code: int = importlib.import_module(f"tuner.cli.{name}").run(parser.parse_args(arguments))
    return code


def command_parser(name: str) -> argparse.ArgumentParser:
    """The arguments of one command."""
    module = importlib.import_module(f"tuner.cli.{name}")
    parser = Parser(prog=f"tuner {name}", description=module.__doc__, formatter_class=argparse.RawTextHelpFormatter)
    module.add_arguments(parser)
    return parser


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UsageErrors, like all others."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(f"{self.prog}: {message}", fix=self._meant(message) or f"{self.prog} --help")

    def _meant(self, message: str) -> str | None:
        """The option that the first unknown one of a message resembles."""
        from difflib import get_close_matches

        unknown = message.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0]
        if unknown == message or not unknown.startswith("--"):
            return None
        guess = get_close_matches(unknown, self._option_string_actions, n=1)
        return f"did you mean {guess[0]!r}?" if guess else None


def _help() -> int:
    from tuner.core.registry.catalog import MODELS, Catalog

    catalog = Catalog()
    width = max(map(len, COMMANDS))
    models = ", ".join(entry.name for entry in catalog.entries(MODELS)) or "none"
    out("tuner: fine-tune text-to-image models\n")
    out("usage: tuner COMMAND [OPTIONS]    tuner COMMAND --help\n")
    out("commands:")
    for name, summary in COMMANDS.items():
        out(f"  {name:{width}}  {summary}")
    out(f"\nmodels: {models}")
    out("\nexample: tuner train config.json --model NAME")
    for problem in catalog.warnings():
        warn(f"{problem}. See: tuner plugins check {problem.name}")
    return 0
