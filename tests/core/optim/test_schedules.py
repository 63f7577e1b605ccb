"""Learning-rate curves equal the references; warm-up and decay take updates or shares; nothing depends on history."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from tests.helpers import golden
from tuner.core.config import ScheduleConfig, steps_of
from tuner.core.errors import UsageError
from tuner.core.optim import LrSchedule, lr_factor

TABLE = golden("core/lr_schedules.json")
STANDARD = {
    "constant",
    "constant_with_warmup",
    "cosine",
    "cosine_with_min_lr",
    "cosine_with_restarts",
    "inverse_sqrt",
    "linear",
    "piecewise_constant",
    "polynomial",
    "warmup_stable_decay",
}
SECOND_CONTRACT = {"polynomial", "linear", "constant_with_warmup", "sine"}
"""Curves for which the second reference counts; its cosine and cosine_with_restarts are information."""
CLASS_SCHEDULES = ["CosineAnnealingLR", "torch.optim.lr_scheduler.StepLR"]
"""Rows with a torch scheduler class, which come with ``schedule.class``."""


def count(value: float) -> int | str:
    return f"{value * 100:g}%" if 0 < value < 1 else int(value)


def config_of(row: dict) -> ScheduleConfig:
    options, name = row["options"], row["scheduler"]
    names = {"lr_scheduler_power": "power", "lr_power": "power", "lr_scheduler_min_lr_ratio": "min_ratio",
             "lr_scheduler_num_cycles": "cycles", "lr_scheduler_timescale": "timescale"}  # fmt: skip
    keys = {"name": name} | {names[key]: value for key, value in options.items() if key in names}
    keys |= {
        new: count(options[old])
        for old, new in (("lr_warmup_steps", "warmup"), ("lr_decay_steps", "decay"))
        if old in options
    }
    if name == "sine":
        keys["period"] = keys.pop("warmup")
    if name in ("sine", "polynomial") and "lr_end" in options:
        keys["end_lr"] = options["lr_end"]
    if name == "piecewise_constant":
        keys["pieces"] = [{"until": 50, "factor": 1}, {"until": 100, "factor": 0.1}, {"factor": 0.01}]
    return ScheduleConfig(**keys)


def rows() -> list[dict]:
    first = [
        row for row in TABLE["schedules"] if row["source"] == "sd-scripts" and "lr_scheduler_type" not in row["options"]
    ]
    second = [
        row for row in TABLE["schedules"] if row["source"] == "SimpleTuner" and row["scheduler"] in SECOND_CONTRACT
    ]
    return first + second


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row['source']}-{row['scheduler']}-{row['options']}")
def test_a_curve_equals_the_reference(row: dict) -> None:
    config, base = config_of(row), row["base_lr"]
    rates = [base * lr_factor(config, step, 200, base) for step in range(len(row["lr"]))]
    # the reference cuts its sine off after nine decimals
    near = 1.001e-9 if row["scheduler"] == "sine" else 1e-9 * base
    assert rates == pytest.approx(row["lr"], rel=0, abs=near)


def test_every_contract_curve_is_checked() -> None:
    checked = rows()
    assert {row["scheduler"] for row in checked if row["source"] == "sd-scripts"} == STANDARD
    assert {row["scheduler"] for row in checked if row["source"] == "SimpleTuner"} == SECOND_CONTRACT
    left = [row for row in TABLE["schedules"] if row not in checked]
    assert [row["options"]["lr_scheduler_type"] for row in left if row["source"] == "sd-scripts"] == CLASS_SCHEDULES
    assert {row["scheduler"] for row in left if row["source"] == "SimpleTuner"} == {"cosine", "cosine_with_restarts"}


@pytest.mark.parametrize(
    "entry", [e for e in TABLE["warmup_value_parsing"] if e["text"].endswith("%") or e["type"] == "int"], ids=str
)
def test_a_warm_up_is_updates_or_a_share_as_in_the_reference(entry: dict) -> None:
    text = entry["text"]
    value = text if text.endswith("%") else int(text)
    config = ScheduleConfig(name="constant_with_warmup", warmup=value)
    expected = entry["value"] if entry["type"] == "int" else entry["value"] * 400
    assert steps_of(config.warmup, 400) == pytest.approx(expected)


def test_a_share_is_exact() -> None:
    assert [steps_of("29%", 100), steps_of("5.5%", 200), steps_of("10%", 7)] == [29, 11, 0]


@pytest.mark.parametrize("warmup", ["abc", 0.1, 1.5, -1, "1e2%"])
def test_other_spellings_of_a_warm_up_are_refused(warmup: object) -> None:
    with pytest.raises(ValidationError):
        ScheduleConfig(warmup=warmup)


def test_every_factor_stays_finite_beyond_the_end() -> None:
    keys = {
        "warmup_stable_decay": {"decay": 5},
        "piecewise_constant": {"pieces": [{"factor": 0.5}]},
        "sine": {"period": 5},
    }
    for name in STANDARD | {"sine"}:
        config = ScheduleConfig(name=name, **keys.get(name, {}))
        assert all(0.0 <= lr_factor(config, step, 20) <= 1.0 for step in range(40))


def test_a_warm_up_as_long_as_the_run_is_allowed() -> None:
    config = ScheduleConfig(name="cosine", warmup="100%")
    assert [lr_factor(config, step, 4) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


def make(rates: list[float]) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate, "base_lr": rate} for rate in rates]
    return torch.optim.SGD(groups)


def test_the_rate_of_a_step_depends_on_nothing_but_the_step() -> None:
    optimizer = make([1e-3, 4e-3])
    schedule = LrSchedule(optimizer, ScheduleConfig(name="linear", warmup=2), 10)
    schedule.set(7)
    first = [group["lr"] for group in optimizer.param_groups]
    for step in (0, 9, 3, 7):
        schedule.set(step)
    assert [group["lr"] for group in optimizer.param_groups] == first == pytest.approx([3.75e-4, 1.5e-3])
    again = LrSchedule(optimizer, ScheduleConfig(name="linear", warmup=2), 10)
    again.set(2)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 4e-3]


def test_a_rate_that_an_optimizer_keeps_as_a_tensor_stays_one() -> None:
    optimizer = make([1e-3])
    kept = optimizer.param_groups[0]["lr"] = torch.tensor(1e-3)
    LrSchedule(optimizer, ScheduleConfig(name="linear"), 10).set(5)
    assert optimizer.param_groups[0]["lr"] is kept
    assert float(kept) == pytest.approx(5e-4)


def test_an_absolute_end_rate_is_the_same_for_every_group() -> None:
    optimizer = make([1e-3, 4e-3])
    LrSchedule(optimizer, ScheduleConfig(name="polynomial", end_lr=1e-4), 10).set(10)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-4, 1e-4])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "polynomial", "end_lr": 1e-3}, "is not below the learning rate"),
        ({"name": "linear", "warmup": 11}, "warm-up and decay need 11 updates"),
        ({"name": "warmup_stable_decay", "warmup": "50%", "decay": "60%"}, "need 11 updates"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused(keys: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LrSchedule(make([1e-3]), ScheduleConfig(**keys), 10)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "constant", "warmup": 5}, "warmup is not used by the schedule 'constant'"),
        ({"name": "linear", "cycles": 2}, "cycles is not used"),
        ({"name": "sine"}, "needs period"),
        ({"name": "warmup_stable_decay"}, "needs decay"),
        ({"name": "cosine_with_min_lr", "min_ratio": 0.1, "end_lr": 1e-6}, "not both"),
        ({"name": "piecewise_constant", "pieces": [{"until": 3, "factor": 1}]}, "the last has none"),
    ],
)
def test_a_key_that_would_do_nothing_is_refused(keys: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ScheduleConfig(**keys)
