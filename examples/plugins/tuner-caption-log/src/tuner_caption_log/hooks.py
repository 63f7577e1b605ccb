"""A wrapper on ``encode_text``, and a number in the logs."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from tuner import TextEmbeds, hookimpl

encoded: dict[str, int] = {}


@hookimpl
def on_run_start(run: Any) -> None:
    """Write down what was encoded for the caches; the run folder exists by now."""
    write(Path(run.config.checkpoint.dir))


@hookimpl(wrapper=True)
def encode_text(captions: Sequence[str]) -> Generator[None, TextEmbeds, TextEmbeds]:
    """Pass the model's result on as it is."""
    embeds = yield
    values = sum(tensor.numel() for tensor in embeds.tensors.values()) // len(captions)
    encoded.update(dict.fromkeys(captions, values))
    return embeds


@hookimpl
def extra_metrics() -> dict[str, float]:
    return {"caption_log/encoded": float(len(encoded))}


def write(folder: Path) -> None:
    """One JSON line per caption, in the order of the first encoding."""
    lines = [json.dumps({"caption": caption, "values": values}) for caption, values in encoded.items()]
    (folder / "captions.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
