"""``network``: what is added to the model and trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from tuner.core.config.base import CountOrZero, NotNegative, Positive, Section, Share

BlockRange = Annotated[str, StringConstraints(pattern=r"^\d+-\d+$")]


class NetworkRule(Section):
    """Settings for modules whose whole path matches; for each setting the first rule that gives it wins."""

    match: str
    """Regular expression that must match the whole module path inside the component, or the model's name for a kind of
    modules."""
    rank: CountOrZero | None = None
    """Rank of the matching modules; 0 leaves them out."""
    alpha: Positive | None = None
    """Alpha of the matching modules. Left out: ``network.alpha``, else their rank."""
    lr: NotNegative | None = None
    """Learning rate of the matching modules."""


class NetworkConfig(Section):
    """The adapter. Modules are chosen in this order: preset, targets, include and exclude, rules, blocks."""

    type: Literal["lora"] = "lora"
    """Kind of adapter."""
    rank: CountOrZero | Literal["from_file"] = 16
    """Rank; ``from_file`` takes ranks and alphas from ``init_from``."""
    alpha: Positive | None = None
    """The update is scaled by alpha / rank. Left out: the rank."""
    dropout: Share = 0.0
    """Dropout on the adapter's low-rank activation, between down and up."""
    rank_dropout: Share = 0.0
    """Share of rank components dropped, the rest scaled up."""
    module_dropout: Share = 0.0
    """Chance of a whole adapter to be skipped."""
    preset: str | None = None
    """Named choice of modules that the model offers."""
    targets: tuple[str, ...] | None = None
    """Regular expressions of module paths that replace the preset."""
    include: tuple[str, ...] = ()
    """Adds modules by regular expression; wins over every exclusion."""
    exclude: tuple[str, ...] = ()
    """Removes modules by regular expression."""
    rules: tuple[NetworkRule, ...] = ()
    """Rank, alpha and learning rate by module."""
    blocks: dict[str, Literal["all", "none"] | tuple[CountOrZero | BlockRange, ...]] = Field(default_factory=dict)
    """By block group: ``"all"``, ``"none"`` or a list of indices and ranges such as ``[0, "4-7"]``, counted from 0."""
    split_fused: bool = False
    """Separate adapters for projections that the model's files hold as one matrix. Off: one adapter spans them."""
    init_from: str | None = None
    """Adapter file to start from."""
