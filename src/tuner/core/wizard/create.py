"""The whole conversation for a new configuration. Nothing is written here."""

from __future__ import annotations

import os
import re
from pathlib import Path as FilePath
from typing import Any

from tuner.core.errors import UsageError
from tuner.core.registry import Catalog
from tuner.core.wizard import reasons
from tuner.core.wizard.builder import Builder, Outcome
from tuner.core.wizard.document import GONE, new_text
from tuner.core.wizard.goals import best_edge
from tuner.core.wizard.models import choose_model
from tuner.core.wizard.pictures import ChosenPictures, choose_pictures, known_as
from tuner.core.wizard.questions import Interview, Question
from tuner.core.wizard.ways import Way

HOLD_OUT = 20
"""From so many pictures on a tenth is held out to measure with."""


def configure_new(interview: Interview, catalog: Catalog, target: FilePath | None, scratch: FilePath) -> Outcome:
    """A configuration from nothing. target: the file, asked for when it is None. UsageError when it exists."""
    target = (target or _ask_target(interview)).absolute()
    if problem := _unusable(target):
        raise problem
    builder = Builder(interview=interview, catalog=catalog, target=target, scratch=scratch)
    model = choose_model(interview, catalog)
    builder.put(("model",), model.section, model.about)
    pictures = choose_pictures(interview, scratch)
    name = slug(pictures.trigger or pictures.pictures.root.name)
    builder.put(("data", "sets"), [{"resolution": pictures.pictures.size, "sources": [{}]}])
    known_as(name, pictures.pictures.root, scratch)
    builder.put_pictures(pictures, ("data", "sets", 0, "sources", 0), name)
    builder.put(("checkpoint", "dir"), f"out/{name}")
    images, size = pictures.pictures.images, pictures.pictures.size
    if images >= HOLD_OUT:
        builder.put(("validate", "split"), 0.1, reasons.HELD_OUT)
    builder.choose_prompt(_suggested(pictures))
    way = builder.choose_way(model.facts, images, best_edge(size, model.facts), ("data", "sets", 0, "resolution"))
    builder.put(("checkpoint", "dir"), GONE)
    builder.choose_folder(name)
    text = new_text(builder.document, builder.comments, _head(way))
    return Outcome(path=target, text=text, before=None, plan=way.plan)


def slug(text: str) -> str:
    """A name for files: letters, digits, hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "run"


def _ask_target(interview: Interview) -> FilePath:
    def read(raw: Any) -> FilePath:
        text = str(raw).strip()
        path = FilePath(text or ".").expanduser()
        if not text or path.is_dir():
            raise UsageError("the name of a file is needed", fix="such as config.json")
        if problem := _unusable(path.absolute()):
            raise problem
        return path

    return interview.ask(
        Question(
            id="file",
            text="Which file shall the configuration be written to?",
            help="Relative paths in it start at its folder.",
            read=read,
            default="config.json" if not FilePath("config.json").exists() else None,
        )
    )


def _unusable(path: FilePath) -> UsageError | None:
    """Why no new file can be written there: known before a dozen questions are answered for it."""
    if path.exists() or path.is_symlink():
        fix = f"choose another name; to change it: tuner configure {path}"
        return UsageError("this file exists", where=str(path), fix=fix)
    above = next(each for each in path.parents if each.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        return UsageError("no file can be written there", where=str(path), why=f"{above} is no folder to write to")
    return None


def _suggested(chosen: ChosenPictures) -> str:
    captions = chosen.pictures.captions
    text = captions[0].splitlines()[0] if captions else str(chosen.source.get("captions", {}).get("fallback", ""))
    prefix = chosen.source.get("captions", {}).get("prefix", "")
    return f"{prefix} {text}".strip()


def _head(way: Way) -> tuple[str, ...]:
    return (
        "Written by tuner configure; it is yours to change.",
        reasons.preset(way.name, way.cost()),
        "All values with their defaults: tuner config resolve",
    )
