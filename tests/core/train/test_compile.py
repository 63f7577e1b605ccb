"""Compiled blocks: the same training, one graph per kind of block, and no silent way back to plain execution."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from tuner.core.compute import compiling
from tuner.core.errors import UsageError
from tuner.core.track.events import read_events
from tuner.core.train.run import train

EAGER = {"enabled": True, "backend": "aot_eager"}


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    """No graph of another test, and settings that are set anew, as in a new process."""
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(compiling, "_configured", threading.local())
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        yield
    torch.compiler.reset()


def numbers(folder: Path) -> list[float]:
    events = read_events(folder / "events.jsonl")
    return [e["loss"] if e["kind"] == "step" else e["adapted"] for e in events if e["kind"] in ("step", "validation")]


LOOKS = {
    "validate": {"split": 0.2, "every": 2},
    "sample": {"prompts": ["a red dog --w 80 --h 64 --s 1"], "every": 2},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "looked at": LOOKS,
    "recomputed with dropout": {
        "memory": {"checkpointing": "block", "offload_activations": "async"},
        "network": {"rank": 4, "dropout": 0.2, "rank_dropout": 0.2, "module_dropout": 0.2},
    },
    "int8 arithmetic": {"quantize": {"denoiser": "int8", "activations": "int8"}},
    "whole weights": {"train__mode": "full", "network": {}, "optimizer": {"lr": 1e-4}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_compiled_run_trains_the_same_without_a_graph_break(make_config, tmp_path, options):
    """Two sizes of pictures, and where it is looked at, samples of a third size."""
    common = {"schedule": {"name": "constant"}, "train__steps": 3, **options}
    plain = train(make_config(checkpoint__dir=str(tmp_path / "plain"), **common)).folder
    folder = train(make_config(checkpoint__dir=str(tmp_path / "compiled"), compile=EAGER, **common)).folder
    assert numbers(folder) == pytest.approx(numbers(plain), rel=1e-3)
    assert counters["graph_break"] == {}
    assert counters["stats"]["unique_graphs"] > 0


def test_streamed_blocks_are_compiled_too(make_config, six_blocks, tmp_path):
    common = {"model": six_blocks, "memory": {"swap_blocks": 4, "checkpointing": "block"}, "train__steps": 3}
    plain = train(make_config(checkpoint__dir=str(tmp_path / "plain"), **common)).folder
    folder = train(make_config(checkpoint__dir=str(tmp_path / "compiled"), compile=EAGER, **common)).folder
    assert numbers(folder) == pytest.approx(numbers(plain), rel=1e-3)


def test_the_number_of_blocks_and_sizes_does_not_count(make_config, six_blocks, monkeypatch):
    """A graph for the first size and one for all others; the first block has an input without gradient."""
    counter = CompileCounterWithBackend("aot_eager")
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **keys: original(function, **{**keys, "backend": counter}))
    train(make_config(model=six_blocks, compile=EAGER, train__steps=6))
    assert counter.frame_count <= 4


def test_files_of_a_compiled_run_have_plain_names(make_config):
    folder = train(make_config(compile=EAGER, train__steps=1)).folder
    assert not [name for path in folder.rglob("*.safetensors") for name in load_file(path) if "_orig_mod" in name]


def test_too_many_graphs_are_an_error_and_not_a_slow_run(make_config, monkeypatch):
    monkeypatch.setattr(compiling, "GRAPHS", 1)
    with pytest.raises(UsageError, match=r"compile\.dynamic"):
        train(make_config(compile={**EAGER, "dynamic": False}, train__steps=6))


def test_threads_of_the_backward_pass_have_the_same_settings():
    seen = []
    forward = compiling.CompiledForward(
        lambda: None,
        lambda: seen.append((torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit)),
    )
    for _ in range(2):
        thread = threading.Thread(target=forward)
        thread.start()
        thread.join()
    assert seen == [(compiling.GRAPHS, True)] * 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compile": {"mode": "max-autotune"}}, "has no effect while compile.enabled is off"),
        ({"compile": EAGER, "memory": {"checkpointing": "selective"}}, "a compiler joins"),
        ({"compile": EAGER, "memory": {"checkpointing": "keep_attention"}}, "a compiler joins"),
        ({"compile": {**EAGER, "mode": "max-autotune"}}, "has no effect with the backend"),
        ({"compile": {"enabled": True, "backend": "nothing"}}, "there is no compiler"),
        ({"compile": {"per_block": False}}, "always compiled one by one"),
        (
            {"compile": {"enabled": True, "mode": "reduce-overhead"}, "memory": {"swap_blocks": 2}},
            "records where weights lie",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_work_is_refused_by_name(make_config, options, words):
    with pytest.raises(UsageError, match=words):
        train(make_config(**options))


def test_without_a_compiler_for_the_cpu_it_is_refused(make_config, monkeypatch):
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match=r"neither g\+\+ nor clang"):
        train(make_config(compile={"enabled": True}))
