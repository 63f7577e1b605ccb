"""What the core needs to know about an Anima model: one record, made from the weight files' headers. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from tuner.core.errors import Problems, UsageError
from tuner.core.types import (
    OUTER_LAYERS,
    Blocks,
    DtypeRules,
    Field,
    LoraRules,
    ModelFacts,
    NoiseDefaults,
    SampleDefaults,
)

from . import sources, vae_names
from .costs import PUBLIC, PUBLIC_ADAPTER, PUBLIC_ENCODER, VAE_BASE, VAE_PARAMETERS, cost_rules
from .keys import adapter_keys, denoiser_keys, encoder_keys, key_problems, vae_problems
from .names import adapter_modules, denoiser_modules, encoder_modules
from .sizes import (
    ADAPTER_PREFIX,
    OWN_PROBE,
    PICKLE_SUFFIXES,
    AdapterSizes,
    DenoiserSizes,
    EncoderSizes,
    adapter_names,
    adapter_sizes,
    denoiser_sizes,
    encoder_names,
    encoder_sizes,
    original_names,
)

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.files import TensorInfo
    from tuner.core.types import Header

CONTEXT_FLOOR = 512
"""The denoiser was trained on at least so many context rows; those without a token are zero and take part."""
MAX_TOKENS = {"qwen3": 512, "t5": 512}
COMPONENTS = ("denoiser", "llm_adapter", "qwen3", "vae")
TRAINABLE = ("denoiser", "llm_adapter", "qwen3")
LORA = LoraRules(
    include={
        "denoiser": (r"blocks\..*", r"x_embedder\..*", r"t_embedder\..*", r"final_layer\..*"),
        "llm_adapter": (r"blocks\..*",),
        "qwen3": (r"layers\..*",),
    },
    exclude=(r".*(_modulation|_norm|_embedder|final_layer).*",),
    presets={
        "default": ((r".*",), (r".*(_modulation|_norm|_embedder|final_layer).*",)),
        "attention": ((r".*(self|cross)_attn\.[^.]+",), ()),
        "mlp": ((r".*mlp\.[^.]+",), (r".*_modulation.*",)),
        "all": ((r".*",), ()),
    },
    groups={"blocks": "blocks"},
)


NO_QUANTIZE = (r"blocks\.\d+\.adaln_modulation_.*", r"(in|out)_proj")
"""The AdaLN matrices of all blocks are one product per step, which codes would take apart; they see one row per image.
The adapter's ends are its input and output."""
UNSCALED = "a cast without a scale loses small weights; this model is offered the scaled form alone"

FLAVOURS = {(2048, 28): "preview", (5120, 36): "large", (1280, 20): "small"}
"""Public sizes by width and depth."""


def detect(header: Header) -> str | None:
    """The flavour of a file of this family, None for any other file.

    ``preview`` for the public 28-block model, else the depth and width, so that derivatives get a name too.
    """
    found = original_names(header)
    # Renamed from diffusers' layout, other families have some of these names too.
    if not {"blocks.0.mlp.layer1.weight", OWN_PROBE} <= set(found):
        return None
    return flavour_of(denoiser_sizes({name: header[key] for name, key in found.items()}))


def recognise(header: Header) -> tuple[str, ...]:
    """Which keys of the ``model`` section a file may be given for, by its names; () for a file of no use here."""
    if "layers.0.self_attn.q_norm.weight" in encoder_names(header):
        return ("text_encoders.qwen3",)
    first = vae_names.names(header).get("encoder.conv1.weight")
    if first is not None and len(header[first].shape) == 5:
        # Other families' autoencoders have the same layers without the axis of time.
        return ("vae",)
    return ("llm_adapter",) if "out_proj.weight" in adapter_names(header) else ()


def flavour_of(sizes: DenoiserSizes) -> str:
    """The name of a public size, or depth x width."""
    return FLAVOURS.get((sizes.width, sizes.blocks), f"{sizes.blocks}x{sizes.width}")


def facts(config: RunConfig, header: Header | None = None) -> ModelFacts:
    """What the core needs to know about the model of this run; sizes are read from the weight files.

    header: of the denoiser's weights; read from the file when left out. Raises UsageError when the files are not of
    this family, do not fit each other, or when ``model.flavour`` disagrees with them.
    """
    found = sources.resolve(config)
    shapes = named_shapes(header if header is not None else found.header("denoiser"), original_names)
    denoiser = denoiser_sizes(shapes, str(found.denoiser))
    adapter = find_adapter(found, shapes)
    encoder = encoder_sizes(named_shapes(found.header("qwen3"), encoder_names), str(found.qwen3))
    check_fit(denoiser, adapter, encoder)
    check_whole(found, shapes, denoiser, adapter, encoder)
    _check_flavour(config, denoiser)
    files = {name: tuple(map(str, paths)) for name, paths in sources.files(config).items()}
    return _described(config, denoiser, adapter, encoder, _vae_size(found), files)


def public(config: RunConfig) -> ModelFacts:
    """The facts of the published model, with no file behind them. UsageError for a flavour that was never published."""
    flavour = config.model.flavour or "preview"
    if flavour not in PUBLIC:
        raise UsageError(f"no published model has the flavour {flavour!r}", where="model.flavour",
                         fix=f"use {' or '.join(map(repr, PUBLIC))}")  # fmt: skip
    return _described(config, PUBLIC[flavour], PUBLIC_ADAPTER, PUBLIC_ENCODER, (VAE_PARAMETERS, VAE_BASE), {})


def _described(
    config: RunConfig,
    denoiser: DenoiserSizes,
    adapter: AdapterSizes,
    encoder: EncoderSizes,
    vae: tuple[int, int],
    files: Mapping[str, tuple[str, ...]],
) -> ModelFacts:
    """vae: (parameters, width)."""
    flavour = flavour_of(denoiser)
    limits = dict(MAX_TOKENS)
    for name, count in config.text_encoder.max_tokens.items():
        if name not in limits:
            raise UsageError(f"no tokenizer {name!r}", where="text_encoder.max_tokens", fix="use qwen3 or t5")
        limits[name] = count
    _check_trainable(config.train.components)
    return ModelFacts(
        family="anima",
        flavour=flavour,
        components=COMPONENTS,
        trainable=TRAINABLE,
        text_components=("qwen3", "llm_adapter"),
        step_components=_step_components(config.train.components),
        latent_channels=denoiser.out_channels,
        spatial_factor=8,
        resolution_multiple=16,
        block_lists=(
            Blocks(
                path="blocks",
                count=denoiser.blocks,
                outside=(r"adaln_modulation_.*",),
                axes={"x": (1, "image"), "rope": (1, "image"), "context": (1, "text"), "context_bias": (0, "text")},
            ),
        ),
        lora=LORA,
        key_maps="tuner.plugins.anima.names:MAPS",
        dtypes=DtypeRules(compute=("bfloat16", "float32"), vae="float32", text="bfloat16"),
        text_fields=text_fields(config.train.components, adapter),
        max_tokens=limits,
        files=files,
        noise=NoiseDefaults(timesteps="sigmoid", shift=1.0),
        sample=SampleDefaults(steps=30, cfg=4.0, shift=3.0, size=(1024, 1024), multiple=16),
        no_quantize=(*OUTER_LAYERS, *NO_QUANTIZE),
        banded_latents=True,
        architecture=f"anima-{flavour}",
        capabilities={"quantize.fp8_unscaled": UNSCALED, "full.qwen3": WHOLE_ENCODER},
        stored="tuner.plugins.anima.stored:stored",
        groups=GROUPS,
        modules={
            "denoiser": denoiser_modules(denoiser.blocks),
            "llm_adapter": adapter_modules(adapter.layers),
            "qwen3": encoder_modules(encoder.layers),
        },
        costs=cost_rules(denoiser, adapter, encoder, CONTEXT_FLOOR, vae),
    )


def _vae_size(found: sources.Sources) -> tuple[int, int]:
    """(parameters as loaded, width) of the autoencoder; of a file without a header those of the published one."""
    if found.vae.suffix in PICKLE_SUFFIXES:
        return VAE_PARAMETERS, VAE_BASE
    shapes = {
        name: info.shape
        for name, info in named_shapes(found.header("vae"), vae_names.names).items()
        if not vae_names.UNUSED.fullmatch(name)
    }
    # One time slice of each 3-D kernel is kept.
    sizes = (math.prod(shape) // (shape[2] if len(shape) == 5 else 1) for shape in shapes.values())
    return sum(sizes), shapes["encoder.conv1.weight"][0]


GROUPS = {
    "self_attn": (r"denoiser:.*\.self_attn\..*",),
    "cross_attn": (r"denoiser:.*\.cross_attn\..*",),
    "mlp": (r"denoiser:.*\.mlp\..*",),
    "mod": (r"denoiser:.*\.adaln_modulation.*",),
}
"""Parts of the denoiser that may have rates of their own; the LLM adapter is a component."""
WHOLE_ENCODER = "no program loads an Anima text encoder of its own"


def named_shapes(header: Header, rule: Callable[[Iterable[str]], dict[str, str]]) -> dict[str, TensorInfo]:
    """The entries of a header under the names that ``rule`` gives them."""
    return {name: header[key] for name, key in rule(header).items()}


def find_adapter(found: sources.Sources, denoiser_shapes: Header) -> AdapterSizes:
    """Sizes of the adapter: from its own file when there is one, else from inside the denoiser's."""
    if found.llm_adapter is not None:
        return adapter_sizes(named_shapes(found.header("llm_adapter"), adapter_names), str(found.llm_adapter))
    inside = {
        name.removeprefix(ADAPTER_PREFIX): info
        for name, info in denoiser_shapes.items()
        if name.startswith(ADAPTER_PREFIX)
    }
    return adapter_sizes(inside, str(found.denoiser))


def check_fit(denoiser: DenoiserSizes, adapter: AdapterSizes, encoder: EncoderSizes) -> None:
    """Raise UsageError when the output of one part is not what the next part reads."""
    for what, width, reader, wanted, key in (
        ("the text encoder", encoder.width, "the adapter", adapter.source_width, "model.text_encoders.qwen3.path"),
        ("the adapter", adapter.out_width, "the denoiser", denoiser.text_width, "model.llm_adapter.path"),
    ):
        if width != wanted:
            raise UsageError(f"{what} and {reader} do not fit each other", where=key,
                             why=f"{what} makes {width} features, {reader} reads {wanted}",
                             fix="use files of the same model")  # fmt: skip


def check_whole(
    found: sources.Sources, shapes: Header, denoiser: DenoiserSizes, adapter: AdapterSizes, encoder: EncoderSizes
) -> None:
    """Raise one UsageError naming every tensor that a file lacks or should not have. ``shapes``: the denoiser's."""
    inside = [name.removeprefix(ADAPTER_PREFIX) for name in shapes if name.startswith(ADAPTER_PREFIX)]
    own = [name for name in shapes if not name.startswith(ADAPTER_PREFIX)]
    problems = Problems()
    problems.extend(key_problems(own, denoiser_keys(denoiser), str(found.denoiser)))
    if found.llm_adapter is not None:
        names = adapter_names(found.header("llm_adapter"))
        problems.extend(key_problems(names, adapter_keys(adapter), str(found.llm_adapter)))
    else:
        problems.extend(key_problems(inside, adapter_keys(adapter), str(found.denoiser), ADAPTER_PREFIX))
    problems.extend(key_problems(encoder_names(found.header("qwen3")), encoder_keys(encoder), str(found.qwen3)))
    if found.vae.suffix not in PICKLE_SUFFIXES:
        problems.extend(vae_problems(found.header("vae"), str(found.vae)))
    problems.raise_if_any()


def text_fields(training: Collection[str], adapter: AdapterSizes) -> dict[str, Field]:
    """What the text side hands over: the adapter's output, or what the adapter reads when it or the encoder trains."""
    if not {"qwen3", "llm_adapter"} & set(training):
        of = ("qwen3", "llm_adapter")
        mask = Field(shape=("L",), dtype="bool", of=of, trim="context_mask", floor=CONTEXT_FLOOR)
        context = Field(shape=("L", adapter.out_width), of=of, trim="context_mask", floor=CONTEXT_FLOOR)
        return {"context": context, "context_mask": mask}
    encoder = ("qwen3",)
    return {
        "qwen3": Field(shape=("L", adapter.source_width), of=encoder, trim="qwen3_mask"),
        "qwen3_mask": Field(shape=("L",), dtype="bool", of=encoder, trim="qwen3_mask"),
        "t5_ids": Field(shape=("L",), dtype="int64", of=encoder, trim="t5_mask"),
        "t5_mask": Field(shape=("L",), dtype="bool", of=encoder, trim="t5_mask"),
    }


def _step_components(training: Collection[str]) -> tuple[str, ...]:
    """The frozen adapter runs in every step when the encoder before it trains."""
    return ("llm_adapter",) if "qwen3" in training and "llm_adapter" not in training else ()


def _check_trainable(training: Collection[str]) -> None:
    for name in training:
        if name not in TRAINABLE:
            raise UsageError(f"{name!r} cannot train", where="train.components", fix=f"use {', '.join(TRAINABLE)}")


def _check_flavour(config: RunConfig, sizes: DenoiserSizes) -> None:
    flavour = flavour_of(sizes)
    if config.model.flavour not in (None, flavour):
        raise UsageError(f"these weights are not of flavour {config.model.flavour!r}", where="model.flavour",
                         why=f"{sizes.blocks} blocks of width {sizes.width} are {flavour!r}",
                         fix="leave model.flavour out")  # fmt: skip
