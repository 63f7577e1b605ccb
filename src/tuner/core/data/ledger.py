"""``data.json``: what became of every image, for the person who wonders whether the data was used."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.core.atomic import write_json
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.data.plan import DataPlan, PlanItem
    from tuner.core.types import Item


class Ledger:
    """Counts the uses of every planned image over the whole run, resumed or not."""

    def __init__(self, plan: DataPlan) -> None:
        self.plan = plan
        self.counts: Counter[str] = Counter()

    def add(self, items: Iterable[Item]) -> None:
        """Count the items of a batch that was trained on."""
        self.counts.update(f"{item.source}/{item.id}" for item in items)

    def state(self) -> dict[str, int]:
        """The counts, for a checkpoint: uses between it and a crash must not be counted twice."""
        return dict(self.counts)

    def load(self, counts: Mapping[str, int]) -> None:
        """Go on from the counts of a checkpoint."""
        self.counts = Counter(counts)

    def as_dict(self) -> dict[str, Any]:
        """JSON values: one row per image and resolution, then what was left out."""
        plan = self.plan
        return {
            "fingerprint": plan.fingerprint,
            "images": [self._row(item, "train") for item in plan.items]
            + [self._row(item, "validation") for item in plan.validation],
            "left_out": [
                {"source": each.source, "image": each.key, "resolution": each.tier, "reason": each.reason}
                for each in plan.left_out
            ],
            "notes": list(plan.notes),
        }

    def write(self, path: Path) -> None:
        write_json(path, self.as_dict())

    def _row(self, item: PlanItem, part: str) -> dict[str, Any]:
        fit = item.fit
        return {
            "source": item.source,
            "image": item.record.key,
            "part": part,
            "role": self.plan.sources[item.source].role,
            "resolution": self.plan.tiers[item.tier].name,
            "content": item.record.digest,
            "caption": _short_hash(item.record.captions_raw),
            "used": self.counts[f"{item.source}/{item.id}"],
            "repeats": item.repeats,
            "loss_weight": item.loss_weight,
            "size": list(fit.image),
            "resized": list(fit.resized),
            "bucket": list(fit.bucket),
            "cropped_percent": round(100 * fit.cropped_share, 2),
        }


def changes_since(path: Path, plan: DataPlan) -> list[str]:
    """What is different from the data that an earlier ledger tells of, in words; empty when there is no ledger."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["images"]
        before = {(row["source"], row["image"], row["resolution"]): row for row in rows}
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError("this is not a data ledger", where=str(path), why=str(error), fix="move it away") from error
    now = {(row["source"], row["image"], row["resolution"]): row for row in Ledger(plan).as_dict()["images"]}
    found = {"new": [key for key in now if key not in before], "gone": [key for key in before if key not in now]}
    for name, word in _WATCHED.items():
        found[word] = [key for key in now if key in before and now[key][name] != before[key].get(name)]
    return [_told(word, list(dict.fromkeys(key[:2] for key in keys))) for word, keys in found.items() if keys]


_WATCHED = {
    "content": "with changed content",
    "caption": "with a changed caption",
    "part": "on the other side of the validation split",
    "bucket": "at another size",
    "repeats": "with other repeats",
}
_NAMED = 5


def _told(word: str, images: Sequence[tuple[str, str]]) -> str:
    names = ", ".join("/".join(image) for image in images[:_NAMED])
    more = f" and {len(images) - _NAMED} more" if len(images) > _NAMED else ""
    return f"{len(images)} image{'s' if len(images) > 1 else ''} {word}: {names}{more}"


def _short_hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
