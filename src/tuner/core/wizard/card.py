"""The conversation about the graphics card: what is there, or what the user says there will be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

from tuner.core.errors import UsageError
from tuner.core.plan.devices import ANY_GPU, CPU, DEVICES, Device, device_here, device_like, device_named, parse_size
from tuner.core.track.progress import byte_size
from tuner.core.wizard.questions import Interview, Question


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """device: what is planned for. memory: bytes of it that a run may use, None without a card."""

    device: Device
    memory: float | None


def choose_card(interview: Interview) -> Card:
    """The card of this machine, else the one that the user names; and how much of it may be used."""
    insists = interview.asker.insists("card")
    device = None if insists else _card_here()
    if device is None:
        if not insists:
            interview.tell("no graphics card was found here")
        device = interview.ask(
            Question(
                id="card",
                text="Which card will it train on?",
                help=f"Its memory, such as 12GB, or its name, for times too: {', '.join(DEVICES)}. cpu for none.",
                read=_read_card,
            )
        )
    else:
        interview.tell(f"card: {device.name}, {byte_size(device.memory or 0)}")
    if device.memory is None:
        return Card(device=device, memory=None)
    memory = interview.ask(
        Question(
            id="memory",
            text="How much of its memory may the training use?",
            help="Less than all leaves room for a desktop or another program.",
            read=lambda raw: parse_size(str(raw), "memory"),
            default=f"{device.memory / 1e9:g}GB",
        )
    )
    return Card(device=replace(device, memory=memory), memory=memory)


def _read_card(raw: Any) -> Device:
    text = str(raw).strip()
    if not text:
        raise UsageError("a name or an amount of memory is needed")
    if text.lower() in (*DEVICES, CPU.name) or not text[0].isdigit():
        return device_named(text)
    return replace(ANY_GPU, memory=parse_size(text, "card"))


def _card_here() -> Device | None:
    """What the driver's tool tells, else torch; a torch without support for cards is not imported to be asked."""
    found = device_here()
    if found is not None or metadata.version("torch").endswith("+cpu"):
        return found
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return device_like(properties.name, float(properties.total_memory))
