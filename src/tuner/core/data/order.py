"""The order of an epoch: a pure function of the plan, the seed and the epoch.

Nothing here keeps state, so resuming needs four facts only: epoch, batch index, seed and the plan's fingerprint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tuner.core.rng import Rng

if TYPE_CHECKING:
    from tuner.core.data.plan import DataPlan


@dataclass(frozen=True, slots=True)
class Visit:
    """One use of ``plan.items[item]`` in an epoch; ``visit`` counts the uses of that item in the epoch from 0."""

    item: int
    visit: int


PlannedBatch = tuple[Visit, ...]


def epoch_order(plan: DataPlan, seed: int, epoch: int) -> list[PlannedBatch]:
    """The global batches of an epoch (counted from 0), in order.

    In ``epoch`` sampling each item appears exactly ``repeats`` times (``short_batches: keep``). Batches of all sets and
    buckets are mixed. Repeats of one image are spread over the epoch and share a batch only when that is unavoidable.
    """
    rng = Rng(seed, "data", "order", epoch)
    if plan.sampling != "epoch":
        return _weighted_order(plan, rng)
    per_group = [_group_batches(plan, index, rng.child("group", index), Counter()) for index in range(len(plan.groups))]
    slots = rng.child("batches").shuffled([index for index, batches in enumerate(per_group) for _ in batches])
    # The batches of a group stay in their own order: it carries the spread of the repeats.
    streams = [iter(batches) for batches in per_group]
    return [_visits(next(streams[index])) for index in slots]


def _visits(pairs: list[tuple[int, int]]) -> PlannedBatch:
    return tuple(Visit(item, visit) for item, visit in pairs)


def _group_batches(plan: DataPlan, group: int, rng: Rng, seen: Counter[int]) -> list[list[tuple[int, int]]]:
    """One pass over a bucket: (item, visit) pairs in batches, in order of time. ``seen`` counts visits over passes."""
    members, size = plan.groups[group].items, plan.groups[group].batch_size
    queue = _spread(members, [plan.items[item].repeats for item in members], rng.child("spread"))
    batches = _slices(queue, size, rng.child("short"))
    _separate(batches)
    if plan.short_batches == "drop":
        batches = [batch for batch in batches if len(batch) == size]
    elif plan.short_batches == "fill":
        _fill(batches, size, members, rng.child("fill"))
    numbered = []
    for batch in batches:
        numbered.append([(item, seen[item] + batch[:place].count(item)) for place, item in enumerate(batch)])
        seen.update(batch)
    return numbered


def _spread(members: Sequence[int], repeats: Sequence[int], rng: Rng) -> list[int]:
    """All visits in order: an item with r repeats has one at a random place in each r-th of the epoch."""
    places = rng.uniform([sum(repeats)]).tolist()
    drawn = iter(places)
    # The index breaks ties, so equal float32 draws cannot make the order depend on the sort.
    visits = [
        ((turn + next(drawn)) / count, index, item)
        for index, (item, count) in enumerate(zip(members, repeats, strict=True))
        for turn in range(count)
    ]
    return [item for _, _, item in sorted(visits)]


def _slices(queue: list[int], size: int, rng: Rng) -> list[list[int]]:
    """Consecutive batches of ``size``; the short one, if any, is at a random place."""
    count = -(-len(queue) // size)
    if count == 0:
        return []
    short = rng.integers(count) if len(queue) % size else count
    batches, at = [], 0
    for index in range(count):
        end = at + (len(queue) % size if index == short else size)
        batches.append(queue[at:end])
        at = end
    return batches


def _separate(batches: list[list[int]]) -> None:
    """Swap visits between batches, nearest first, until no batch holds an item twice where that can be avoided."""
    homes = Counter(item for batch in batches for item in set(batch))
    for index, batch in enumerate(batches):
        for place in range(len(batch)):
            item = batch[place]
            if batch.count(item) > 1 and homes[item] < len(batches):
                other = _swap_partner(batches, index, item)
                if other is not None:
                    target, slot = other
                    moved = batches[target][slot]
                    homes[moved] += 1 - (batches[target].count(moved) == 1)
                    homes[item] += 1
                    batch[place], batches[target][slot] = moved, item


def _swap_partner(batches: list[list[int]], index: int, item: int) -> tuple[int, int] | None:
    """The nearest batch without ``item`` that has a visit which ``batches[index]`` lacks: (batch, place)."""
    batch = set(batches[index])
    for distance in range(1, len(batches)):
        for target in (index + distance, index - distance):
            if 0 <= target < len(batches) and item not in batches[target]:
                for slot, candidate in enumerate(batches[target]):
                    if candidate not in batch:
                        return target, slot
    return None


def _fill(batches: list[list[int]], size: int, members: Sequence[int], rng: Rng) -> None:
    """Fill the short batch with further visits, of items that it lacks as long as there are some."""
    for batch in batches:
        if len(batch) < size:
            others = rng.shuffled([item for item in members if item not in set(batch)])
            again = rng.child("again").shuffled(list(members))
            while len(batch) < size:
                batch.append(others.pop() if others else again[len(batch) % len(again)])


def _weighted_order(plan: DataPlan, rng: Rng) -> list[PlannedBatch]:
    """Each batch draws a source by weight, then a bucket by its share of visits, then the next visits of that bucket.

    A bucket that was used up starts again in a new order, so images of one source are seen equally often.
    """
    by_source: dict[str, list[int]] = {}
    for index, group in enumerate(plan.groups):
        # With dropped short batches a small bucket has none to draw.
        if plan.batches_of(group):
            by_source.setdefault(plan.items[group.items[0]].source, []).append(index)
    sources = list(by_source)
    visits = [sum(plan.items[item].repeats for item in group.items) for group in plan.groups]
    weights = []
    for source in sources:
        members = by_source[source]
        weight = plan.items[plan.groups[members[0]].items[0]].sampling_weight
        weights.append(weight * (sum(visits[index] for index in members) if plan.sampling == "weighted" else 1))
    queues: dict[int, list[list[tuple[int, int]]]] = {}
    passes: Counter[int] = Counter()
    seen: Counter[int] = Counter()
    order = []
    for number in range(plan.batches_per_epoch):
        draw = rng.child("draw", number)
        chosen = by_source[sources[_weighted_choice(weights, draw.child("source").random())]]
        at = chosen[_weighted_choice([visits[index] for index in chosen], draw.child("bucket").random())]
        if not queues.get(at):
            queues[at] = _group_batches(plan, at, rng.child("group", at, passes[at]), seen)[::-1]
            passes[at] += 1
        order.append(_visits(queues[at].pop()))
    return order


def _weighted_choice(weights: Sequence[float], draw: float) -> int:
    total = sum(weights)
    reached = 0.0
    for index, weight in enumerate(weights):
        reached += weight / total
        if draw < reached and weight > 0:
            return index
    return max(range(len(weights)), key=lambda index: weights[index])


def validation_order(plan: DataPlan) -> list[tuple[int, ...]]:
    """Indices into ``plan.validation`` by batch, the same at every validation."""
    return [
        group.items[start : start + group.batch_size]
        for group in plan.validation_groups
        for start in range(0, len(group.items), group.batch_size)
    ]
