"""The conversation about an existing configuration: what is not asked about stays as it is. Nothing is written here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from tuner.core.config import RawConfig, RunConfig, load_config
from tuner.core.config.document import value_at
from tuner.core.config.edit import edited_text, keys_under
from tuner.core.config.inherit import resolve_data
from tuner.core.config.jsonc import Path, parse
from tuner.core.config.load import read_file
from tuner.core.config.locations import absolute_paths
from tuner.core.errors import UsageError
from tuner.core.plan.prepare import prepare
from tuner.core.registry import Catalog, typed_config
from tuner.core.types import ModelFacts
from tuner.core.wizard.builder import Builder, Outcome
from tuner.core.wizard.document import GONE, shortened
from tuner.core.wizard.goals import best_edge
from tuner.core.wizard.models import ChosenModel, ask_family, choose_model
from tuner.core.wizard.pictures import ChosenPictures, Pictures, choose_pictures, look_at_pictures
from tuner.core.wizard.questions import Interview, Option, Question
from tuner.core.wizard.reasons import is_own, preset, with_preset
from tuner.core.wizard.ways import Way


def configure_existing(interview: Interview, catalog: Catalog, target: FilePath, scratch: FilePath) -> Outcome:
    """Changes to a configuration; what is not asked about stays as it is."""
    target = target.absolute()
    read_file(target)  # a file that cannot be read, or written, is told before anything is asked
    if not target.stat().st_mode & 0o222 or not os.access(target.resolve().parent, os.W_OK):
        raise UsageError("this file must not be changed", where=str(target), why="it or its folder is read-only",
                         fix="copy it and change the copy")  # fmt: skip
    before = target.read_bytes().decode("utf-8")
    edit = _Edit(
        Builder(interview=interview, catalog=catalog, target=target, scratch=scratch, document=_plain(target, before)),
        own=keys_under(before, str(target), is_own),
    )
    edit.run()
    builder = edit.builder
    text = edited_text(before, builder.document, str(target), builder.comments, is_own=is_own)
    start = parse(text, str(target)).values[()][0] + text.startswith("\ufeff")
    text = edit.head(text[:start]) + text[start:]
    edit.tell_problems()
    plan = None if edit.way is None else edit.way.plan
    return Outcome(path=target, text=text, before=before, plan=plan, names_model=edit.names_model)


_SAMPLE_SIZE: Path = ("sample", "size")
_FOLLOWS: tuple[Path, ...] = (("optimizer", "offload"), ("precision", "compute"), _SAMPLE_SIZE)


@dataclass(slots=True)
class _Edit:
    """One pass over the parts that the user wants to change. own: keys that stand under a comment of the wizard's."""

    builder: Builder
    own: list[Path]
    model: ChosenModel | None = None
    pictures: ChosenPictures | None = None
    way: Way | None = None

    def run(self) -> None:
        interview, builder = self.builder.interview, self.builder
        parts = interview.ask(
            Question(
                id="change",
                text="What shall change?",
                kind="several",
                options=(
                    Option(value="model", title="the model files"),
                    Option(value="pictures", title="the pictures and their captions"),
                    Option(value="goal", title="what it learns, for how long, and in how much memory"),
                    Option(value="prompt", title="the prompt that is drawn"),
                    Option(value="name", title="the name of the training"),
                ),
                read=_some_parts,
            )
        )
        if {"model", "goal"} & set(parts):
            self._name_family()
        if "model" in parts:
            self._model()
        if "pictures" in parts:
            self._pictures()
        if "prompt" in parts:
            builder.choose_prompt("")
        if "goal" in parts:
            self._goal()
        if "name" in parts:
            builder.choose_folder("")

    def head(self, text: str) -> str:
        """What stands before the document: what it says about the preset follows the goal, and goes when the model or
        the pictures are others, because its memory and time were predicted for the old ones."""
        if self.way is not None:
            return with_preset(text, preset(self.way.name, self.way.cost()))
        return with_preset(text, None) if self.model is not None or self.pictures is not None else text

    @property
    def names_model(self) -> bool:
        return isinstance(value_at(self.builder.document, ("model", "family")), str)

    def tell_problems(self) -> None:
        """What is wrong with the configuration all the same: nothing of it was asked about."""
        if not self.names_model:
            return  # the command line names the model, and its keys with it
        try:
            typed_config(self._absolute(), self.builder.catalog)
        except UsageError as problem:
            told = [str(each) for each in problem.parts or (problem,)]
            self.builder.interview.tell("the configuration has problems that stay:", *told)

    def _name_family(self) -> None:
        """A file that leaves the model to the command line gets its name: nothing about it can be known without."""
        builder = self.builder
        if not self.names_model:
            family = ask_family(builder.interview, builder.catalog)
            section = value_at(builder.document, ("model",))
            builder.put(("model",), {"family": family, **(section if isinstance(section, dict) else {})})

    def _absolute(self) -> RawConfig:
        """The configuration as it is now, with absolute paths and what it includes."""
        if value_at(self.builder.document, ("data", "include")) is not None:
            return load_config(self.builder.target, env={})
        return load_config(absolute_paths(self.builder.document, self.builder.base), env={})

    def _model(self) -> None:
        builder = self.builder
        now = self._absolute().get("model")
        self.model = choose_model(builder.interview, builder.catalog, now=now if isinstance(now, dict) else None)
        before = value_at(builder.document, ("model",)) or {}
        replaced = ("path", "subfolder", "revision", "variant", "flavour", "text_encoders", "tokenizers", "vae")
        same = before.get("family") == self.model.section["family"]
        kept = {key: value for key, value in before.items() if same and key not in replaced}
        section = {**kept, **shortened(self.model.section, builder.base)}
        order = [key for key in before if key in section]
        ordered = {key: section[key] for key in [*order, *(key for key in section if key not in order)]}
        builder.put(("model",), ordered, self.model.about)

    def _pictures(self) -> None:
        builder = self.builder
        if value_at(builder.document, ("data", "include")) is not None:
            raise UsageError("the data section is in another file", where=str(builder.document["data"]["include"]),
                             fix="change it there")  # fmt: skip
        sources = _sources(builder.document)
        if not sources:
            raise UsageError("there is no source of pictures to change", where=f"{builder.target}, data.sets")
        name = next(iter(sources))
        if len(sources) > 1:
            options = tuple(Option(value=each, title=each) for each in sources)
            name = builder.interview.choose("source", "Which of the sources?", options)
        path = sources[name]
        document = self._absolute()
        now, effect = value_at(document, path), value_at(resolve_data(document), path)
        self.pictures = choose_pictures(builder.interview, builder.scratch, now=now, effect=effect)
        builder.put_pictures(self.pictures, path, name)

    def _goal(self) -> None:
        builder = self.builder
        self._forget()
        facts = self.model.facts if self.model is not None else self._facts()
        images, size = self._counted()
        sets = value_at(builder.document, ("data", "sets"))
        size_at: Path | None = None
        edge = size
        if isinstance(sets, list) and len(sets) == 1:
            now = sets[0].get("resolution", value_at(builder.document, ("data", "defaults", "resolution")))
            home: Path = ("data", "sets", 0) if "resolution" in sets[0] or now is None else ("data", "defaults")
            if now is None or isinstance(now, int):
                size_at, edge = (*home, "resolution"), now or best_edge(size, facts)
        if size_at is None:
            builder.interview.tell("there are several sizes: they stay as they are")
        self.way = builder.choose_way(facts, images, edge, size_at)

    def _forget(self) -> None:
        """Take out what followed from the last card and size: it is no wish of the user's, and may not fit any more."""
        for path in self.own:
            if path[0] in ("memory", "quantize") or path in _FOLLOWS or path[-1] == "buckets":
                self.builder.put(path, GONE)
                self.builder.draws = self.builder.draws or path == _SAMPLE_SIZE

    def _facts(self) -> ModelFacts | None:
        plain = {**self._absolute(), "cache": {"dir": str(self.builder.scratch)}}
        try:
            return prepare(plain, catalog=self.builder.catalog)[1]
        except UsageError as problem:
            self.builder.interview.tell(f"no plan for this configuration as it is: {problem.what}")
            return None

    def _counted(self) -> tuple[int, int]:
        """(pictures that are trained on, edge of the median one) of all sources."""
        document = resolve_data(self._absolute())
        looks = [
            _look(source, self.builder.scratch)
            for source in (value_at(document, path) for path in _sources(document).values())
            if source.get("role", "train") == "train" and source.get("enabled", True)
        ]
        if not looks:
            raise UsageError("there is no source of pictures to train on", where=f"{self.builder.target}, data.sets")
        return sum(look.images for look in looks), looks[0].size


def _look(source: Mapping[str, Any], scratch: FilePath) -> Pictures:
    captions = source.get("captions")
    return look_at_pictures(
        FilePath(source["path"]),
        scratch,
        source["id"],
        recursive=bool(source.get("recursive")),
        captions=captions if isinstance(captions, Mapping) else None,
    )


def _sources(document: Mapping[str, Any]) -> dict[str, Path]:
    """Where each source is, by its id."""
    sets = value_at(document, ("data", "sets"))
    found: dict[str, Path] = {}
    for number, each in enumerate(sets if isinstance(sets, list) else []):
        sources = each.get("sources") if isinstance(each, dict) else None
        for index, source in enumerate(sources if isinstance(sources, list) else []):
            if isinstance(source, dict) and isinstance(source.get("id"), str) and isinstance(source.get("path"), str):
                found[source["id"]] = ("data", "sets", number, "sources", index)
    return found


def _plain(target: FilePath, text: str) -> dict[str, Any]:
    value = parse(text, str(target)).value
    assert isinstance(value, dict)
    known = {field.alias or name for name, field in RunConfig.model_fields.items()}
    foreign = [key for key in value if key not in known]
    if 2 * len(foreign) > len(value):
        raise UsageError(
            "this is no configuration of this program",
            where=str(target),
            why=f"it holds {', '.join(foreign[:5])}",
            fix="choose another name; tuner config import reads those of other trainers",
        )
    return value


def _some_parts(raw: Any) -> tuple[str, ...]:
    if not raw:
        raise UsageError("nothing is chosen", fix="choose at least one")
    return tuple(raw)
