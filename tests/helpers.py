"""Small helpers that every test module may use."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> Any:
    """Parity data by path below tests/golden: tensors of a safetensors file, or the content of a JSON file."""
    path = GOLDEN / name
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    from safetensors.torch import load_file

    return load_file(path)


def golden_path(name: str) -> Path:
    """Path of a file below tests/golden."""
    return GOLDEN / name


def delta_weight(tensors: Any, key: str) -> Any:
    """alpha / rank * up down of one module of an adapter's internal tensors, [out, in] float32."""
    import torch

    from tuner.core.adapters.deltas import merged_weight

    parts = {part: tensors[f"{key}.{part}"] for part in ("down", "up", "alpha")}
    return merged_weight(torch.zeros(parts["up"].shape[0], parts["down"][0].numel()), parts)


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every connection an error, and let the hub's client try: its offline switch would hide an attempt."""

    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError(f"a connection was opened: {arguments[1:]}")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
