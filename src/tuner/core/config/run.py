"""The whole configuration of a run."""

from __future__ import annotations

from pydantic import Field, SerializeAsAny

from tuner.core.config.attention import AttentionConfig
from tuner.core.config.base import Section
from tuner.core.config.data import CacheConfig, DataConfig
from tuner.core.config.ema import EmaConfig
from tuner.core.config.model import ModelConfigBase
from tuner.core.config.network import NetworkConfig
from tuner.core.config.objective import GuidanceConfig, LossConfig, NoiseConfig
from tuner.core.config.optimizer import OptimizerConfig, ScheduleConfig
from tuner.core.config.outputs import CheckpointConfig, LogConfig, SampleConfig, ValidateConfig
from tuner.core.config.quantize import QuantizeConfig
from tuner.core.config.speed import CompileConfig
from tuner.core.config.text import LatentsConfig, TextEncoderConfig
from tuner.core.config.train import MemoryConfig, PrecisionConfig, TrainConfig


class RunConfig(Section):
    """One JSON document; attributes have the names of its keys, except ``validation`` for ``validate``."""

    model: SerializeAsAny[ModelConfigBase]
    """Which weights; the model plugin adds keys."""
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    """How captions are encoded."""
    latents: LatentsConfig = LatentsConfig()
    """How pixels are encoded."""
    data: DataConfig
    """What to train on."""
    cache: CacheConfig = CacheConfig()
    """Store of encoded images and captions."""
    noise: NoiseConfig = NoiseConfig()
    """Which noise levels are trained."""
    loss: LossConfig = LossConfig()
    """How the error becomes a number."""
    guidance: GuidanceConfig = GuidanceConfig()
    """Guidance as an input of the model, and as part of the training target."""
    network: NetworkConfig = NetworkConfig()
    """The adapter."""
    optimizer: OptimizerConfig
    """The optimizer and its rates."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning-rate schedule."""
    train: TrainConfig
    """What trains and for how long."""
    precision: PrecisionConfig = PrecisionConfig()
    """Dtypes."""
    quantize: QuantizeConfig = QuantizeConfig()
    """Frozen weights in few bits."""
    memory: MemoryConfig = MemoryConfig()
    """Trading time for memory."""
    attention: AttentionConfig = AttentionConfig()
    """The attention kernel."""
    compile: CompileConfig = CompileConfig()
    """Compiled blocks."""
    ema: EmaConfig = EmaConfig()
    """A running average of what trains."""
    checkpoint: CheckpointConfig
    """What is saved, and where."""
    sample: SampleConfig = SampleConfig()
    """Pictures made during training."""
    validation: ValidateConfig = Field(ValidateConfig(), alias="validate")
    """Loss on held-out images."""
    log: LogConfig = LogConfig()
    """Logging."""
    extensions: tuple[str, ...] = ()
    """Extension plugins that take part in the run, outermost first."""
