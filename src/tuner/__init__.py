"""Fine-tune text-to-image models. Names are imported when they are first used, so ``import tuner`` is cheap."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.core.config import ModelConfigBase as ModelConfigBase
    from tuner.core.errors import UsageError as UsageError
    from tuner.core.files import TensorInfo as TensorInfo
    from tuner.core.hooks import hookimpl as hookimpl
    from tuner.core.registry.door import open_model as open_model
    from tuner.core.rng import Rng as Rng
    from tuner.core.train.door import train as train
    from tuner.core.types import Ask as Ask
    from tuner.core.types import Batch as Batch
    from tuner.core.types import Blocks as Blocks
    from tuner.core.types import DtypeRules as DtypeRules
    from tuner.core.types import ExtensionPlugin as ExtensionPlugin
    from tuner.core.types import Field as Field
    from tuner.core.types import Item as Item
    from tuner.core.types import KeyFormat as KeyFormat
    from tuner.core.types import KeyMaps as KeyMaps
    from tuner.core.types import LoraRules as LoraRules
    from tuner.core.types import ModelFacts as ModelFacts
    from tuner.core.types import ModelPlugin as ModelPlugin
    from tuner.core.types import Models as Models
    from tuner.core.types import Network as Network
    from tuner.core.types import NoiseDefaults as NoiseDefaults
    from tuner.core.types import NoiseTarget as NoiseTarget
    from tuner.core.types import ParamGroup as ParamGroup
    from tuner.core.types import Placement as Placement
    from tuner.core.types import SampleDefaults as SampleDefaults
    from tuner.core.types import StoredFile as StoredFile
    from tuner.core.types import StoredTensor as StoredTensor
    from tuner.core.types import TextEmbeds as TextEmbeds
    from tuner.core.types import WeightMaps as WeightMaps

_TYPES = (
    "Ask",
    "Batch",
    "Blocks",
    "DtypeRules",
    "ExtensionPlugin",
    "Field",
    "Item",
    "KeyFormat",
    "KeyMaps",
    "LoraRules",
    "ModelFacts",
    "ModelPlugin",
    "Models",
    "Network",
    "NoiseDefaults",
    "NoiseTarget",
    "ParamGroup",
    "Placement",
    "SampleDefaults",
    "StoredFile",
    "StoredTensor",
    "TextEmbeds",
    "WeightMaps",
)
_HOME = dict.fromkeys(_TYPES, "tuner.core.types") | {
    "ModelConfigBase": "tuner.core.config",
    "Rng": "tuner.core.rng",
    "TensorInfo": "tuner.core.files",
    "UsageError": "tuner.core.errors",
    "hookimpl": "tuner.core.hooks",
    "open_model": "tuner.core.registry.door",
    "train": "tuner.core.train.door",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'tuner' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
