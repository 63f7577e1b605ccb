"""Compiled blocks: one graph for all sizes, equal results, and every way it can go wrong is an error that says so."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from tests.core.config.samples import build
from tests.core.memory.toy import WIDTH, Block, Model
from tuner.core.errors import UsageError
from tuner.core.memory.checkpointing import apply_checkpointing
from tuner.core.memory.compiling import Band, CompileSettings, check_backend, compile_blocks, inductor_options
from tuner.core.memory.offload import open_offload
from tuner.core.memory.streaming import stream_blocks
from tuner.core.train.compiling import CACHE_VARIABLE, FOLDER, compiler

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at its inputs

CPU = torch.device("cpu")
LISTS = tuple(replace(each, axes={"x": (1, "image"), "text": (1, "text")}) for each in Model.LISTS)
BAND = Band(6, 20)
SIZES = ((6, 3), (20, 5), (9, 4))
"""(image tokens, rows of text) of three steps."""


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def run(model: Model, tokens: int, rows: int, samples: int = 2) -> Tensor:
    """A loss whose blocks get ``rows`` of text."""
    generator = torch.Generator().manual_seed(100 * tokens + rows)
    x = torch.randn(samples, tokens, WIDTH, generator=generator)
    text = torch.randn(samples, rows, WIDTH, generator=generator)
    shift = torch.randn(samples, WIDTH, generator=generator)
    x = model.embed(x)
    for block in model.blocks():
        x = block(x, shift, text=text)
    return model.head(x).square().mean()


def gradients(model: Model, parameters: list[nn.Parameter]) -> list[Tensor]:
    found: list[Tensor] = []
    for size in SIZES:
        found += torch.autograd.grad(run(model, *size), parameters)
    return found


def small() -> tuple[Model, list[nn.Parameter]]:
    """Three blocks of one kind, adapted: two graphs, since only the first input needs no gradient."""
    model = Model()
    model.singles, model.pairs = nn.ModuleList(), model.pairs[:3]
    return model, model.adapt(("q", "wide"))


def counting(backend: str = "eager", **settings: Any) -> tuple[CompileSettings, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(backend)
    return CompileSettings(backend=counter, **{"band": BAND, **settings}), counter  # type: ignore[arg-type]


def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("level", ["off", "block", "offloaded"])
def test_all_sizes_share_a_graph_and_gradients_are_those_of_plain_blocks(level: str, streamed: bool) -> None:
    # Marks are made inside of what is recomputed: the second run gets detached inputs, which carry none.
    model, parameters = small()
    expected = gradients(model, parameters)
    settings, counter = counting("aot_eager" if streamed and level == "block" else "eager")
    compile_blocks(model, LISTS, settings)
    if streamed:
        stream_blocks(model, LISTS, 2, CPU)
    offload = open_offload("sync", CPU) if level == "offloaded" else None
    apply_checkpointing(model.blocks(), "block" if offload else level, offload=offload)
    assert_near(gradients(model, parameters), expected)
    assert counter.frame_count == 2


def test_two_forwards_with_other_texts_recompute_in_their_own_graphs() -> None:
    model, parameters = small()
    expected = torch.autograd.grad(run(model, 8, 3) + run(model, 8, 7), parameters)
    settings, counter = counting("aot_eager")
    compile_blocks(model, LISTS, settings)
    apply_checkpointing(model.blocks(), "block")
    found = torch.autograd.grad(run(model, 8, 3) + run(model, 8, 7), parameters)
    assert_near(list(found), list(expected))
    assert counter.frame_count == 2


def test_settings_hold_in_whatever_thread_a_block_is_called_and_nowhere_else() -> None:
    # Recomputation on a GPU happens in a thread of autograd's, which does not see what this one has set.
    config = torch._dynamo.config
    seen: list[tuple[int, bool]] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append((config.recompile_limit, config.automatic_dynamic_shapes))
        return graph.forward

    model, _ = small()
    compile_blocks(model, LISTS, CompileSettings(backend=backend, band=BAND))  # type: ignore[arg-type]
    before, after = config.recompile_limit, []

    def elsewhere() -> None:
        run(model, 8, 3)
        after.append(config.recompile_limit)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen and set(seen) == {(64, False)}
    assert after == [before] == [config.recompile_limit]


def test_options_that_tie_a_graph_to_a_part_of_the_range_go_with_the_graph() -> None:
    # As options of the call, since the backward graph is made in another thread.
    options = inductor_options("default", dynamic=True)
    assert options["shape_padding"] is False and options["triton.mix_order_reduction"] is False
    assert inductor_options("default", dynamic=False) == {}
    assert inductor_options("max-autotune-no-cudagraphs", dynamic=False)["max_autotune"] is True


def test_a_size_outside_the_range_is_refused() -> None:
    model, _ = small()
    compile_blocks(model, LISTS, counting()[0])
    with pytest.raises(UsageError, match="24 tokens"):
        run(model, 24, 3)


def test_without_a_dynamic_axis_each_size_has_its_graph() -> None:
    model, parameters = small()
    expected = gradients(model, parameters)
    settings, counter = counting(band=None)
    compile_blocks(model, LISTS, settings)
    assert_near(gradients(model, parameters), expected)
    assert counter.frame_count == 2 * len(SIZES)


def test_a_batch_of_another_size_is_another_graph_and_no_sample_is_lost() -> None:
    model, _ = small()
    expected = [run(model, 8, 3, samples).detach() for samples in (2, 1)]
    compile_blocks(model, LISTS, counting()[0])
    assert_near([run(model, 8, 3, samples).detach() for samples in (2, 1)], expected)


def test_names_are_as_before_and_removal_leaves_no_trace() -> None:
    model, _ = small()
    names, blocks = list(model.state_dict()), [block.forward for block in model.blocks()]
    compilation = compile_blocks(model, LISTS, counting()[0])
    run(model, 8, 3)
    assert list(model.state_dict()) == names and not any("_orig_mod" in name for name, _ in model.named_modules())
    compilation.remove()
    assert [block.forward for block in model.blocks()] == blocks


def test_more_graphs_than_allowed_are_an_error_with_the_reason() -> None:
    model, _ = small()
    compile_blocks(model, LISTS, counting(band=None, graphs=3)[0])
    with pytest.raises(UsageError, match="more than 3 times"):
        for tokens in range(6, 12):
            run(model, tokens, 3)


def test_a_break_in_the_graph_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Block.forward

    def broken(self: Block, x: Tensor, shift: Tensor, *, text: Tensor | None = None) -> Tensor:
        torch._dynamo.graph_break()
        return plain(self, x, shift, text=text)

    monkeypatch.setattr(Block, "forward", broken)
    model, _ = small()
    compile_blocks(model, LISTS, counting()[0])
    with pytest.raises(UsageError, match="not one graph"):
        run(model, 8, 3)


def test_an_unknown_argument_among_the_axes_is_a_mistake_of_the_plugin() -> None:
    model, _ = small()
    with pytest.raises(ValueError, match="no argument 'tokens'"):
        compile_blocks(model, [replace(LISTS[0], axes={"tokens": (1, "image")})], counting()[0])


@pytest.mark.parametrize(("backend", "told"), [("indctor", "no compiler"), ("cudagraphs", "single blocks")])
def test_a_backend_that_cannot_work_is_refused(backend: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        check_backend(backend, CPU)


def test_a_second_run_finds_what_the_first_one_compiled(tmp_path: Path) -> None:
    try:
        check_backend("inductor", CPU)
    except UsageError:
        return  # no C++ compiler here: there is nothing that could be kept
    config = build(compile={"enabled": True}, cache={"dir": str(tmp_path)})
    before, hits = os.environ.get(CACHE_VARIABLE), []
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(CACHE_VARIABLE, raising=False)
        for _ in range(2):
            torch.compiler.reset()
            counters.clear()
            with compiler(config), torch.no_grad():
                CompileSettings().compile(torch.sin)(torch.ones(3))
            hits.append(counters["inductor"]["fxgraph_cache_hit"])
        assert CACHE_VARIABLE not in os.environ
    assert hits == [0, 1]
    assert any((tmp_path / FOLDER).iterdir())
    assert os.environ.get(CACHE_VARIABLE) == before


def test_inductor_without_a_compiler_is_refused_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UsageError, match=r"C\+\+ compiler") as caught:
        check_backend("inductor", CPU)
    assert "g++" in str(caught.value.fix)
    check_backend("aot_eager", CPU)
