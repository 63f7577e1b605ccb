"""``network``: what is added to the model and trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints

from tuner.core.config.base import Count, CountOrZero, NotNegative, Positive, Section, Share, changed_keys


def _factor(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError("must be 1 or more, or -1")
    return value


AdapterKind = Literal["lora", "dora", "loha", "lokr", "oft", "boft", "ia3", "full"]
Factor = Annotated[int, AfterValidator(_factor)]
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
    factor: Factor | None = None
    """``network.factor`` of the matching modules."""
    block_size: Count | None = None
    """``network.block_size`` of the matching modules."""
    constraint: NotNegative | None = None
    """``network.constraint`` of the matching modules."""
    on_input: bool | None = None
    """``network.on_input`` of the matching modules."""


class NetworkConfig(Section):
    """The adapter. Modules are chosen in this order: preset, targets, include and exclude, rules, blocks."""

    type: AdapterKind = "lora"
    """Kind of adapter: low-rank factors (``lora``), those and the lengths of the rows (``dora``), products of factors
    (``loha``, ``lokr``), rotations (``oft``, ``boft``), one factor per channel (``ia3``), or the whole change of the
    weights (``full``)."""
    rank: CountOrZero | Literal["from_file"] = 16
    """Rank; ``from_file`` takes ranks, alphas and all other sizes from ``init_from``. Kinds without a rank only know
    ``from_file``."""
    alpha: Positive | None = None
    """The update is scaled by alpha / rank. Left out: the rank."""
    factor: Factor = -1
    """``lokr``: size of the smaller matrix, where it divides the sizes of the weight; -1 makes both about equal."""
    full_matrix: bool = False
    """``lokr``: no low-rank factors at all; there is no rank and no alpha then."""
    decompose_both: bool = False
    """``lokr``: low-rank factors of the smaller matrix too, where that saves anything."""
    block_size: Count = 32
    """``oft``, ``boft``: rows that are rotated together. Where it does not divide the rows of a weight, the next
    smaller size that does."""
    block_count: Count | None = None
    """``oft``: number of blocks of every weight, in place of ``block_size``; it must divide the rows of each."""
    constraint: NotNegative = 0.0
    """``oft``, ``boft``: limit on the rotation of a weight, times its rows; 0 is none, or that of the file with rank
    ``from_file``. 1e-4 to 1e-2 are usual."""
    on_input: bool = False
    """``ia3``: scale the inputs of modules instead of their outputs."""
    train_norms: bool = False
    """Train the weights of the norms in the adapted components too."""
    dropout: Share = 0.0
    """Dropout on the adapter's low-rank activation, between down and up."""
    rank_dropout: Share = 0.0
    """Share of rank components dropped, the rest scaled up."""
    module_dropout: Share = 0.0
    """Chance of a whole adapter to be skipped."""
    max_norm: Positive | None = None
    """``lora``: after every update, factors of a module whose whole change of the weight is larger than this (Frobenius
    norm, alpha / rank included) are scaled down to it. Left out: no limit."""
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
    init: Literal["default", "gaussian", "pissa", "olora", "loftq"] = "default"
    """``lora``: the start. ``default``: Kaiming's uniform draw for the down matrix, ``gaussian``: a normal one with
    deviation 1 / rank; the up matrix is zero. ``pissa``: the principal directions of the weight, ``olora``: the first
    factors of its QR decomposition; the base keeps the rest. ``loftq``: the principal directions of what ``quantize``
    takes away."""
    init_norm: Positive | None = None
    """``lokr`` with ``full_matrix``: start a little off the base model. The small matrix is all ones, the larger one
    has mean and deviation of the weight, times this; 1e-3 is usual. Left out: start as the base model."""
    init_from: str | None = None
    """Adapter file to start from."""


LOW_RANK = ("lora", "dora")
SPLITTING = ("pissa", "olora", "loftq")
"""Values of ``init`` that start as a part of the weight."""
KEYS_OF_KINDS: Mapping[str, tuple[str, ...]] = {
    "rank": ("lora", "dora", "loha", "lokr"),
    "alpha": ("lora", "dora", "loha", "lokr"),
    "dropout": LOW_RANK,
    "rank_dropout": LOW_RANK,
    "split_fused": LOW_RANK,
    "max_norm": ("lora",),
    "init": ("lora",),
    "factor": ("lokr",),
    "full_matrix": ("lokr",),
    "init_norm": ("lokr",),
    "decompose_both": ("lokr",),
    "block_size": ("oft", "boft"),
    "block_count": ("oft",),
    "constraint": ("oft", "boft"),
    "on_input": ("ia3",),
}
"""Keys of the section that only some kinds read, and those kinds."""


def kinds_of(network: NetworkConfig) -> tuple[str, ...]:
    """The kinds of adapters in a network: its own, and ``norms`` where those train too."""
    return (network.type, "norms") if network.train_norms else (network.type,)


def has_rank(network: NetworkConfig) -> bool:
    """Whether ``rank`` and ``alpha`` mean anything for this adapter."""
    return network.type in KEYS_OF_KINDS["rank"] and not network.full_matrix


def kind_problems(network: NetworkConfig) -> Iterator[tuple[tuple[str | int, ...], str, str | None]]:
    """Keys that this kind of adapter does not read, as (place, what, fix)."""
    kind = network.type
    changed = changed_keys(network)
    for key, kinds in KEYS_OF_KINDS.items():
        if key in changed and kind not in kinds and not (key == "rank" and network.rank in (0, "from_file")):
            yield (
                ("network", key),
                f"has no effect with network.type {kind!r}, only with {_listed(kinds)}",
                "take it out",
            )
    if network.full_matrix:
        for key in ("rank", "alpha", "decompose_both"):
            if key in changed and network.rank != "from_file":
                yield ("network", key), "has no effect with network.full_matrix", "take one of the two out"
    elif network.init_norm is not None and kind == "lokr":
        yield ("network", "init_norm"), "needs whole matrices", 'add "full_matrix": true'
    if network.init_norm is not None and network.init_from is not None:
        yield ("network", "init_norm"), "has no effect: every value comes from network.init_from", "take one out"
    if network.block_count is not None and "block_size" in changed:
        yield ("network", "block_size"), "is replaced by network.block_count", "keep one of the two"
    if network.rank == "from_file":
        for key in ("factor", "full_matrix", "decompose_both", "block_size", "block_count", "on_input"):
            if key in changed:
                yield ("network", key), "comes from the file with network.rank 'from_file'", "take it out"
    for number, rule in enumerate(network.rules):
        for key in sorted(changed_keys(rule) - {"match", "lr"}):
            place = ("network", "rules", number, key)
            kinds = KEYS_OF_KINDS[key]
            if network.rank == "from_file":
                yield place, "comes from the file with network.rank 'from_file'", "take it out"
            elif kind not in kinds and not (key == "rank" and rule.rank == 0):
                yield place, f"has no effect with network.type {kind!r}, only with {_listed(kinds)}", "take it out"
            elif key in ("rank", "alpha") and network.full_matrix and rule.rank != 0:
                yield place, "has no effect with network.full_matrix", "take it out"
            elif key == "block_size" and network.block_count is not None:
                yield place, "is replaced by network.block_count", "keep one of the two"


def _listed(kinds: tuple[str, ...]) -> str:
    return ", ".join(repr(kind) for kind in kinds)
