"""What the core needs to know about an SD3 model: one record, made from the weight files' headers. No torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from tuner.core.compute.encoder_sizes import (
    CLIP_PROBE,
    ClipSizes,
    T5Sizes,
    clip_names,
    clip_sizes,
    encoder_kind,
    is_autoencoder,
    t5_names,
    t5_sizes,
)
from tuner.core.compute.part_costs import (
    PUBLIC_CLIP_G,
    PUBLIC_CLIP_L,
    PUBLIC_T5,
    autoencoder_cost,
    clip_cost,
    t5_cost,
)
from tuner.core.errors import UsageError
from tuner.core.types import (
    Blocks,
    DtypeRules,
    Field,
    ModelFacts,
    NoiseDefaults,
    SampleDefaults,
)

from . import sources
from .costs import PUBLIC, VAE_FACTOR, cost_rules, public_sizes
from .names import lora_rules
from .sizes import DenoiserSizes, denoiser_sizes, flavour_of, looks_like_family

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.costs import PartCost
    from tuner.core.types import Header

    from .config import SD3Config

MAX_TOKENS = {"clip": 77, "t5": 256}
CHANNELS = 16
"""Latent channels of every public flavour."""
ARCHITECTURES = {
    "medium": "stable-diffusion-3-medium",
    "3.5-medium": "stable-diffusion-3-5-medium",
    "3.5-large": "stable-diffusion-3-5-large",
}
GUIDANCE = {"medium": 7.0, "3.5-medium": 4.5, "3.5-large": 4.5}
"""Classifier-free guidance that each flavour is usually rendered with."""


def detect(header: Header) -> str | None:
    """The flavour of a file of this family, None for any other file."""
    return flavour_of(denoiser_sizes(header)) if looks_like_family(header) else None


def recognise(header: Header) -> tuple[str, ...]:
    """Which keys of the ``model`` section a file may be given for, by its names; () for a file of no use here.

    The two CLIPs are told apart by their public widths; one of another width may be either.
    """
    if is_autoencoder(header, CHANNELS):
        return ("vae",)
    kind = encoder_kind(header)
    if kind != "clip":
        return () if kind is None else ("text_encoders.t5",)
    names = clip_names(header)
    width = header[names[CLIP_PROBE]].shape[-1]
    known = {PUBLIC_CLIP_L.width: ("clip_l",), PUBLIC_CLIP_G.width: ("clip_g",)}
    return tuple(f"text_encoders.{name}" for name in known.get(width, ("clip_l", "clip_g")))


def facts(config: RunConfig, header: Header | None = None) -> ModelFacts:
    """What the core needs to know about the model of this run; sizes are read from the weight files.

    header: of the denoiser's file; read when left out. Raises UsageError when the files are not of this family, do not
    fit each other, or when an option does not fit the flavour.
    """
    found = sources.resolve(config)
    denoiser = denoiser_sizes(header if header is not None else found.denoiser.header(), str(found.denoiser.path))
    flavour = flavour_of(denoiser)
    if config.model.flavour not in (None, flavour):
        raise UsageError(f"these weights are not of flavour {config.model.flavour!r}", where="model.flavour",
                         why=f"they are {flavour!r}", fix="leave model.flavour out")  # fmt: skip
    _check_options(config, flavour)
    clips = {name: _clip_sizes(found, name) for name in ("clip_l", "clip_g")}
    t5 = _t5_sizes(found)
    check_fit(denoiser, clips, t5.width if t5 else None)
    parts = {name: clip_cost(sizes) for name, sizes in clips.items()}
    if t5 is not None:
        parts["t5"] = t5_cost(t5)
    parts["vae"] = autoencoder_cost(found.vae.header())
    files = {name: tuple(map(str, paths)) for name, paths in sources.files(config).items()}
    return _described(config, denoiser, clips, parts, files)


def public(config: RunConfig) -> ModelFacts:
    """The facts of a published model with all text encoders and no file behind them; ``model.flavour`` says which."""
    flavour = config.model.flavour
    if flavour not in PUBLIC:
        what = "which published model?" if flavour is None else f"no published model has the flavour {flavour!r}"
        raise UsageError(what, where="model.flavour", fix=f"set it to {_or(tuple(PUBLIC))}")
    _check_options(config, flavour)
    clips = {"clip_l": PUBLIC_CLIP_L, "clip_g": PUBLIC_CLIP_G}
    parts = {name: clip_cost(sizes) for name, sizes in clips.items()}
    parts |= {"t5": t5_cost(PUBLIC_T5), "vae": autoencoder_cost()}
    return _described(config, public_sizes(flavour), clips, parts, {})


def _described(
    config: RunConfig,
    denoiser: DenoiserSizes,
    clips: Mapping[str, ClipSizes],
    parts: Mapping[str, PartCost],
    files: Mapping[str, tuple[str, ...]],
) -> ModelFacts:
    flavour = flavour_of(denoiser)
    names = tuple(name for name in parts if name != "vae")
    limits = _limits(config, "t5" in names)
    return ModelFacts(
        family="sd3",
        flavour=flavour,
        components=("denoiser", *names, "vae"),
        trainable=("denoiser", *names),
        text_components=names,
        latent_channels=denoiser.in_channels,
        spatial_factor=VAE_FACTOR,
        resolution_multiple=VAE_FACTOR * denoiser.patch,
        block_lists=(
            Blocks(
                path="transformer_blocks",
                count=denoiser.blocks,
                axes={"hidden_states": (1, "image"), "encoder_hidden_states": (1, "text")},
            ),
        ),
        modulation=(r"transformer_blocks\.\d+\.norm1(_context)?\.linear",),
        lora=lora_rules(dual=bool(denoiser.dual)),
        key_maps="tuner.plugins.sd3.names:MAPS",
        dtypes=DtypeRules(compute=("bfloat16", "float32"), vae="float32", text="bfloat16"),
        text_fields=text_fields(config, denoiser, clips, with_t5="t5" in names),
        max_tokens=limits,
        files=files,
        noise=NoiseDefaults(timesteps="logit_normal", shift=1.0, truncate=True),
        sample=SampleDefaults(
            steps=30, cfg=GUIDANCE[flavour], shift=3.0, size=(1024, 1024), multiple=16, schedule="table"
        ),
        posterior="sample",
        loss_target="clean",
        padding_masks=("clip", "t5") if "t5" in names else ("clip",),
        zero_padding="t5" in names,
        architecture=ARCHITECTURES[flavour],
        stored="tuner.plugins.sd3.stored:stored",
        groups=GROUPS,
        costs=cost_rules(denoiser, sum(limits.values()), parts),
    )


GROUPS = {
    "attn": (r"denoiser:transformer_blocks\.\d+\.attn2?\..*",),
    "mlp": (r"denoiser:transformer_blocks\.\d+\.ff(_context)?\..*",),
    "mod": (r"denoiser:transformer_blocks\.\d+\.norm1(_context)?\.linear\..*", r"denoiser:norm_out\..*"),
}
"""Parts of the denoiser that may have rates of their own in full training."""


def text_fields(
    config: RunConfig, denoiser: DenoiserSizes, clips: Mapping[str, ClipSizes], *, with_t5: bool
) -> dict[str, Field]:
    """What the text side hands over.

    The CLIPs are stored side by side, or apart when just one of them trains, so that the other can be cached.
    """
    tokens = MAX_TOKENS["clip"]
    widths = {name: sizes.width for name, sizes in clips.items()}
    pooled = {name: sizes.projection or sizes.width for name, sizes in clips.items()}
    fields: dict[str, Field] = {}
    if len(set(clips) & set(config.train.components)) == 1:
        for name in clips:
            fields[name] = Field(shape=(tokens, widths[name]), of=(name,))
            fields[f"pooled_{name}"] = Field(shape=(pooled[name],), of=(name,))
    else:
        both = tuple(clips)
        fields["clip_lg"] = Field(shape=(tokens, denoiser.text_width), of=both, parts=_ranges(widths))
        fields["pooled"] = Field(shape=(denoiser.pooled_width,), of=both, parts=_ranges(pooled))
    if with_t5:
        # Padding takes part in the denoiser, so only zeros may be left out of a cache, and they come back.
        mask = "t5_mask" if config.text_encoder.zero_padding else None
        length = _limits(config, with_t5)["t5"]
        fields["t5"] = Field(shape=("L", denoiser.text_width), of=("t5",), trim=mask, floor=length if mask else None)
        if mask is not None:
            fields[mask] = Field(shape=("L",), dtype="bool", of=("t5",), trim=mask, floor=length)
    return fields


def check_fit(denoiser: DenoiserSizes, clips: Mapping[str, ClipSizes], t5_width: int | None) -> None:
    """Raise UsageError when the outputs of the encoders are not what the denoiser reads."""
    width = sum(sizes.width for sizes in clips.values())
    pooled = sum(sizes.projection or sizes.width for sizes in clips.values())
    for what, made, read, where in (
        ("both CLIPs together", min(width, denoiser.text_width), width, "model.text_encoders.clip_g.path"),
        ("the pooled text of both CLIPs", pooled, denoiser.pooled_width, "model.text_encoders.clip_g.path"),
        ("T5", t5_width or denoiser.text_width, denoiser.text_width, "model.text_encoders.t5.path"),
    ):
        if made != read:
            raise UsageError("the text encoders and the denoiser do not fit each other", where=where,
                             why=f"{what} has a width of {made}, the denoiser reads {read}",
                             fix="use files of the same model")  # fmt: skip


def _ranges(widths: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    ranges, start = {}, 0
    for name, width in widths.items():
        ranges[name] = (start, start + width)
        start += width
    return ranges


def _clip_sizes(found: sources.Sources, name: str) -> ClipSizes:
    header = found.part(name).header()
    return clip_sizes(header.renamed(clip_names(header)), str(found.part(name).path))


def _t5_sizes(found: sources.Sources) -> T5Sizes | None:
    if "t5" not in found.encoders:
        return None
    header = found.part("t5").header()
    return t5_sizes(header.renamed(t5_names(header)), str(found.part("t5").path))


def _limits(config: RunConfig, with_t5: bool) -> dict[str, int]:
    limits = {name: count for name, count in MAX_TOKENS.items() if with_t5 or name != "t5"}
    for name, count in config.text_encoder.max_tokens.items():
        if name not in limits:
            raise UsageError(f"no tokenizer {name!r}", where="text_encoder.max_tokens", fix=f"use {_or(limits)}")
        if count < 2 or (name == "clip" and count > MAX_TOKENS[name]):
            raise UsageError(f"{count} tokens are not possible for {name}", where=f"text_encoder.max_tokens.{name}",
                             fix="choose 2 to 77 for clip, 2 or more for t5")  # fmt: skip
        limits[name] = count
    return limits


def _check_options(config: RunConfig, flavour: str) -> None:
    model: SD3Config = config.model  # type: ignore[assignment]
    for name in ("scaled_pos_embed", "pos_embed_random_crop"):
        if getattr(model, name) and flavour != "3.5-medium":
            raise UsageError(f"model.{name} is for 3.5 medium", where=f"model.{name}",
                             why=f"these weights are {flavour}, which was trained with the centre of its table",
                             fix="take it out")  # fmt: skip


def _or(names: Collection[str]) -> str:
    return " or ".join(names)
