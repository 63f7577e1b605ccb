"""The kinds of adapters: which layer makes each, and which parts a file of each must hold."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tuner.core.adapters.deltas import kind_of
from tuner.core.adapters.dense import FullLayer, Ia3Layer
from tuner.core.adapters.dora import DoraLayer
from tuner.core.adapters.hadamard import STARTS, LohaLayer
from tuner.core.adapters.kronecker import LokrLayer
from tuner.core.adapters.layers import AdapterLayer, LoraLayer
from tuner.core.adapters.norms import NormLayer
from tuner.core.adapters.rotation import BoftLayer, OftLayer
from tuner.core.errors import UsageError

KINDS: Mapping[str, type[AdapterLayer]] = {
    layer.kind: layer
    for layer in (LoraLayer, DoraLayer, LohaLayer, LokrLayer, OftLayer, BoftLayer, Ia3Layer, FullLayer, NormLayer)
}
"""Values of ``network.type``, and ``norms`` for what ``network.train_norms`` adds."""

REQUIRED: Mapping[str, tuple[str, ...]] = {
    "lora": ("down", "up"),
    "dora": ("down", "up", "dora_scale"),
    "loha": tuple(STARTS),
    "oft": ("oft_blocks",),
    "boft": ("oft_blocks",),
    "ia3": ("weight", "on_input"),
    "norms": ("w_norm",),
}
OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "lokr": tuple(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")),
    "full": ("diff", "diff_b"),
    "norms": ("b_norm",),
}


def checked_parts(parts: Mapping[str, Tensor], key: str, *, rank_alpha: float | None = None) -> dict[str, Tensor]:
    """The parts of one module with alpha as a scalar, added where it is the rank.

    rank_alpha: alpha where the parts have none. UsageError: parts missing or unknown, sizes that do not fit.
    """
    kind = kind_of(parts)
    for part in REQUIRED.get(kind, ()):
        if part not in parts:
            raise UsageError(f"the file lacks {key}.{part}", why=f"a {kind} module needs {', '.join(REQUIRED[kind])}")
    for part in set(parts) - {"alpha", *REQUIRED.get(kind, ()), *OPTIONAL.get(kind, ())}:
        raise UsageError(f"{key}.{part} does not belong to a {kind} adapter", why="a module has one adapter")
    found = dict(parts)
    rank = rank_of(parts, key)
    if rank is not None or kind in ("oft", "boft"):
        default = 0.0 if rank is None else float(rank)
        alpha = found.get("alpha")
        if alpha is None:
            found["alpha"] = _number(default if rank_alpha is None else rank_alpha)
        elif alpha.numel() != 1:
            raise UsageError(f"alpha of {key} is not a number", why=f"it has shape {list(alpha.shape)}")
        else:
            # Zero stands for "as the rank" in files of some trainers.
            found["alpha"] = alpha.reshape(()) if float(alpha) or rank is None else _number(default)
    elif kind == "lokr":
        found["alpha"] = _number(1.0)
    else:
        found.pop("alpha", None)
    if kind == "dora":
        lengths, rows = found["dora_scale"], found["up"].shape[0]
        # Of a square weight there are as many columns as rows: the shape tells them apart.
        if lengths.numel() != rows or (lengths.ndim > 1 and lengths.shape[0] != rows):
            raise UsageError(
                f"{key} has lengths of shape {[*lengths.shape]} for {rows} rows",
                why="lengths of columns (wd_on_out off in LyCORIS) are not supported",
            )
        found["dora_scale"] = lengths.reshape(-1, 1)
    if kind == "ia3":
        found["on_input"] = _number(float(bool(parts["on_input"])))
    return found


def _number(value: float) -> Tensor:
    return torch.tensor(value)


def rank_of(parts: Mapping[str, Tensor], key: str = "a module") -> int | None:
    """The rank that alpha is divided by; None where there is none. UsageError for factors that do not fit."""
    pairs = {
        "lora": (("down", "up"),),
        "dora": (("down", "up"),),
        "loha": (("hada_w1_b", "hada_w1_a"), ("hada_w2_b", "hada_w2_a")),
        "lokr": (("lokr_w2_b", "lokr_w2_a"), ("lokr_w1_b", "lokr_w1_a")),
    }.get(kind_of(parts), ())
    rank: int | None = None
    for narrow, wide in pairs:
        if (narrow in parts) != (wide in parts):
            raise UsageError(f"the file lacks {key}.{wide if narrow in parts else narrow}", why="factors come in pairs")
        if narrow not in parts:
            continue
        down, up = parts[narrow], parts[wide]
        if down.ndim not in (2, 4) or up.ndim != down.ndim or down.shape[0] != up.shape[1]:
            raise UsageError(f"the matrices of {key} do not fit: {list(down.shape)} and {list(up.shape)}")
        rank = rank or down.shape[0]
    return rank
