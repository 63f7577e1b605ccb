"""Configuration: schema, loading, defaults."""

from __future__ import annotations

from tuner.core.config.attention import AttentionConfig
from tuner.core.config.base import Dtype, EveryFields, Section, StepCount, steps_of
from tuner.core.config.build import build_config, examine_config, run_schema
from tuner.core.config.captions import CaptionsConfig, MetadataFields, Replacement, TagWarmup
from tuner.core.config.data import (
    AugmentConfig,
    BucketsConfig,
    CacheConfig,
    CropConfig,
    DataConfig,
    FiltersConfig,
    MaskFolder,
    SetConfig,
    SourceConfig,
    WorkersConfig,
)
from tuner.core.config.defaults import facts_problems, resolve_defaults, resolved_text
from tuner.core.config.document import RawConfig
from tuner.core.config.ema import EmaConfig
from tuner.core.config.load import load_config
from tuner.core.config.model import ComponentSource, ModelConfigBase
from tuner.core.config.network import NetworkConfig, NetworkRule
from tuner.core.config.objective import (
    GuidanceConfig,
    GuidanceDistill,
    InputPerturbation,
    LossConfig,
    LossMask,
    NoiseConfig,
    NoiseOffset,
)
from tuner.core.config.optimizer import LoraPlus, LrRule, OptimizerConfig, ScheduleConfig, SchedulePiece
from tuner.core.config.outputs import CheckpointConfig, LogConfig, MetadataConfig, SampleConfig, ValidateConfig
from tuner.core.config.quantize import ParityConfig, QuantizeConfig
from tuner.core.config.run import RunConfig
from tuner.core.config.speed import CompileConfig
from tuner.core.config.text import LatentsConfig, TextEncoderConfig
from tuner.core.config.train import ClipGrad, MemoryConfig, PrecisionConfig, TrainConfig

__all__ = [
    "AttentionConfig",
    "AugmentConfig",
    "BucketsConfig",
    "CacheConfig",
    "CaptionsConfig",
    "CheckpointConfig",
    "ClipGrad",
    "CompileConfig",
    "ComponentSource",
    "CropConfig",
    "DataConfig",
    "Dtype",
    "EmaConfig",
    "EveryFields",
    "FiltersConfig",
    "GuidanceConfig",
    "GuidanceDistill",
    "InputPerturbation",
    "LatentsConfig",
    "LogConfig",
    "LoraPlus",
    "LossConfig",
    "LossMask",
    "LrRule",
    "MaskFolder",
    "MemoryConfig",
    "MetadataConfig",
    "MetadataFields",
    "ModelConfigBase",
    "NetworkConfig",
    "NetworkRule",
    "NoiseConfig",
    "NoiseOffset",
    "OptimizerConfig",
    "ParityConfig",
    "PrecisionConfig",
    "QuantizeConfig",
    "RawConfig",
    "Replacement",
    "RunConfig",
    "SampleConfig",
    "ScheduleConfig",
    "SchedulePiece",
    "Section",
    "SetConfig",
    "SourceConfig",
    "StepCount",
    "TagWarmup",
    "TextEncoderConfig",
    "TrainConfig",
    "ValidateConfig",
    "WorkersConfig",
    "build_config",
    "examine_config",
    "facts_problems",
    "load_config",
    "resolve_defaults",
    "resolved_text",
    "run_schema",
    "steps_of",
]
