"""``data.json``: what became of every image, for the person who wonders whether the data was used."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.core.atomic import write_json
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.types import Item

    from .plan import DataPlan, PlanItem


class Ledger:
    """Counts the uses of every planned image over the whole run, resumed or not."""

    def __init__(self, plan: DataPlan, counts: Mapping[str, int] | None = None) -> None:
        self.plan = plan
        self.counts: Counter[str] = Counter(counts or {})

    def add(self, items: Iterable[Item]) -> None:
        """Count the items of a batch that was trained on."""
        self.counts.update(f"{item.source}/{item.id}" for item in items)

    def state(self) -> dict[str, int]:
        """The counts, for a checkpoint: uses between it and a crash must not be counted twice."""
        return dict(self.counts)

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
            "used": self.counts[f"{item.source}/{item.id}"],
            "repeats": item.repeats,
            "loss_weight": item.loss_weight,
            "size": list(fit.image),
            "resized": list(fit.resized),
            "bucket": list(fit.bucket),
            "cropped_percent": round(100 * fit.cropped_share, 2),
        }


def read_counts(path: Path) -> dict[str, int]:
    """The counts of a ledger that an earlier run wrote; empty when there is none."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["images"]
        return {f"{row['source']}/{row['image']}@{row['resolution']}": int(row["used"]) for row in rows if row["used"]}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError("this is not a data ledger", where=str(path), why=str(error), fix="move it away") from error
