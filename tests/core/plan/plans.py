"""Plans of published models, of which no file has to be here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuner.core.config import RunConfig
from tuner.core.config.document import merged
from tuner.core.plan.devices import Device, device_named
from tuner.core.plan.plan import Plan, predict
from tuner.core.plan.prepare import prepare
from tuner.core.plan.work import Work
from tuner.core.types import ModelFacts

MODELS: Mapping[str, dict[str, Any]] = {
    "anima": {"family": "anima"},
    "flux": {"family": "flux", "flavour": "dev"},
    "sd35-medium": {"family": "sd3", "flavour": "3.5-medium"},
    "sd35-large": {"family": "sd3", "flavour": "3.5-large"},
}


def document(name: str, /, *, resolution: int = 1024, **sections: Any) -> dict[str, Any]:
    """A rank-16 LoRA at one resolution; ``sections`` win."""
    base = {
        "model": {**MODELS[name], "path": "/nowhere/weights.safetensors"},
        "data": {"sets": [{"resolution": resolution, "sources": [{"id": "pictures", "path": "/nowhere/pictures"}]}]},
        "network": {"rank": 16},
        "optimizer": {"lr": 1e-4},
        "train": {"steps": 1000},
        "checkpoint": {"dir": "/nowhere/run"},
    }
    return merged(base, sections)


def prepared(name: str, /, **sections: Any) -> tuple[RunConfig, ModelFacts, Work]:
    return prepare(document(name, **sections))


def planned(name: str, /, *, device: str | Device = "4090", **sections: Any) -> Plan:
    config, facts, work = prepared(name, **sections)
    return predict(config, facts, work, device_named(device) if isinstance(device, str) else device)
