"""The CUDA halves of streaming and offload, on streams that keep to their events and to nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.core.memory.late_streams import Device
from tests.core.memory.test_lending import equal, streamed, trainable
from tests.core.memory.toy import Model, batch, train
from tuner.core.config import OptimizerConfig
from tuner.core.memory import streaming, transfers
from tuner.core.memory.checkpointing import apply_checkpointing
from tuner.core.memory.offload import AsyncOffload
from tuner.core.memory.transfers import CudaTransfers
from tuner.core.optim import FusedUpdate, Update, build_optimizer
from tuner.core.types import ParamGroup

CPU = torch.device("cpu")
TIMES = pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
LEVELS = pytest.mark.parametrize("level", ["off", "block"])


@pytest.fixture
def device(early: bool, monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device(early=early)
    made.install(monkeypatch)
    monkeypatch.setattr(transfers, "page_locked", lambda size, where: torch.empty(size, dtype=torch.uint8))
    monkeypatch.setattr(streaming, "open_transfers", CudaTransfers)
    return made


@TIMES
@LEVELS
@pytest.mark.parametrize("kind", ["adapters", "mixed", "all"])
def test_streamed_blocks_train_to_the_same_bits(device: Device, kind: str, level: str) -> None:
    results = []
    for stream in (False, True):
        model = Model()
        parameters = model.adapt() if kind == "adapters" else trainable(model, kind)
        if stream:
            made = streamed(model)
        apply_checkpointing(model.blocks(), level)

        def look(_: int, model: Model = model, parameters: list[nn.Parameter] = parameters) -> None:
            with torch.no_grad():
                model(*batch(50))
                for parameter in parameters:
                    parameter.mul_(0.99)

        results.append(train(model, parameters, 4, between=look))
        if stream:
            assert {slot.flat.data_ptr() for slot in made.slots} <= device.kept
    assert device.copies > 0
    assert equal(*results)


@TIMES
@LEVELS
def test_updates_in_slots_go_back_before_the_slot_is_filled_again(device: Device, level: str) -> None:
    results: list[list[Tensor]] = []
    for stream in (False, True):
        model = Model()
        trainable(model, "all")
        names = {name: value for name, value in model.named_parameters() if value.requires_grad}
        config = OptimizerConfig(name="lion", lr=1e-3, fuse="block")
        optimizer = build_optimizer(config, [ParamGroup(name="all", component="denoiser", params=names)], CPU)
        fused = FusedUpdate(Update(config, optimizer, names, 0), [])
        if stream:
            made = streamed(model)
            made.update_in_slots(fused.take)
            fused.finish = made.finish
        apply_checkpointing(model.blocks(), level)
        for step in range(4):
            with fused.during(step + 1):
                model(*batch(step)).square().mean().backward()
        results.append([each.detach() for each in names.values()])
    assert equal(*results)


@TIMES
@pytest.mark.parametrize("every", [1, 2])
def test_inputs_come_back_in_time(device: Device, every: int) -> None:
    results = []
    for offloads in (False, True):
        model = Model()
        parameters = model.adapt()
        offload = AsyncOffload(CPU) if offloads else None
        apply_checkpointing(model.blocks(), "block", every, offload=offload)
        results.append(train(model, parameters, 3))
    assert device.copies > 0
    assert all(map(torch.equal, *results))
