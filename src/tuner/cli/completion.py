"""Print a script that completes commands, options, models, presets and the keys of --set in a shell.

bash: add  source <(tuner completion bash)  to ~/.bashrc
zsh:  tuner completion zsh > a file called _tuner in a folder of $fpath
fish: tuner completion fish > ~/.config/fish/completions/tuner.fish

Print it again after installing plugins: their models, presets and keys are in it."""

from __future__ import annotations

import argparse

from tuner.cli.console import out

SHELLS = ("bash", "zsh", "fish")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))


def run(arguments: argparse.Namespace) -> int:
    from tuner.cli.completion_scripts import script
    from tuner.cli.completion_words import collect

    out(script(arguments.shell, collect()).rstrip())
    return 0
