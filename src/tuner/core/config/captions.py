"""``captions`` of a data source: where captions come from and what happens to them at each visit."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tuner.core.config.base import Count, CountOrZero, Section, Share, StepCount, is_int


class MetadataFields(Section):
    """A table of captions: a JSON object from image to entry, or JSON lines with one entry each."""

    path: str
    """The ``.json`` or ``.jsonl`` file."""
    caption_column: str = "caption"
    """Key of the caption inside an entry."""
    tags_column: str = "tags"
    """Key of tags that are appended to the caption after the separator; empty for none."""
    filename_column: str = "image_path"
    """Key of the image in JSON lines, relative to the source's folder, with or without extension."""


def _metadata(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Metadata = Annotated[MetadataFields, BeforeValidator(_metadata, json_schema_input_type=MetadataFields | str)]


class TagWarmup(Section):
    """The number of free tags grows linearly from ``from`` to all of them."""

    from_: CountOrZero = Field(1, alias="from")
    """Free tags kept at the first step."""
    steps: StepCount
    """Length of the growth in updates."""


class Replacement(Section):
    """One replacement in the finished caption."""

    find: str
    """Text, or regular expression, to look for."""
    with_: str = Field("", alias="with")
    """What to put in its place."""
    regex: bool = False
    """Read ``find`` as a regular expression."""


class VariantsFields(Section):
    """A fixed set of drawn captions per text, so that what is drawn at a visit can be cached."""

    count: Count
    """Number of drawn captions."""
    seed: int = 0
    """Seed of the draws; they depend on this and on the text, never on the run."""
    include_original: bool = True
    """Add the caption with all tags in their own order."""


def _variants(value: Any) -> Any:
    return {"count": value} if is_int(value) else value


Variants = Annotated[VariantsFields, BeforeValidator(_variants, json_schema_input_type=VariantsFields | Count)]


class CaptionsConfig(Section):
    """Captions of one source. The rules run at every visit, cached or not."""

    rule: Literal["tuner", "sd_scripts", "simpletuner"] = "tuner"
    """Exact behaviour of the pipeline: this program's, or that of another trainer."""
    from_: Literal["file", "filename", "metadata", "fixed"] = Field("file", alias="from")
    """Sidecar file, the image's file name, a metadata table, or one fixed text."""
    extension: str = ".txt"
    """Extension of sidecar files."""
    fallback: str | None = None
    """Caption of an image that has none."""
    fixed: str | None = None
    """The caption of every image, with ``from`` = ``fixed``."""
    metadata: Metadata | None = None
    """Table of captions, with ``from`` = ``metadata``."""
    prefix: str | None = None
    """Put before the caption, with one space."""
    suffix: str | None = None
    """Put after the caption, with one space."""
    separator: str = ","
    """Splits a caption into tags."""
    join: str = ", "
    """Joins tags again."""
    shuffle: bool = False
    """A new order of the free tags at each visit."""
    variants: Variants | None = None
    """Bounds shuffled or thinned captions to a fixed number per text, so that they can be cached. With rule
    ``simpletuner`` it is what shuffles."""
    keep_first: CountOrZero = 0
    """So many tags at the front are fixed: neither shuffled nor dropped."""
    fixed_marker: str | None = None
    """Marks the end of a fixed head and, when it comes twice, the start of a fixed tail."""
    group_separator: str | None = None
    """Glues tags into one unit; becomes the separator in the end."""
    wildcards: bool = False
    """``{a|b}`` picks one part at each visit."""
    lines: Literal["first", "random", "join"] = "first"
    """Which line of a caption with several lines."""
    tag_dropout: Share = 0.0
    """Chance of each free tag to be dropped."""
    dropout: Share = 0.0
    """Chance of the whole caption to become empty."""
    dropout_every_n_epochs: CountOrZero = 0
    """Every so many epochs all captions are empty; 0 never."""
    tag_warmup: TagWarmup | None = None
    """Fewer free tags at the start of training."""
    replace: tuple[Replacement, ...] = ()
    """Replacements in the finished caption, in order. A plain ``find`` of ``""`` replaces all of it."""
    allow_empty: bool = False
    """Take an existing but empty caption file as an empty caption instead of an error."""
    on_missing: Literal["error", "skip", "empty"] = "error"
    """An image without caption and fallback: stop, leave the image out and list it, or use an empty caption."""
