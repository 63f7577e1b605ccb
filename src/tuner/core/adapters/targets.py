"""Which modules get an adapter, and with what rank, alpha and learning rate.

Order: preset, `targets` replaces it, `include` and `exclude` edit it, rules set values, `blocks` cuts last. All
patterns are regular expressions that must match a whole module path, written inside its component
(`blocks.0.mlp.layer1`) or with the component in front (`denoiser.blocks.0.mlp.layer1`). A pattern that matches nothing
is an error.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from tuner.core.adapters.members import Member, member_of
from tuner.core.config.network import LOW_RANK
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.config import NetworkConfig, NetworkRule
    from tuner.core.types import Fused, LoraRules, ModelFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Settings of kinds that are no low-rank factors, as `NetworkConfig` explains them."""

    factor: int = -1
    full_matrix: bool = False
    decompose_both: bool = False
    block_size: int = 32
    block_count: int | None = None
    constraint: float = 0.0
    on_input: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One module to adapt. `lr` None: the component's rate. `group`: the pattern of the rule that set `lr`.

    members: the linears of one input that share the adapter, in the order of the rows of its up matrix; `path` is then
    a name for all of them. Empty: the linear `path` alone.
    """

    component: str
    path: str
    rank: int
    alpha: float
    lr: float | None = None
    group: str | None = None
    members: tuple[str, ...] = ()
    kind: str = "lora"
    options: Options = Options()

    @property
    def paths(self) -> tuple[str, ...]:
        """The linears that the adapter belongs to."""
        return self.members or (self.path,)

    @property
    def key(self) -> str:
        return f"{self.component}:{self.path}"


def select_targets(paths: Mapping[str, Sequence[str]], network: NetworkConfig, facts: ModelFacts) -> tuple[Target, ...]:
    """The targets among `paths` (component to the paths of all its linears), in order.

    Raises UsageError for a pattern that matches nothing, an unknown preset or block group, and an empty result.
    """
    allowed = {
        component: [path for path in listed if _any_match(facts.lora.include.get(component, ()), path)]
        for component, listed in paths.items()
    }
    every = [(component, path) for component, listed in allowed.items() for path in listed]
    if not every:
        raise UsageError(
            "the model offers no module for an adapter",
            where="train.components",
            why=f"nothing adaptable in {', '.join(paths)}",
            fix=f"train one of: {', '.join(facts.lora.include)}",
        )
    chosen = _edited(every, network, facts.lora)
    inside = _inside_blocks(chosen, network, facts)
    chosen = [each for each in chosen if each in inside]
    if network.rank == "from_file":
        raise ValueError("rank from_file has no patterns to select by")
    targets = _with_rules(chosen, every, network, network.rank)
    if not targets:
        rankless = network.rank == 0 and not any(rule.rank for rule in network.rules)
        raise UsageError(
            "no module gets an adapter",
            where="network.rank" if rankless else "network",
            why="the rank is 0" if rankless else "the patterns and blocks leave nothing",
            fix="set network.rank to 1 or more" if rankless else "widen network.targets, exclude, rules or blocks",
        )
    for component in paths:
        if not any(target.component == component for target in targets):
            raise UsageError(
                f"component {component} trains, yet none of its modules gets an adapter",
                where="network",
                why=f"{len(allowed[component])} of its modules could have one",
                fix=f"include some of them, or take {component} out of train.components",
            )
    shared = network.type in LOW_RANK and not network.split_fused
    return join_fused(targets, facts.lora.fused) if shared else targets


def join_fused(
    targets: Sequence[Target],
    rules: Sequence[Fused],
    together: Callable[[Target, Target], bool] = lambda first, other: True,
) -> tuple[Target, ...]:
    """One target for the members of a group that have equal settings (and are `together` with the first of them)."""
    joined: dict[int, list[tuple[Member, Target]]] = {}
    found: list[Target] = []
    open_groups: dict[tuple[object, ...], list[int]] = {}
    for target in targets:
        member = member_of(rules, target.path)
        settings = (target.component, target.rank, target.alpha, target.lr, target.group)
        key = (member.parent, member.rule, settings) if member else None
        place = (
            next((each for each in open_groups.get(key, ()) if together(found[each], target)), None) if key else None
        )
        if member is None or place is None:
            place = len(found)
            found.append(target)
            if key:
                open_groups.setdefault(key, []).append(place)
        if member is not None:
            joined.setdefault(place, []).append((member, target))
    for place, members in joined.items():
        if len(members) > 1:
            inside = sorted(members, key=lambda each: each[0].index)
            names = "+".join(member.rule.members[member.index] for member, _ in inside)
            found[place] = replace(
                found[place],
                path=f"{inside[0][0].parent}.{names}",
                members=tuple(target.path for _, target in inside),
            )
    return tuple(found)


def check_targets(network: NetworkConfig, components: Iterable[str], facts: ModelFacts) -> tuple[Target, ...]:
    """What `select_targets` gives or raises, where the modules are known before any weight is read; () elsewhere."""
    paths = {component: known_modules(facts, component) for component in components}
    if network.rank == "from_file" or not all(paths.values()):
        return ()
    return select_targets(paths, network, facts)


def known_modules(facts: ModelFacts, component: str) -> tuple[str, ...]:
    """Paths of the modules that may be adapted, as far as the plugin tells them: from headers, or with its costs."""
    if facts.modules.get(component) or facts.costs is None:
        return facts.modules.get(component, ())
    if component == "denoiser":
        return tuple(facts.costs.layers())
    part = facts.costs.parts.get(component)
    return () if part is None else tuple(part.layers)


def norm_targets(paths: Mapping[str, Sequence[str]], network: NetworkConfig, facts: ModelFacts) -> tuple[Target, ...]:
    """The norms among ``paths`` that train: those inside ``network.blocks`` that nothing excludes.

    UsageError when the components have none that a file could hold.
    """
    every = [(component, path) for component, listed in paths.items() for path in listed]
    inside = _inside_blocks(every, network, facts)
    targets = []
    for component, path in every:
        if (component, path) in inside and not _matches(network.exclude, component, path):
            rules = rules_for(component, path, network.rules)
            lr, group = rate_of(rules)
            targets.append(Target(component=component, path=path, rank=0, alpha=0.0, lr=lr, group=group, kind="norms"))
    if paths and not targets:
        raise UsageError(
            "the trained components have no norm with a weight",
            where="network.train_norms",
            fix="take it out",
        )
    return tuple(targets)


def _edited(every: Sequence[tuple[str, str]], network: NetworkConfig, lora: LoraRules) -> list[tuple[str, str]]:
    if network.targets is not None:
        _require_matches(network.targets, every, "network.targets")
        exclude: tuple[str, ...] = ()
        chosen = {each for each in every if _matches(network.targets, *each)}
    else:
        wanted, exclude = _preset(network.preset, lora)
        chosen = {each for each in every if wanted is None or _any_match(wanted, each[1])}
    _require_matches(network.include, every, "network.include")
    _require_matches(network.exclude, every, "network.exclude")
    kept = []
    for component, path in every:
        dropped = _any_match(exclude, path) or _matches(network.exclude, component, path)
        if _matches(network.include, component, path) or ((component, path) in chosen and not dropped):
            kept.append((component, path))
    return kept


def _preset(name: str | None, lora: LoraRules) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    if name is None:
        return None, lora.exclude
    if name not in lora.presets:
        raise UsageError(
            f"unknown preset {name!r}",
            where="network.preset",
            why=_near(name, lora.presets),
            fix=f"use one of: {', '.join(lora.presets)}" if lora.presets else "leave network.preset out",
        )
    return lora.presets[name]


def _with_rules(
    chosen: Sequence[tuple[str, str]], every: Sequence[tuple[str, str]], network: NetworkConfig, rank: int
) -> tuple[Target, ...]:
    _require_matches([rule.match for rule in network.rules], every, "network.rules")
    for rule in network.rules:
        if not any(_matches((rule.match,), *each) for each in chosen):
            raise UsageError(
                f"the rule for {rule.match!r} has no effect",
                where="network.rules",
                why="it matches only modules that get no adapter",
                fix="add the pattern to network.include, or remove the rule",
            )
    targets = []
    for component, path in chosen:
        rules = [rule for rule in network.rules if _matches((rule.match,), component, path)]
        own_rank = next((rule.rank for rule in rules if rule.rank is not None), rank)
        if own_rank == 0:
            continue
        alpha = next((rule.alpha for rule in rules if rule.alpha is not None), network.alpha)
        lr, group = rate_of(rules)
        targets.append(
            Target(
                component=component,
                path=path,
                rank=own_rank,
                alpha=alpha or own_rank,
                lr=lr,
                group=group,
                kind=network.type,
                options=_options(network, rules),
            )
        )
    return tuple(targets)


def _options(network: NetworkConfig, rules: Sequence[NetworkRule]) -> Options:
    """The settings of one module: for each, the first rule that gives it, else the section's."""
    values = {each.name: getattr(network, each.name) for each in fields(Options)}
    for rule in reversed(rules):
        given = {name: getattr(rule, name, None) for name in values}
        values |= {name: value for name, value in given.items() if value is not None}
    return Options(**values)


def rate_of(rules: Iterable[NetworkRule]) -> tuple[float | None, str | None]:
    """The learning rate of the first rule that gives one, and that rule's pattern."""
    return next(((rule.lr, rule.match) for rule in rules if rule.lr is not None), (None, None))


def rules_for(component: str, path: str, rules: Iterable[NetworkRule]) -> list[NetworkRule]:
    """The rules whose pattern matches a module, in their order."""
    return [rule for rule in rules if _matches((rule.match,), component, path)]


# --- blocks -----------------------------------------------------------------------------------------------------------


def _inside_blocks(
    chosen: Sequence[tuple[str, str]], network: NetworkConfig, facts: ModelFacts
) -> set[tuple[str, str]]:
    """Modules that `network.blocks` leaves; the groups are block lists of the denoiser."""
    groups = {block.path: block.path for block in facts.block_lists} | dict(facts.lora.groups)
    counts = {block.path: block.count for block in facts.block_lists}
    kept = set(chosen)
    for group, wanted in network.blocks.items():
        if group not in groups:
            raise UsageError(
                f"unknown block group {group!r}",
                where="network.blocks",
                why=_near(group, groups),
                fix=f"use one of: {', '.join(groups)}",
            )
        prefix = groups[group].rstrip(".") + "."
        count = counts.get(groups[group].rstrip("."))
        indices = _indices(wanted, count, f"network.blocks.{group}")
        for component, path in chosen:
            if component == "denoiser" and path.startswith(prefix) and indices is not None:
                number = path.removeprefix(prefix).partition(".")[0]
                if number.isdigit() and int(number) not in indices:
                    kept.discard((component, path))
    return kept


def _indices(wanted: str | Sequence[int | str], count: int | None, where: str) -> set[int] | None:
    """None keeps all."""
    if wanted == "all":
        return None
    if wanted == "none":
        return set()
    indices: set[int] = set()
    for part in wanted:
        first, _, last = str(part).partition("-")
        indices |= set(range(int(first), int(last or first) + 1))
    if not indices:
        raise UsageError("a range of blocks is empty", where=where, fix='write ranges as "4-7", or "none" for no block')
    if count is not None and max(indices) >= count:
        raise UsageError(f"there is no block {max(indices)}", where=where, why=f"blocks are numbered 0 to {count - 1}")
    return indices


# --- patterns ---------------------------------------------------------------------------------------------------------


def compiled(pattern: str, where: str) -> re.Pattern[str]:
    """The regular expression that a user wrote; UsageError when it is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{pattern!r} is no regular expression", where=where, why=str(error)) from error


def _any_match(patterns: Iterable[str], path: str) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def _matches(patterns: Iterable[str], component: str, path: str) -> bool:
    return any(re.fullmatch(pattern, path) or re.fullmatch(pattern, f"{component}.{path}") for pattern in patterns)


def _require_matches(patterns: Iterable[str], every: Sequence[tuple[str, str]], where: str) -> None:
    for pattern in patterns:
        compiled(pattern, where)
        if not any(_matches((pattern,), *each) for each in every):
            # One path of each kind: blocks repeat, and their numbers make every path close to every other.
            kinds = list({re.sub(r"\.\d+\.", ".0.", path): path for _, path in reversed(every)}.values())[::-1]
            raise UsageError(
                f"{pattern!r} matches no module",
                where=where,
                why=_near(re.sub(r"\\?\.[*+]|\\", "", pattern), kinds),
                fix=f"patterns must match the whole path; paths look like {kinds[0] if kinds else 'block.0.linear'}",
            )


def _near(name: str, names: Collection[str]) -> str | None:
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.4) or list(names)[:3]
    return f"close names: {', '.join(close)}" if close else None
