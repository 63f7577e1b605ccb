"""The house rules that a reader relies on: sizes of files and functions, who may know whom, what an import costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src" / "tuner").rglob("*.py"))
SHARED = [path for path in SOURCES if path.relative_to(ROOT / "src" / "tuner").parts[0] in ("core", "cli")]

FILE_LINES = 500
FUNCTION_LINES = 80
LOOP_LINES = {"Loop.train": 60, "TrainStep.__call__": 80}
BROAD_EXCEPTS = 3
PICKLERS = ("pickle", "dill", "joblib", "cloudpickle")
FLAT_FILES = ("denoiser.py",)
"""One model per file, no branches to get lost in: these may be longer."""


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(path: Path) -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            found += [
                (f"{node.name}.{child.name}", child)
                for child in node.body
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            ]
    inside = {id(node) for _, node in found}
    found += [
        (node.name, node)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and id(node) not in inside
    ]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_a_file_is_short_enough_to_read(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert path.name in FLAT_FILES or lines <= FILE_LINES


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_a_function_is_short_enough_to_read(path):
    too_long = {
        each: node.end_lineno - node.lineno + 1
        for each, node in functions(path)
        if node.end_lineno - node.lineno + 1 > LOOP_LINES.get(each, FUNCTION_LINES)
    }
    assert not too_long


def test_broad_excepts_stand_only_in_the_plugin_catalog():
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None
                or "Exception" in {leaf.id for leaf in ast.walk(node.type) if isinstance(leaf, ast.Name)}
            ):
                found.append(name(path))
    assert set(found) <= {"src/tuner/core/registry/catalog.py"}
    assert len(found) <= BROAD_EXCEPTS


def test_the_core_and_the_command_line_know_no_model_by_name():
    families = {point.name for point in entry_points(group="tuner.models")} | {
        "anima",
        "flux",
        "sd3",
        "chroma",
        "qwen3",
    }
    # A sampler of timesteps is known to everybody under the name of the model it was first published with.
    allowed = re.compile(r"flux_shift")
    pattern = re.compile(rf"(?<![a-z])({'|'.join(sorted(families))})(?![a-z])", re.IGNORECASE)
    found = [
        f"{name(path)}:{number}: {line.strip()}"
        for path in SHARED
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(allowed.sub("", line))
    ]
    assert not found


def test_nothing_is_pickled_and_nothing_is_printed():
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found += [f"{name(path)}: {each.name}" for each in node.names if each.name.split(".")[0] in PICKLERS]
            # torch's restricted loader raises this error, which has no other name.
            if isinstance(node, ast.ImportFrom) and node.module in PICKLERS:
                found += [f"{name(path)}: {each.name}" for each in node.names if each.name != "UnpicklingError"]
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                found.append(f"{name(path)}:{node.lineno}: print")
    assert not found


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["plugins", "list"]], ids=" ".join)
def test_a_command_that_computes_nothing_never_imports_torch(arguments):
    script = (
        "import sys; from tuner.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'numpy', 'PIL'} & set(sys.modules)\n"
        "sys.exit(','.join(sorted(heavy)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "module",
    ["tuner", "tuner.core.types", "tuner.core.hooks", "tuner.core.config", "tuner.core.registry", "tuner.core.files",
     *(f"tuner.plugins.{point.name}.{part}" for point in entry_points(group="tuner.models")
       for part in ("plugin", "config", "facts", "names") if point.value.startswith("tuner."))],
)  # fmt: skip
def test_what_is_read_before_a_run_never_imports_torch(module):
    script = f"import sys, {module}; sys.exit('torch' if 'torch' in sys.modules else 0)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
