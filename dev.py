"""Everything a newcomer runs: set-up, demo, tests, gates. Standard library only, the same on every system.

python dev.py demo     set up, then train the demo LoRA and prove what it learned
python dev.py test     set up, then run all tests
python dev.py gates    set up, then lint, types, import rules and the docs build
python dev.py docs     set up, then build the documentation into site/
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
STAMP = VENV / "tuner-setup"
INPUTS = ("pyproject.toml", "constraints.txt")


def main(arguments: list[str]) -> int:
    commands = {"demo": demo, "test": test, "gates": gates, "docs": docs}
    if not arguments or arguments[0] not in commands:
        print(__doc__)
        return 2
    if sys.version_info < (3, 11):  # noqa: UP036 - this file runs before anything checked the version
        print(f"tuner needs Python 3.11 or newer; this is {sys.version.split()[0]}")
        return 2
    set_up()
    return commands[arguments[0]](arguments[1:])


def set_up() -> None:
    """Make .venv once; a later call returns at once unless the dependencies changed."""
    wanted = fingerprint()
    if STAMP.is_file() and STAMP.read_text() == wanted and PYTHON.is_file():
        return
    started = time.monotonic()
    if not PYTHON.is_file():
        say("making .venv")
        venv.create(VENV, with_pip=True)
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    say("installing torch (first, and pinned, so that nothing else picks another build)")
    check(*pip, "--requirement", "constraints.txt")
    say("installing tuner and its development tools")
    check(*pip, "--constraint", "constraints.txt", "--editable", ".[dev]")
    STAMP.write_text(wanted)
    say(f"set-up done in {time.monotonic() - started:.0f} s")


def fingerprint() -> str:
    digest = hashlib.sha256(sys.version.encode())
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def demo(arguments: list[str]) -> int:
    """Train the demo LoRA into a fresh folder below out/, then verify it."""
    folder = free_folder(ROOT / "out" / "demo")
    train = [str(PYTHON), "-m", "tuner", "train", "--model", "anima", "examples/demo/config.json"]
    code = run(*train, "--set", f"checkpoint.dir={folder}", *arguments)
    return code or run(str(PYTHON), "examples/demo/verify.py", str(folder))


def test(arguments: list[str]) -> int:
    workers = str(min(4, os.cpu_count() or 1))
    return run(str(PYTHON), "-m", "pytest", "--numprocesses", workers, *arguments)


def gates(arguments: list[str]) -> int:
    """All gates run even when one fails, so that one look shows everything."""
    steps = {
        "lint": [PYTHON, "-m", "ruff", "check", "."],
        "format": [PYTHON, "-m", "ruff", "format", "--check", "."],
        "types": [PYTHON, "-m", "mypy"],
        "import rules": [BIN / "lint-imports"],
        # Without --quiet: it hides the warnings that --strict counts.
        "docs": [PYTHON, "-m", "mkdocs", "build", "--strict"],
    }
    failed = []
    for name, command in steps.items():
        say(name)
        if run(*map(str, command)):
            failed.append(name)
    say(f"failed: {', '.join(failed)}" if failed else "all gates passed")
    return 1 if failed else 0


def docs(arguments: list[str]) -> int:
    return run(str(PYTHON), "-m", "mkdocs", "build", "--strict", *arguments)


def free_folder(wanted: Path) -> Path:
    """``wanted``, or ``wanted-2``, ``wanted-3``... when earlier demos left theirs: nothing is overwritten."""
    number, folder = 1, wanted
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def check(*command: str) -> None:
    if run(*command):
        sys.exit(1)


def run(*command: str) -> int:
    # The second name silences an advertisement that mkdocs-material prints at every build.
    environment = {**os.environ, "PYTHONUTF8": "1", "NO_MKDOCS_2_WARNING": "true"}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def say(text: str) -> None:
    print(f"[dev] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
