"""Inputs of recomputed blocks in host memory: same bits, and nothing of them left where they were."""

from __future__ import annotations

import pytest
import torch
from tests.core.memory.toy import Model, batch, train
from torch.multiprocessing.reductions import StorageWeakRef

from tuner.core.memory.checkpointing import apply_checkpointing
from tuner.core.memory.offload import MODES, open_offload

CPU = torch.device("cpu")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("every", [1, 2])
def test_training_gives_the_same_bits(mode: str, every: int) -> None:
    results = []
    for offload in (None, open_offload(mode, CPU)):
        model = Model()
        parameters = model.adapt()
        apply_checkpointing(model.blocks(), "block" if offload else "off", every, offload=offload)
        results.append(train(model, parameters, 5))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("every", [1, 2])
def test_inputs_leave_their_memory_and_shared_tensors_do_not_move(every: int) -> None:
    model = Model()
    model.adapt()
    offload = open_offload("sync", CPU)
    apply_checkpointing(model.blocks(), "block", every, offload=offload)
    inputs: list[StorageWeakRef] = []
    for block in model.blocks()[::every]:
        block.register_forward_pre_hook(
            lambda _, arguments: inputs.append(StorageWeakRef(arguments[0].untyped_storage()))
        )
    x, condition = batch(0)
    loss = model(x, condition).sum()
    assert all(reference.expired() for reference in inputs)
    count = len(inputs)
    size = x.numel() * 4
    # The first block cannot know yet what others will get too: its shift and text go as well.
    shared = condition.numel() * 4 * 2
    assert count * size <= offload.taken <= count * size + shared
    loss.backward()


def test_passes_without_gradients_copy_nothing() -> None:
    model = Model()
    offload = open_offload("async", CPU)
    apply_checkpointing(model.blocks(), "block", offload=offload)
    with torch.no_grad():
        model(*batch(0))
    assert offload.taken == 0
