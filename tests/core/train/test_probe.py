"""A run against its plan, by its event log."""

from __future__ import annotations

import pytest

from tuner.core.plan.devices import CPU, DEVICES
from tuner.core.track.events import read_events
from tuner.core.train import probe
from tuner.core.train.probe import device_peak, plan_device
from tuner.core.train.run import train


def plan_events(folder):
    return {event["state"]: event for event in read_events(folder / "events.jsonl") if event["kind"] == "plan"}


def test_a_run_tells_its_plan_corrects_it_and_compares_it(make_config, tmp_path, caplog):
    caplog.set_level("INFO")
    train(make_config(train={"steps": 4}, checkpoint={"dir": str(tmp_path / "run")}))
    found = plan_events(tmp_path / "run")
    assert list(found) == ["predicted", "measured", "compared"]
    assert found["predicted"]["host_bytes"] > 0.4e9 and found["predicted"]["step_seconds"] is None
    assert found["measured"]["step"] == 3 and found["measured"]["step_seconds"] > 0
    # A tiny model is little more than the program itself, which this process shares with the other tests.
    assert found["compared"]["host_bytes_error"] == pytest.approx(
        found["compared"]["host_bytes"] / found["predicted"]["host_bytes"] - 1
    )
    told = [record.getMessage() for record in caplog.records if record.name == probe.__name__]
    assert [line.split(":")[0] for line in told] == ["plan", "measured", "measured against the plan"]


def test_a_model_without_costs_trains_without_a_plan(make_config, tmp_path, monkeypatch):
    def unknown(*arguments):
        raise probe.UsageError("no plan for the model", why="its plugin declares no costs")

    monkeypatch.setattr(probe, "predict", unknown)
    train(make_config(train={"steps": 3}, checkpoint={"dir": str(tmp_path / "run")}))
    assert list(plan_events(tmp_path / "run")) == ["measured"]


def test_the_device_of_a_run_is_looked_up_by_its_drivers_name(monkeypatch):
    import torch

    class Properties:
        name, total_memory = "NVIDIA GeForce RTX 4090", 24 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    found = plan_device(torch.device("cuda"))
    assert (found.memory, found.products) == (24 * 2**30, DEVICES["4090"].products)
    assert plan_device(torch.device("cpu")) is CPU


def test_memory_beside_the_tensors_counts_too(monkeypatch):
    import torch

    device, gb = torch.device("cuda"), 10**9
    for name, size in {"memory_reserved": 9 * gb, "max_memory_allocated": 8 * gb}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (12 * gb, 24 * gb))
    assert device_peak(device) == (8 + 3) * gb
    assert device_peak(torch.device("cpu")) is None
