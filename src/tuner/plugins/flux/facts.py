"""What the core needs to know about a FLUX.1 or Chroma model: one record, made from the weight headers. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from tuner.core.compute.encoder_sizes import (
    clip_names,
    clip_sizes,
    encoder_kind,
    is_autoencoder,
    t5_names,
    t5_sizes,
)
from tuner.core.compute.part_costs import PUBLIC_CLIP_L, PUBLIC_T5, autoencoder_cost, clip_cost, t5_cost
from tuner.core.errors import UsageError
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

from . import sources
from .costs import PUBLIC, cost_rules
from .names import CLASSES, EMBEDDERS, FUSED
from .sizes import (
    LATENT_CHANNELS,
    TOKEN_CHANNELS,
    DenoiserSizes,
    bare_names,
    denoiser_sizes,
    diffusers_shapes,
    layout_of,
)

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.costs import PartCost
    from tuner.core.types import Header

T5_TOKENS = {"dev": 512, "schnell": 256, "chroma": 512}
CLIP_TOKENS = 77
ARCHITECTURES = {"dev": "flux-1-dev", "schnell": "flux-1-schnell", "chroma": "chroma"}
NOISE = {
    # At one megapixel this is the shift 3.1582 that dev is usually trained with, and it follows other sizes.
    "dev": NoiseDefaults(timesteps="flux_shift", shift=3.1582),
    "schnell": NoiseDefaults(timesteps="sigmoid", shift=1.0),
    "chroma": NoiseDefaults(timesteps="sigmoid", shift=1.0),
}
SAMPLES = {
    "dev": SampleDefaults(steps=20, cfg=1.0, shift="auto", size=(1024, 1024), multiple=16, guidance=3.5),
    "schnell": SampleDefaults(steps=4, cfg=1.0, shift=1.0, size=(1024, 1024), multiple=16),
    "chroma": SampleDefaults(steps=26, cfg=4.0, shift="auto", size=(1024, 1024), multiple=16),
}

_BLOCKS = r"(single_)?transformer_blocks\.\d+\."
_IMAGE = _BLOCKS + r"attn\.(to_[qkv]|to_out\.0)"
_CONTEXT = CLASSES["txt_attn"]
_ALL_FFS = (
    _IMAGE,
    _CONTEXT,
    r"transformer_blocks\.\d+\.ff(_context)?\..*",
    r"single_transformer_blocks\.\d+\.(proj_mlp|proj_out)",
    r"proj_out",
)
_MODULATIONS = _BLOCKS + r"(norm|norm1|norm1_context)\.linear"
TINY, NANO = (7, 20), (7,)
"""Single blocks that the two smallest presets train."""
TEXT = {"clip_l": r"text_model\.encoder\.layers\..*", "t5": r"encoder\.block\..*"}


_NO_CONTROL = "control networks are planned and not built yet"
WHOLE_ENCODER = "its file belongs to many models, and programs load it from there"
GROUPS = {
    "attn": (r"denoiser:.*transformer_blocks\.\d+\.attn\..*",),
    "mlp": (r"denoiser:transformer_blocks\.\d+\.ff(_context)?\..*",
            r"denoiser:single_transformer_blocks\.\d+\.proj_(mlp|out)\..*"),
    "mod": (r"denoiser:.*transformer_blocks\.\d+\.norm\w*\.linear\..*", r"denoiser:norm_out\..*"),
}  # fmt: skip
"""Parts of the denoiser that may have rates of their own in full training."""
CAPABILITIES = {"controlnet": _NO_CONTROL, "all+ffs+embedder+controlnet": _NO_CONTROL}


def lora_rules(sizes: DenoiserSizes) -> LoraRules:
    """What adapters may touch. Chroma has no modulation in its blocks, no embedders of time and text, and no CLIP.

    Presets are those of bghira/SimpleTuner and, as ``blocks``, the default of kohya-ss/sd-scripts; in each, encoders
    that train are adapted in full.
    """
    chroma = sizes.flavour == "chroma"
    text = {name: (pattern,) for name, pattern in TEXT.items() if name == "t5" or not chroma}
    every = tuple(pattern for patterns in text.values() for pattern in patterns)
    outside = "x_embedder|context_embedder|proj_out" if chroma else (
        r"x_embedder|context_embedder|time_text_embed\..*|norm_out\.linear|proj_out"
    )  # fmt: skip
    choices: dict[str, tuple[str, ...]] = {
        "blocks": (_BLOCKS + ".*",),
        "mmdit": (_IMAGE,),
        "context": (_CONTEXT,),
        "context+ffs": (_CONTEXT, CLASSES["txt_mlp"]),
        "all": (_IMAGE, _CONTEXT),
        "all+ffs": _ALL_FFS,
        "ai-toolkit": _ALL_FFS if chroma else (*_ALL_FFS, _MODULATIONS),
        "all+ffs+embedder": (*_ALL_FFS, "x_embedder"),
    }
    for name, blocks in (("tiny", TINY), ("nano", NANO)):
        if max(blocks) < sizes.singles:
            choices[name] = tuple(rf"single_transformer_blocks\.{block}\.proj_out" for block in blocks)
    absent = {"img_mod", "txt_mod", "single_mod", "time_in", "vector_in"} if chroma else set()
    if sizes.flavour != "dev":
        absent.add("guidance_in")
    return LoraRules(
        include={"denoiser": (_BLOCKS + ".*", outside), **text},
        exclude=(outside,),
        presets={name: ((*patterns, *every), ()) for name, patterns in choices.items()},
        groups={"double": "transformer_blocks", "single": "single_transformer_blocks"},
        fused=FUSED,
        kinds={name: pattern for name, pattern in {**CLASSES, **EMBEDDERS}.items() if name not in absent},
    )


def detect(header: Header) -> str | None:
    """``dev``, ``schnell`` or ``chroma`` for a file of this family in either layout, None for any other file."""
    if layout_of(bare_names(header)) is None:
        return None
    return denoiser_sizes(diffusers_shapes(header)).flavour


def recognise(header: Header) -> tuple[str, ...]:
    """Which keys of the ``model`` section a file may be given for, by its names; () for a file of no use here."""
    if is_autoencoder(header, LATENT_CHANNELS):
        return ("vae",)
    kind = encoder_kind(header)
    return () if kind is None else (f"text_encoders.{'clip_l' if kind == 'clip' else kind}",)


def facts(config: RunConfig, header: Header | None = None) -> ModelFacts:
    """What the core needs to know about the model of this run; sizes are read from the weight files.

    header: of the denoiser's weights; read from the file when left out. Raises UsageError when the files are not of
    this family, do not fit each other, or when the configuration disagrees with them.
    """
    found = sources.resolve(config)
    where = str(found.weights["denoiser"])
    sizes = denoiser_sizes(diffusers_shapes(header if header is not None else found.header("denoiser"), where), where)
    check_sizes(sizes, where)
    _check_config(config, sizes)
    encoders = tuple(name for name in ("clip_l", "t5") if name in found.weights)
    parts = _check_encoders(found, sizes)
    parts["vae"] = autoencoder_cost(found.header("vae"))
    files = {name: tuple(map(str, paths)) for name, paths in sources.files(config).items()}
    return _described(config, sizes, encoders, parts, files)


def public(config: RunConfig) -> ModelFacts:
    """The facts of a published model, with no file behind them; ``model.flavour`` says which."""
    flavour = config.model.flavour or "dev"
    sizes = PUBLIC[flavour]
    _check_config(config, sizes)
    parts = {"clip_l": clip_cost(PUBLIC_CLIP_L), "t5": t5_cost(PUBLIC_T5), "vae": autoencoder_cost()}
    encoders = ("t5",) if flavour == "chroma" else ("clip_l", "t5")
    return _described(config, sizes, encoders, {name: parts[name] for name in (*encoders, "vae")}, {})


def _described(
    config: RunConfig,
    sizes: DenoiserSizes,
    encoders: tuple[str, ...],
    parts: Mapping[str, PartCost],
    files: Mapping[str, tuple[str, ...]],
) -> ModelFacts:
    limits = {name: CLIP_TOKENS if name == "clip_l" else T5_TOKENS[sizes.flavour] for name in encoders}
    limits |= {name: count for name, count in config.text_encoder.max_tokens.items() if name in limits}
    return ModelFacts(
        family="flux",
        flavour=sizes.flavour,
        components=("denoiser", *encoders, "vae"),
        trainable=("denoiser", *encoders),
        text_components=encoders,
        latent_channels=LATENT_CHANNELS,
        spatial_factor=8,
        resolution_multiple=16,
        block_lists=block_lists(sizes),
        modulation=() if sizes.flavour == "chroma" else (_MODULATIONS,),
        # Chroma's approximator makes every modulation of the model: few weights, and all errors pass through them.
        no_quantize=(*OUTER_LAYERS, r"distilled_guidance_layer\..*") if sizes.flavour == "chroma" else OUTER_LAYERS,
        lora=lora_rules(sizes),
        key_maps="tuner.plugins.flux.names:MAPS",
        dtypes=DtypeRules(compute=("bfloat16", "float32"), vae="float32", text="bfloat16"),
        text_fields=text_fields(config, sizes, limits),
        max_tokens=limits,
        files=files,
        noise=NOISE[sizes.flavour],
        sample=SAMPLES[sizes.flavour],
        guidance_input=sizes.flavour == "dev",
        posterior="sample",
        padding_masks=("t5",),
        zero_padding=True,
        architecture=ARCHITECTURES[sizes.flavour],
        hides_keys=masks_t5(config, sizes.flavour),
        capabilities=CAPABILITIES | dict.fromkeys(("full.clip_l", "full.t5"), WHOLE_ENCODER),
        stored="tuner.plugins.flux.stored:stored",
        groups=GROUPS,
        costs=cost_rules(sizes, limits["t5"], parts),
    )


def block_lists(sizes: DenoiserSizes) -> tuple[Blocks, Blocks]:
    """Blocks of two streams, then blocks of one; in Chroma the latter are handed both sides as one sequence."""
    axes: dict[str, tuple[int, Literal["image", "text", "joint"]]] = {
        "hidden_states": (1, "image"),
        "encoder_hidden_states": (1, "text"),
        "image_rotary_emb": (1, "joint"),
    }
    single = dict(axes)
    if sizes.flavour == "chroma":
        del single["encoder_hidden_states"]
        single["hidden_states"] = (1, "joint")
    name = "attention_mask" if sizes.flavour == "chroma" else "joint_attention_kwargs.attention_mask"
    axes[name] = single[name] = (-1, "joint")
    return (
        Blocks(path="transformer_blocks", count=sizes.blocks, axes=axes),
        Blocks(path="single_transformer_blocks", count=sizes.singles, axes=single),
    )


def masks_t5(config: RunConfig, flavour: str) -> bool:
    """Whether the padding of T5 is hidden from the encoder and the denoiser; Chroma cannot work otherwise."""
    return config.text_encoder.mask_padding.get("t5", flavour == "chroma")


def text_fields(config: RunConfig, sizes: DenoiserSizes, limits: dict[str, int]) -> dict[str, Field]:
    """T5 rows with, where padding is hidden or zero, the mask that marks the rows worth storing; CLIP's pooled text."""
    masked = masks_t5(config, sizes.flavour)
    trim = "t5_mask" if masked or config.text_encoder.zero_padding else None
    # Zero rows are visible rows: they must be there in full number. Hidden rows need not be there at all.
    floor = None if masked or trim is None else limits["t5"]
    fields = {"t5": Field(shape=("L", sizes.text_width), of=("t5",), trim=trim, floor=floor)}
    if trim is not None:
        fields["t5_mask"] = Field(shape=("L",), dtype="bool", of=("t5",), trim=trim, floor=floor)
    if sizes.pooled_width is not None:
        fields["clip_pooled"] = Field(shape=(sizes.pooled_width,), of=("clip_l",))
    return fields


def check_sizes(sizes: DenoiserSizes, where: str) -> None:
    """Raise UsageError for variants whose input needs more than the image."""
    if sizes.in_channels != TOKEN_CHANNELS or sizes.out_channels != TOKEN_CHANNELS:
        raise UsageError("this variant reads more than the image", where=where,
                         why=f"its tokens have {sizes.in_channels} channels, those of an image {TOKEN_CHANNELS}",
                         fix="use dev, schnell or Chroma; Fill, Depth and Canny cannot train")  # fmt: skip


def _check_config(config: RunConfig, sizes: DenoiserSizes) -> None:
    if config.model.flavour not in (None, sizes.flavour):
        raise UsageError(f"these weights are not of flavour {config.model.flavour!r}", where="model.flavour",
                         why=f"they are {sizes.flavour!r}", fix="leave model.flavour out")  # fmt: skip
    if sizes.flavour == "chroma" and not masks_t5(config, sizes.flavour):
        raise UsageError("Chroma needs the mask of T5's padding", where="text_encoder.mask_padding.t5",
                         why="it was trained with it", fix="take the key out")  # fmt: skip
    if config.text_encoder.zero_padding and sizes.flavour != "chroma" and masks_t5(config, sizes.flavour):
        raise UsageError("text_encoder.zero_padding has no effect", where="text_encoder.zero_padding",
                         why="text_encoder.mask_padding.t5 hides the padding", fix="keep one of the two")  # fmt: skip
    limit = config.text_encoder.max_tokens.get("clip_l", CLIP_TOKENS)
    if limit > CLIP_TOKENS or limit < 2:
        raise UsageError(f"CLIP cannot take {limit} tokens", where="text_encoder.max_tokens.clip_l",
                         fix=f"use 2 to {CLIP_TOKENS}")  # fmt: skip


def _check_encoders(found: sources.Sources, sizes: DenoiserSizes) -> dict[str, PartCost]:
    """The costs of the text encoders. UsageError when an encoder's output is not what the denoiser reads."""
    widths, costs = {}, {}
    if "clip_l" in found.weights:
        header = found.header("clip_l")
        clip = clip_sizes(header.renamed(clip_names(header)), str(header.path))
        widths["clip_l"], costs["clip_l"] = (clip.width, sizes.pooled_width), clip_cost(clip)
    header = found.header("t5")
    t5 = t5_sizes(header.renamed(t5_names(header)), str(header.path))
    widths["t5"], costs["t5"] = (t5.width, sizes.text_width), t5_cost(t5)
    for name, (width, wanted) in widths.items():
        if width != wanted:
            raise UsageError(f"{name} and the denoiser do not fit each other", where=f"model.text_encoders.{name}.path",
                             why=f"the encoder makes {width} features, the denoiser reads {wanted}",
                             fix="use the text encoders that the model was made for")  # fmt: skip
    return costs
