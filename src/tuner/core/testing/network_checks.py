"""Checks of what trains: its gradients, that it learns, and that its files say what was trained."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from tuner.core.adapters.files import read_adapter
from tuner.core.adapters.formats import key_maps
from tuner.core.adapters.lora import with_own_alphas
from tuner.core.adapters.network import load_network_tensors, network_tensors
from tuner.core.compute.modulation_cache import cache_modulations
from tuner.core.config.network import KEYS_OF_KINDS, AdapterKind
from tuner.core.testing.bench import Bench, assert_near
from tuner.core.train.measure import shake
from tuner.core.train.quantizing import load_components


class NetworkChecks:
    """An adapter on the tiny model."""

    def test_a_fresh_network_changes_nothing(self, bench: Bench) -> None:
        models, _ = bench.adapted(bench.run)
        batch = bench.batch()
        assert_near(bench.predict(bench.run, models, batch), bench.predict(bench.run, bench.models, batch))

    def test_only_the_network_gets_gradients(self, bench: Bench) -> None:
        models, network = bench.adapted(bench.run)
        bench.step(bench.run, models, network)(1, [bench.batch()])
        trained = {id(value): name for group in network.param_groups for name, value in group.params.items()}
        modules = [models.denoiser, *models.text_encoders.values(), *models.others.values()]
        for module in modules:
            for name, value in module.named_parameters() if module is not None else ():
                if id(value) not in trained:
                    assert value.grad is None and not value.requires_grad, name
        reached = [value.grad is not None for group in network.param_groups for value in group.params.values()]
        assert all(reached), f"{reached.count(False)} of {len(reached)} parameters got no gradient"

    def test_every_component_that_can_train_does(self, bench: Bench) -> None:
        for name in bench.facts.trainable:
            run = bench.open(train={"components": [name]})
            models, network = bench.adapted(run)
            before = {key: value.clone() for key, value in network_tensors(network).items()}
            step, batch = bench.step(run, models, network), bench.batch(run=run)
            first, second = step(1, [batch]).loss, step(1, [batch]).loss
            assert first != second, f"{name}: an update leaves the loss as it was"
            moved = [key for key, value in network_tensors(network).items() if not torch.equal(value, before[key])]
            assert moved, f"{name}: no parameter moves"

    def test_the_loss_falls_on_one_batch_in_20_steps(self, bench: Bench) -> None:
        models, network = bench.adapted(bench.run)
        step, batch = bench.step(bench.run, models, network), bench.batch()
        losses = [step(1, [batch]).loss for _ in range(20)]
        assert losses[-1] < 0.97 * losses[0]

    @pytest.mark.parametrize("kind", get_args(AdapterKind))
    def test_every_kind_of_adapter_starts_neutral_reads_back_and_merges(self, bench: Bench, kind: str) -> None:
        maps = key_maps(bench.facts)
        if not any(kind in fmt.kinds for fmt in maps.formats):
            return
        settings: dict[str, object] = {"type": kind, "rank": 2 if kind in KEYS_OF_KINDS["rank"] else 16}
        if kind == "boft":
            # One block for all rows suits every size.
            settings["block_size"] = 2**16
        run = bench.open(network=settings, checkpoint={"dtype": "fp32"}, train={"components": ["denoiser"]})
        models, network = bench.adapted(run)
        batch = bench.batch(run=run)
        assert torch.equal(bench.predict(run, models, batch), bench.predict(run, bench.models, batch))
        shake(network, seed=7)
        expected = bench.predict(run, models, batch)
        tensors = {name: value.cpu() for name, value in network_tensors(network).items()}
        files = run.model.save(network, tensors, bench.folder / f"kind-{kind}.safetensors", {})
        read: dict[str, Tensor] = {}
        for file in files:
            read |= read_adapter(file, maps).tensors
        others, loaded = bench.adapted(run)
        load_network_tensors(loaded, with_own_alphas(loaded, read))
        assert_near(bench.predict(run, others, batch), expected, kind)
        merged = bench.open(model={"merge": [{"path": str(file)} for file in files]})
        frozen = load_components(merged, bench.facts.components, torch.device("cpu"))
        assert_near(bench.predict(merged, frozen, batch), expected, f"merged {kind}")

    def test_modulations_are_known_before_the_blocks(self, bench: Bench) -> None:
        denoiser, batch = bench.models.denoiser, bench.batch()
        assert denoiser is not None
        expected = bench.predict(bench.run, bench.models, batch)
        cache = cache_modulations(denoiser, bench.facts.modulation, [blocks.path for blocks in bench.facts.block_lists])
        if cache is None:
            assert not bench.facts.modulation, "facts.modulation matches nothing inside the blocks"
            return
        try:
            assert_near(bench.predict(bench.run, bench.models, batch), expected)
        finally:
            cache.remove()
        assert cache.forwards > 0, "the denoiser's forward does not open modulations() around its blocks"

    def test_a_saved_adapter_predicts_the_same_in_every_format(self, bench: Bench) -> None:
        maps = key_maps(bench.facts)
        batch = bench.batch()
        models, network = bench.adapted(bench.run)
        shake(network, seed=7)
        expected = bench.predict(bench.run, models, batch)
        base = bench.predict(bench.run, bench.models, batch)
        assert float((expected - base).abs().max()) > 1e-5, "the adapter has no effect"
        for fmt in maps.formats:
            if "denoiser" not in fmt.prefixes or "lora" not in fmt.kinds:
                continue
            run = bench.open(checkpoint={"format": fmt.name, "dtype": "fp32"})
            tensors = {name: value.cpu() for name, value in network_tensors(network).items()}
            path = bench.folder / f"saved-{fmt.name}.safetensors"
            files = run.model.save(network, tensors, path, {})
            read: dict[str, Tensor] = {}
            for file in files:
                read |= read_adapter(file, maps).tensors
            others, loaded = bench.adapted(run)
            load_network_tensors(loaded, read)
            assert_near(bench.predict(run, others, batch), expected, fmt.name)
