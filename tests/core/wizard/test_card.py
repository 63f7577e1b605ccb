"""The card: found by itself where there is one, named by the user elsewhere, and never used up without asking."""

from __future__ import annotations

from typing import Any

import pytest

from tuner.core.errors import UsageError
from tuner.core.plan.devices import DEVICES
from tuner.core.wizard import card
from tuner.core.wizard.answers import FileAsker
from tuner.core.wizard.card import Card, choose_card
from tuner.core.wizard.questions import Interview


def chosen(**answers: Any) -> tuple[Card, FileAsker, list[str]]:
    told: list[str] = []
    asker = FileAsker(answers, "answers.json", told.append)
    return choose_card(Interview(asker)), asker, told


def test_a_card_that_is_here_is_taken_and_its_memory_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "device_here", lambda: DEVICES["3060"])
    found, asker, told = chosen()
    assert (found.device.name, found.memory) == ("NVIDIA GeForce RTX 3060", 12e9)
    assert asker.asked == ["memory"]
    assert "RTX 3060, 12.00 GB" in told[0]
    assert chosen(memory="9.5GB")[0].memory == 9.5e9


def test_a_card_that_is_named_wins_over_the_one_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "device_here", lambda: DEVICES["3060"])
    assert chosen(card="4090")[0].device.name == "NVIDIA GeForce RTX 4090"
    assert chosen(card="RTX 4090")[0].memory == 24e9


def test_an_amount_of_memory_serves_and_none_means_the_processor() -> None:
    found, asker, _ = chosen(card="16 GB")
    assert (found.memory, found.device.is_timed) == (16e9, False)
    found, asker, _ = chosen(card="cpu")
    assert (found.memory, asker.asked) == (None, ["card"])


@pytest.mark.parametrize(
    ("answer", "told"), [("voodoo", "nothing is known about"), ("", "is needed"), ("0", "no amount")]
)
def test_a_card_that_nobody_knows_is_refused(answer: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        chosen(card=answer)
