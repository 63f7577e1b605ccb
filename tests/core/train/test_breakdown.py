"""The parts of a loss are means over their own samples."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tuner.core.train.breakdown import break_down


def micro_batch(*samples: tuple[str, float, float]) -> Any:
    sources, losses, sigmas = zip(*samples, strict=True)
    batch = SimpleNamespace(items=[SimpleNamespace(source=source) for source in sources])
    return batch, torch.tensor(losses), torch.tensor(sigmas)


def test_samples_count_in_their_source_and_in_their_band_over_all_micro_batches() -> None:
    parts = break_down([micro_batch(("a", 1.0, 0.1), ("b", 4.0, 0.25)), micro_batch(("a", 3.0, 1.0), ("a", 2.0, 0.2))])
    assert parts.by_source == {"a": pytest.approx(2.0), "b": pytest.approx(4.0)}
    assert parts.by_timestep == {
        "0-250": pytest.approx(1.5), "250-500": pytest.approx(4.0), "750-1000": pytest.approx(3.0)
    }  # fmt: skip
    assert parts.named()["loss_by_source/b"] == pytest.approx(4.0)
