"""``data``: sources of images, and sets that give them a geometry and a batch size.

Settings are inherited ``data.defaults`` -> set -> source, by key; the section that a run sees is resolved: every source
carries its complete settings and ``defaults`` is empty.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from tuner.core.config.base import Count, CountOrZero, Dtype, NotNegative, Positive, Section, is_int
from tuner.core.config.captions import CaptionsConfig


class BucketsConfig(Section):
    """Which sizes images are brought to."""

    enabled: bool = True
    """Off: every image is resized and cropped to exactly the resolution."""
    rule: Literal["sd_scripts", "simpletuner"] = "sd_scripts"
    """``sd_scripts``: a list of sizes below the area, the nearest ratio wins. ``simpletuner``: a size computed from the
    rounded ratio of each image."""
    step: Count = 64
    """Sides are multiples of this, itself a multiple of the model's granularity."""
    min: Count = 256
    """Shortest side of a bucket, rounded down to the step."""
    max: Count | None = None
    """Longest side of a bucket, rounded up to the step. Left out: twice the resolution's longer side."""
    upscale: bool = True
    """Enlarge images that are smaller than their bucket. Off: buckets are made from the images."""
    max_upscale: Positive | None = None
    """Leave out images that would be enlarged by more than this factor."""
    rounding: Annotated[int, Field(ge=1, le=9)] = 2
    """Decimals of the ratio, with rule ``simpletuner`` or ``resolution_mode`` = ``short_edge``."""


class CropConfig(Section):
    """Which part of an image is kept."""

    style: Literal["center", "random", "corner", "face"] = "center"
    """``random`` draws at each visit, so its latents cannot be cached. ``face`` reads ``_cx_cy_w_h`` at the end of the
    file name."""
    aspect: Literal["preserve", "square", "closest", "random"] = "preserve"
    """Shape of the crop with rule ``simpletuner`` or ``resolution_mode`` = ``short_edge``: the image's own, a square,
    the nearest of ``aspect_list``, or one of them that is drawn once for each image."""
    aspect_list: tuple[Positive, ...] = ()
    """Ratios (width / height) to choose from, with ``aspect`` = ``closest`` or ``random``; one that comes twice is
    drawn twice as often."""
    shrink_above: Count | None = None
    """Larger images are first resized to ``shrink_to``, so that less of them is kept; same unit as the resolution."""
    shrink_to: Count | None = None
    """The size that images above ``shrink_above`` are resized to before the crop."""
    face_range: tuple[Positive, Positive] | None = None
    """With ``face``: smallest and largest ratio of the shorter side to the face."""


class AugmentConfig(Section):
    """Random changes of the image."""

    flip: bool = False
    """Mirror with probability one half; both orientations are cached."""
    color: bool = False
    """Small random change of hue or gamma; its latents cannot be cached."""


class FiltersConfig(Section):
    """Images that are left out, and listed."""

    min_size: Count | None = None
    """Smallest size in pixels, read as ``resolution_mode`` says: edge of a square of equal area, or shorter side."""
    max_size: Count | None = None
    """Largest size, in the same unit."""
    min_aspect: Positive | None = None
    """Smallest width / height."""
    max_aspect: Positive | None = None
    """Largest width / height."""


class MaskFolder(Section):
    """Masks as image files of the same stem in another folder."""

    path: str
    """The folder."""


class SourceConfig(Section):
    """A folder of images with captions."""

    id: str = Field(min_length=1)
    """Stable name; unique among all sources. It appears in reports and keys random choices."""
    enabled: bool = True
    """False leaves this source out."""
    path: str
    """Folder of images."""
    recursive: bool = False
    """Look into subfolders as well."""
    repeats: Count = 1
    """How often each image comes in an epoch."""
    weight: Positive = 1.0
    """Relative chance with ``data.sampling`` = ``weighted`` or ``uniform``."""
    role: Literal["train", "regularisation", "preserve", "validation"] = "train"
    """``regularisation``: balanced to the training images, loss times ``data.regularisation_weight``; ``preserve``:
    trained towards what the model predicts without the adapter; ``validation``: held out."""
    limit: Count | None = None
    """Use a fixed random subset of so many images."""
    captions: CaptionsConfig = CaptionsConfig()
    """Caption settings."""
    mask: Literal["alpha"] | MaskFolder | None = None
    """Weights of the loss by pixel: the image's alpha channel, or files in a folder."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation."""
    filters: FiltersConfig = FiltersConfig()
    """Images to leave out."""


class InheritedConfig(Section):
    """Source settings that ``data.defaults`` and a set may give to their sources."""

    recursive: bool | None = None
    """See the source."""
    repeats: Count | None = None
    """See the source."""
    weight: Positive | None = None
    """See the source."""
    captions: CaptionsConfig | None = None
    """See the source."""
    mask: Literal["alpha"] | MaskFolder | None = None
    """See the source."""
    augment: AugmentConfig | None = None
    """See the source."""
    filters: FiltersConfig | None = None
    """See the source."""


Side = Annotated[int, Field(ge=16)]


def _sizes(value: Any) -> Any:
    entries = value if isinstance(value, list | tuple) else [value]
    return tuple((each, each) if is_int(each) else tuple(each) if isinstance(each, list) else each for each in entries)


Resolutions = Annotated[
    tuple[tuple[Side, Side], ...],
    Field(min_length=1),
    BeforeValidator(_sizes, json_schema_input_type=Side | list[Side | tuple[Side, Side]]),
]
"""1024; ``[1024, 768]`` is two resolutions; ``[[832, 1216]]`` is one of 832 x 1216."""


def _batch_sizes(value: Any) -> Any:
    return (value,) if is_int(value) else tuple(value) if isinstance(value, list) else value


BatchSizes = Annotated[
    tuple[Count, ...], Field(min_length=1), BeforeValidator(_batch_sizes, json_schema_input_type=Count | list[Count])
]

Resize = Literal["auto", "nearest", "bilinear", "bicubic", "lanczos", "area", "box"]


class SetConfig(InheritedConfig):
    """Geometry and batch size for one or more sources. Several resolutions make several sets of the same sources."""

    resolution: Resolutions = ((1024, 1024),)
    """Edge of a square with the target area, ``[width, height]`` pairs, or a list of either; stored as pairs."""
    resolution_mode: Literal["area", "short_edge", "fixed"] = "area"
    """What the resolution fixes: the area, the shorter side, or the exact size."""
    batch_size: BatchSizes | None = None
    """Images per micro-batch, one number or one per resolution; ``train.batch_size`` when left out."""
    buckets: BucketsConfig = BucketsConfig()
    """Sizes that images are brought to."""
    crop: CropConfig = CropConfig()
    """Which part is kept."""
    resize: Resize = "auto"
    """Resampling; ``auto`` is area for shrinking and Lanczos for enlarging."""
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """Folders of images."""

    @model_validator(mode="after")
    def _one_batch_size_each(self) -> SetConfig:
        sizes = self.batch_size
        if sizes is not None and len(sizes) not in (1, len(self.resolution)):
            raise ValueError(f"{len(sizes)} batch sizes for {len(self.resolution)} resolutions: give one, or one each")
        return self

    def tiers(self, batch_size: int = 1) -> tuple[tuple[tuple[int, int], int], ...]:
        """((width, height), batch size) of each resolution; ``batch_size`` is used where the set names none."""
        sizes = self.batch_size or (batch_size,)
        return tuple((size, sizes[min(i, len(sizes) - 1)]) for i, size in enumerate(self.resolution))


class DefaultsConfig(InheritedConfig):
    """Settings for all sets and sources that do not say otherwise."""

    resolution: Resolutions | None = None
    """See the set."""
    resolution_mode: Literal["area", "short_edge", "fixed"] | None = None
    """See the set."""
    batch_size: BatchSizes | None = None
    """See the set."""
    buckets: BucketsConfig | None = None
    """See the set."""
    crop: CropConfig | None = None
    """See the set."""
    resize: Resize | None = None
    """See the set."""


class WorkersConfig(Section):
    """Numbers of worker processes; 0 works in the main process."""

    scan: CountOrZero | None = None
    """For indexing images. Left out: the number of CPU cores."""
    cache: CountOrZero | None = None
    """For decoding and resizing while caching. Left out: the number of CPU cores."""
    load: CountOrZero = 2
    """For loading batches. These are threads: reading and decoding leave the interpreter free."""


class DataConfig(Section):
    """What to train on."""

    include: str | None = None
    """A file that holds this section in the same format; keys beside ``include`` win over the file's. Files of other
    programs are translated by ``tuner config import``."""
    defaults: DefaultsConfig | None = None
    """Settings for all sets and sources that do not say otherwise."""
    sets: tuple[SetConfig, ...] = Field(min_length=1)
    """Sets of sources."""
    regularisation_weight: NotNegative = 1.0
    """Factor on the loss of regularisation images."""
    sampling: Literal["epoch", "weighted", "uniform"] = "epoch"
    """``epoch``: every item once per epoch. ``weighted``: sources by weight times size. ``uniform``: by weight."""
    short_batches: Literal["keep", "drop", "fill"] = "keep"
    """What happens to the last, short batch of a bucket."""
    workers: WorkersConfig = WorkersConfig()
    """Worker processes."""
    prefetch: CountOrZero = 2
    """Batches prepared ahead per worker."""
    on_missing: Literal["error", "skip"] = "error"
    """A listed file that is not there: stop, or leave it out and list it."""
    on_corrupt: Literal["error", "skip"] = "error"
    """An image that cannot be read: stop, or leave it out and list it."""


class CacheConfig(Section):
    """The store of encoded images and captions."""

    dir: str = "cache"
    """Folder of the store; it may be shared between runs."""
    latents: Literal["off", "memory", "disk"] = "disk"
    """Where encoded images are kept; ``off`` encodes in every step."""
    text: Literal["off", "memory", "disk"] = "disk"
    """Where encoded captions are kept; ``off`` encodes in every step."""
    dtype: Dtype = "bf16"
    """Dtype of stored tensors."""
    vae_batch_size: Count = 1
    """Images per forward of the autoencoder."""
    text_batch_size: Count = 1
    """Captions per forward of the text encoder."""
    max_text_variants: Count = 32
    """A caption with more possible texts than this is not cached without ``captions.variants``."""
    verify: Literal["stat", "full"] = "stat"
    """Trust a source file whose size and time are unchanged, or hash every file again."""
