"""The average of the weights: decay by update, the published trajectory, and weights that come back as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from tests.helpers import golden
from tuner.core.config import EmaConfig
from tuner.core.errors import UsageError
from tuner.core.optim import Ema, ema_decay
from tuner.core.optim.ema import warmup_decay

CPU = torch.device("cpu")
PUBLISHED = golden("core/ema.json")
TRAJECTORY = golden("core/ema_trajectory.safetensors")


def parameters(*values: torch.Tensor) -> dict[str, nn.Parameter]:
    return {f"p{number}": nn.Parameter(value.clone()) for number, value in enumerate(values)}


def config_of(settings: dict[str, Any]) -> EmaConfig:
    """The published settings in our words: the other project's first update always copies."""
    power = settings.get("use_ema_warmup", False)
    if settings.get("warmup_steps"):
        return EmaConfig(enabled=True, decay=settings["decay"], start=settings["warmup_steps"] - 1)
    return EmaConfig(
        enabled=True,
        decay=settings["decay"],
        warmup="power" if power else "updates",
        min_decay=settings.get("min_decay", 0.0),
        start=settings.get("update_after_step", 0) + 1,
    )


@pytest.mark.parametrize("table", PUBLISHED["decay_tables"], ids=lambda table: str(table["config"]))
def test_decay_by_update_is_the_published_table(table: dict[str, Any]) -> None:
    closed = table["source"].startswith("closed form")
    config = EmaConfig(decay=table["config"]["decay"], warmup="updates") if closed else config_of(table["config"])
    for step, expected in zip(table["steps"], table["decay"], strict=True):
        found = min(warmup_decay("updates", 0), config.decay) if closed and step == 0 else ema_decay(config, step)
        assert found == pytest.approx(expected, rel=1e-12), step


@pytest.mark.parametrize("foreach", [True, False])
def test_the_average_follows_the_published_trajectory(foreach: bool) -> None:
    rows = TRAJECTORY["parameters"]
    params = parameters(rows[0])
    ema = Ema(EmaConfig(decay=PUBLISHED["trajectory"]["decay"], foreach=foreach), params, CPU)
    for step, row in enumerate(rows[1:], 1):
        params["p0"].data.copy_(row)
        ema.update(step)
        torch.testing.assert_close(ema.shadow["p0"], TRAJECTORY["shadow"][step - 1], rtol=0, atol=1e-12)


def test_an_average_taken_rarely_looks_back_equally_far() -> None:
    params = parameters(torch.zeros(2))
    ema = Ema(EmaConfig(decay=0.9, every=3), params, CPU)
    params["p0"].data.fill_(1.0)
    for step in (1, 2):
        ema.update(step)
        assert ema.shadow["p0"].tolist() == [0.0, 0.0]
    ema.update(3)
    torch.testing.assert_close(ema.shadow["p0"], torch.full((2,), 1 - 0.9**3))


def test_until_the_start_it_is_a_copy() -> None:
    params = parameters(torch.zeros(2))
    ema = Ema(EmaConfig(decay=0.9, start=2), params, CPU)
    for step in (1, 2, 3):
        params["p0"].data.fill_(float(step))
        ema.update(step)
    torch.testing.assert_close(ema.shadow["p0"], torch.full((2,), 2 + 0.1))


def test_feedback_pulls_the_weights_towards_the_average_of_before() -> None:
    params = parameters(torch.tensor([1.0, 3.0]))
    ema = Ema(EmaConfig(decay=0.99, feedback=True), params, CPU)
    params["p0"].data.copy_(torch.tensor([2.0, 3.0]))
    ema.update(1)
    # The average moves to the weights as they were before the pull.
    torch.testing.assert_close(ema.shadow["p0"], torch.tensor([1.01, 3.0]))
    torch.testing.assert_close(params["p0"].data, torch.tensor([2.0 + 10 * 0.01 * (1.0 - 2.0), 3.0]))


def test_the_multiplier_scales_the_average_and_not_the_weights() -> None:
    params = parameters(torch.tensor([2.0]))
    ema = Ema(EmaConfig(decay=0.5, multiplier=1.5), params, CPU)
    ema.update(1)
    assert (ema.shadow["p0"].item(), params["p0"].item()) == (3.0, 2.0)


def test_the_average_of_bfloat16_weights_moves_at_small_steps() -> None:
    params = parameters(torch.ones(2, dtype=torch.bfloat16))
    ema = Ema(EmaConfig(decay=0.9999), params, CPU)
    params["p0"].data.fill_(2.0)
    for step in range(1, 11):
        ema.update(step)
    assert ema.shadow["p0"].dtype == torch.float32
    torch.testing.assert_close(ema.shadow["p0"], torch.full((2,), 2 - 0.9999**10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_average_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    params = parameters(*(torch.randn(5, 7, generator=generator).to(dtype) for _ in range(3)))
    ema = Ema(EmaConfig(decay=0.9), params, CPU)
    for parameter in params.values():
        parameter.data.add_(torch.randn(5, 7, generator=generator).to(dtype))
    ema.update(1)
    before = {name: (value.detach().clone(), ema.shadow[name].clone()) for name, value in params.items()}
    with pytest.raises(KeyError), ema.weights():
        for name, parameter in params.items():
            assert torch.equal(parameter.detach(), before[name][1].to(dtype))
            assert not torch.equal(parameter.detach(), before[name][0])
        raise KeyError
    for name, parameter in params.items():
        assert torch.equal(parameter.detach(), before[name][0])
        assert torch.equal(ema.shadow[name], before[name][1])


def test_frozen_parameters_are_not_averaged() -> None:
    params = parameters(torch.zeros(2), torch.zeros(2))
    params["p1"].requires_grad_(False)
    assert list(Ema(EmaConfig(), params, CPU).state()) == ["p0"]


def test_a_state_of_other_parameters_is_refused() -> None:
    ema = Ema(EmaConfig(), parameters(torch.zeros(2)), CPU)
    for wrong in ({"other": torch.zeros(2)}, {"p0": torch.zeros(3)}):
        with pytest.raises(UsageError, match="the saved average does not fit"):
            ema.load(wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 1.0}, "less than 1"),
        ({"min_decay": 0.5}, "min_decay is not used without a warmup"),
        ({"min_decay": 0.9, "decay": 0.5, "warmup": "updates"}, "min_decay must not be above decay"),
        ({"feedback": True, "warmup": "updates"}, "feedback needs a constant decay"),
        ({"feedback": True, "decay": 0.8}, "feedback would overshoot"),
        ({"feedback": True, "decay": 0.99, "every": 50}, "feedback would overshoot"),
        ({"init_from": "a.safetensors", "start": 5}, "nothing of init_from would be left"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EmaConfig(enabled=True, **settings)
