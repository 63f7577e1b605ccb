"""Checks of compiled blocks: one graph for all sizes, and what it computes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tuner.core.compute.modulation_cache import cache_modulations
from tuner.core.errors import UsageError
from tuner.core.memory.checkpointing import apply_checkpointing
from tuner.core.memory.compiling import Band, Compiled, CompileSettings, check_backend, compile_blocks
from tuner.core.testing.bench import Bench
from tuner.core.train.measure import losses_and_gradient, shake

CPU = torch.device("cpu")
NEAR = 1e-4
"""Largest relative difference of a loss and of the gradient: other kernels, and sums in another order."""


class CompileChecks:
    """Blocks of the tiny model as graphs."""

    def test_compiled_blocks_compute_the_same_in_one_graph_for_all_sizes(
        self, bench: Bench, tmp_path: object, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Recomputed too, and with modulations made ahead. A break in a graph would be an error."""
        lists = bench.facts.block_lists
        if not lists:
            return
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        backend = self._backend()
        # A compiler proper takes a second per product; what adapters add is seen on one of them as well.
        narrow = {} if backend == "eager" else {"targets": [_one_kind_of_linear(bench)]}
        run = bench.open(network={"rank": 2, **narrow})
        models, network = bench.adapted(run)
        denoiser = models.denoiser
        assert denoiser is not None
        shake(network, seed=7)
        parameters = [value for group in network.param_groups for value in group.params.values()]
        batch = bench.batch(1, run=run)
        batches = [replace(batch, latents=bench.latents(1, size)) for size in bench.sizes]

        def measured(count: int) -> tuple[list[float], Tensor]:
            return losses_and_gradient(
                run.model, models, batches[:count], parameters, text=lambda each: each.text, device=CPU, seed=3
            )

        plain, gradient = measured(2)
        side = bench.facts.costs.token if bench.facts.costs is not None else bench.facts.resolution_multiple
        tokens = [(height // side) * (width // side) for height, width in bench.sizes]
        band = Band.of(tokens) if all(each.axes for each in lists) else None
        with fresh_compiler():
            blocks = compile_blocks(denoiser, lists, CompileSettings(backend=backend, band=band))
            # The first block's input may need no gradient, which makes it another graph of the same code.
            if len(blocks.blocks) > 1:
                outermost = blocks.blocks[0].forward
                assert isinstance(outermost, Compiled)
                blocks.blocks[0].forward = outermost.inner
            cache_modulations(denoiser, bench.facts.modulation, [each.path for each in lists])
            for each in lists:
                apply_checkpointing(denoiser.get_submodule(each.path).children(), "block")
            measured(1)
            first = graphs()
            found, other = measured(2)
            assert first > 0, "no block was called through its forward"
            assert band is None or graphs() == first, "the second size needed graphs of its own"
        assert found == pytest.approx(plain, rel=NEAR)
        assert float((other - gradient).norm() / gradient.norm()) < NEAR

    def _backend(self) -> str:
        """What the class names, unless this machine lacks what it needs."""
        wanted = str(getattr(self, "compiler", "eager"))
        try:
            check_backend(wanted, CPU)
        except UsageError:
            return "aot_eager"
        return wanted


def _one_kind_of_linear(bench: Bench) -> str:
    """A pattern for the first linear that is adapted in every block of the first list."""
    start = f"denoiser:{bench.facts.block_lists[0].path}.0."
    _, network = bench.adapted(bench.run)
    names = [name for group in network.param_groups for name in group.params if name.startswith(start)]
    path = names[0].removeprefix("denoiser:").rpartition(".")[0]
    return re.escape(path).replace(r"\.0\.", r"\.\d+\.", 1)


def graphs() -> int:
    """Graphs that were made since the compiler was reset."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


@contextmanager
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before takes part, and nothing compiled inside stays."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    try:
        with warnings.catch_warnings():
            # What a compiler and its packages say while they work is not about the model.
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.compiler.reset()
        counters.clear()
