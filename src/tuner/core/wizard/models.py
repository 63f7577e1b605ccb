"""The conversation about the model: which weights, and what else they need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tuner.core.config import RawConfig, RunConfig, load_config
from tuner.core.config.locations import is_hub_id
from tuner.core.errors import NotHereError, UsageError
from tuner.core.places import Place, here_only
from tuner.core.registry import Catalog, model_schema, open_facts, open_public, typed_config
from tuner.core.types import ModelFacts
from tuner.core.wizard import reasons
from tuner.core.wizard.files import Found, FoundModel, families_of, look_for_models, nearest_first
from tuner.core.wizard.keys import AskedKey, asked_keys, missing_key, plain_help, question_of
from tuner.core.wizard.questions import NOTHING, Interview, Option, Question, text_or_nothing

_ROUNDS = 40
"""Times that something missing is filled in: a plugin that refuses every answer must not ask for ever."""
_FETCH = "it is fetched from the hub when training starts"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenModel:
    """section: the ``model`` section with absolute paths. facts: None when they cannot be known without the files."""

    section: dict[str, Any]
    facts: ModelFacts | None

    @property
    def about(self) -> str:
        """For the comment above the section."""
        return reasons.model(self.section["family"], "" if self.facts is None else self.facts.flavour)


@dataclass(frozen=True, slots=True)
class _Start:
    """What the first answer leads to: files that were found, or a repository of the hub."""

    found: Found | None
    place: str


def choose_model(interview: Interview, catalog: Catalog, *, now: Mapping[str, Any] | None = None) -> ChosenModel:
    """Ask until the installed plugin has every file it needs. now: the section of an existing configuration."""
    if not families_of(catalog):
        raise UsageError("no model is installed", fix="tuner plugins install PACKAGE")
    names = ", ".join(entry.name for entry in families_of(catalog))
    start = interview.ask(
        Question(
            id="models",
            kind="place",
            text="Where are your model files?",
            help=f"A folder, a file, or a hub id such as owner/name. Folders are searched. Installed models: {names}",
            read=partial(_start, catalog),
            default=None if now is None else str(now.get("path", "")) or None,
        )
    )
    if start.found is None:
        model = _from_hub(interview, catalog, start.place, now)
    else:
        if notes := start.found.notes():
            interview.tell(*notes)
        model = _one_of(interview, start.found, Path(start.place))
        interview.tell(f"model: {model.family} {model.flavour}, {model.path}")
    section = {"family": model.family, "path": str(model.path) if start.found is not None else start.place}
    parts = start.found or Found()
    return _Parts(interview, catalog, parts, section, dict(now or {})).complete()


def _start(catalog: Catalog, raw: Any) -> _Start:
    text = str(raw).strip()
    if not text:
        raise UsageError("a folder, a file or a hub id is needed")
    local = Path(text).expanduser().absolute()
    if not local.exists():
        if is_hub_id(text, Path.cwd()):
            return _Start(None, text)
        raise _no_place(text)
    found = look_for_models(local, catalog)
    if not found.models:
        names = ", ".join(entry.name for entry in families_of(catalog))
        why = f"{found.read} weight files were read; installed models: {names}"
        why = "; ".join([why, *found.notes()])
        raise UsageError("there is no model that an installed plugin knows", where=str(local), why=why,
                         fix="name another folder, or install the model's plugin: tuner plugins install")  # fmt: skip
    return _Start(found, str(local))


def _no_place(text: str) -> UsageError:
    """The error for a path that leads nowhere, with the nearest name beside it."""
    try:
        with here_only():
            Place.of(str(Path(text).expanduser().absolute()), where="model")
    except NotHereError as problem:
        return UsageError(problem.what, where=text, fix=problem.fix)
    raise AssertionError("the place is there")


def _from_hub(interview: Interview, catalog: Catalog, place: str, now: Mapping[str, Any] | None) -> FoundModel:
    interview.tell(f"{place}: {_FETCH}")
    family = ask_family(interview, catalog, str((now or {}).get("family", "")))
    return FoundModel(family=family, flavour="", path=Path(place))


def ask_family(interview: Interview, catalog: Catalog, now: str = "") -> str:
    """Which of the installed models it is, where no file tells."""
    names = [entry.name for entry in families_of(catalog)]
    options = tuple(Option(value=name, title=name) for name in names)
    only = names[0] if len(names) == 1 else None
    return interview.choose("family", "Which model is it?", options, default=now if now in names else only)


def _one_of(interview: Interview, found: Found, root: Path) -> FoundModel:
    if len(found.models) == 1:
        return found.models[0]
    base = root if root.is_dir() else root.parent
    named: dict[str, FoundModel] = {}
    for each in found.models:
        # A folder inside the diffusers layout stands for the whole, which lies above it.
        name = each.path.relative_to(base).as_posix() if each.path.is_relative_to(base) else str(each.path)
        named[name if name not in named else f"{name} ({each.family})"] = each
    options = tuple(Option(value=name, title=f"{each.family} {each.flavour}: {name}") for name, each in named.items())
    return named[interview.choose("model", "Which of these models?", options)]


@dataclass(slots=True)
class _Parts:
    """Fills the section until the plugin's own ``files`` and ``facts`` have nothing more to refuse."""

    interview: Interview
    catalog: Catalog
    found: Found
    section: dict[str, Any]
    now: dict[str, Any]

    def complete(self) -> ChosenModel:
        keys = list(asked_keys(model_schema(self.catalog, self.section["family"])))
        self._always(keys)
        facts = self._until_known(keys)
        if facts is not None and self._optional(keys, facts):
            facts = self._until_known(keys)
        return ChosenModel(section=self.section, facts=facts)

    def _until_known(self, keys: list[AskedKey]) -> ModelFacts | None:
        """Add what is missing; the facts, or None when neither files nor a published model tell them."""
        asked: set[str] = set()
        for _ in range(_ROUNDS):
            try:
                return self._facts()
            except UsageError as problem:
                missing = missing_key(problem, keys) or self._blamed(problem, keys)
                if missing is None and isinstance(problem, NotHereError):
                    return None
                if missing is None or missing[0].name == "path":
                    if self._is_remote():
                        self.interview.tell(f"no plan before the files are here: {problem.what}")
                        return None
                    raise
                self._fill(*missing, problem, asked)
        raise UsageError("the parts of this model do not fit together", where=str(self.section["path"]))

    def _facts(self) -> ModelFacts:
        config, document = self._config()
        try:
            with here_only():
                return open_facts(config, self.catalog, document).facts
        except NotHereError as absent:
            # Fetched later, as the user said; what is published tells the sizes until then.
            if self._is_remote() and self._will_fetch(absent):
                return open_public(config, self.catalog, document)[1]
            raise

    def _config(self) -> tuple[RunConfig, RawConfig]:
        document = load_config(
            {
                "model": self.section,
                "data": {"sets": [{"sources": [{"id": "pictures", "path": "."}]}]},
                "optimizer": {"lr": 1e-4},
                "train": {"steps": 1},
                "checkpoint": {"dir": "out"},
            },
            env={},
        )
        return typed_config(document, self.catalog), document

    def _is_remote(self) -> bool:
        return bool(self._fetched) or is_hub_id(str(self.section["path"]), Path.cwd())

    @property
    def _fetched(self) -> list[str]:
        return [
            name for name, answer in self.interview.given.items() if name.startswith("model.") and answer == NOTHING
        ]

    def _will_fetch(self, absent: UsageError) -> bool:
        where = absent.where or ""
        return where.startswith("model.path") or any(where.startswith(name) for name in self._fetched)

    def _fill(self, key: AskedKey, entry: str, problem: UsageError, asked: set[str]) -> None:
        """Give the key a value: the only file there is for it, else what the user says."""
        name = ".".join(filter(None, (key.name, entry)))
        if not key.is_place:
            self._refused(name, asked, problem)
            question = question_of(key, self.now.get(key.name), required=True)
            self.section[key.name] = self.interview.ask(replace(question, help=problem.fix or question.help))
            return
        options = self._candidates(key, name)
        before = self._place_now(key, entry)
        guessed = len(options) == 1 and before is None and key.name != "tokenizers"
        if guessed and name not in asked and not self.interview.asker.insists(f"model.{name}"):
            asked.add(name)
            self._put(key, entry, str(options[0]))
            self.interview.tell(f"{name}: {options[0]}")
            return
        self._refused(name, asked, problem)
        absent = isinstance(problem, NotHereError) and key.name == "tokenizers"
        answer = self._ask_place(key, entry, options, before, _FETCH if absent else None)
        if answer:
            self._put(key, entry, answer)

    def _refused(self, name: str, asked: set[str], problem: UsageError) -> None:
        """Tell what is wrong with the last answer, when there was one."""
        if name in asked:
            if not self.interview.asker.patient:
                raise problem
            self.interview.asker.refuse(problem)
        asked.add(name)

    def _blamed(self, problem: UsageError, keys: list[AskedKey]) -> tuple[AskedKey, str] | None:
        """The key whose file a problem names."""
        for key in keys:
            value = self.section.get(key.name)
            sources = value if key.is_table and isinstance(value, dict) else {"": value}
            for entry, source in sources.items():
                place = source.get("path") if isinstance(source, Mapping) else None
                if place and any(str(place) in (part.where or "") for part in (problem, *problem.parts)):
                    return key, entry
        return None

    def _ask_place(
        self, key: AskedKey, entry: str, options: list[Path], before: str | None, without: str | None
    ) -> str:
        name = ".".join(filter(None, ("model", key.name, entry)))
        shown = [Option(value=str(path), title=str(path)) for path in options]
        if without is not None:
            shown.append(Option(value=NOTHING, title=f"{NOTHING} ({without})"))
        default = before or (str(options[0]) if options else NOTHING if without is not None else None)
        return self.interview.ask(
            Question(
                id=name,
                kind="place",
                text=key.ask.question.format(name=entry),
                help=plain_help(key),
                options=tuple(shown),
                default=default,
                read=partial(_existing, without is not None),
            )
        )

    def _candidates(self, key: AskedKey, name: str) -> list[Path]:
        if key.name == "tokenizers":
            return nearest_first(self.found.tokenizers, name)
        return nearest_first(self.found.parts.get((self.section["family"], name), []), name)

    def _place_now(self, key: AskedKey, entry: str) -> str | None:
        """What an existing configuration of the same model says."""
        if self.now.get("family") != self.section["family"]:
            return None
        value = self.now.get(key.name)
        value = value.get(entry) if entry and isinstance(value, Mapping) else value
        path = value.get("path") if isinstance(value, Mapping) else None
        return path if isinstance(path, str) else None

    def _put(self, key: AskedKey, entry: str, place: str) -> None:
        source = {"path": place}
        if key.is_table:
            self.section.setdefault(key.name, {})[entry] = source
        else:
            self.section[key.name] = source

    def _always(self, keys: list[AskedKey]) -> None:
        for key in keys:
            if key.ask.when != "always" or key.name == "path":
                continue
            if key.is_table and key.entries:
                for entry in key.entries:
                    self._ask_always(key, entry)
            elif not (key.is_table and key.is_place):
                self._ask_always(key, "")

    def _ask_always(self, key: AskedKey, entry: str) -> None:
        if key.is_place:
            name = ".".join(filter(None, (key.name, entry)))
            answer = self._ask_place(
                key, entry, self._candidates(key, name), self._place_now(key, entry), "leave out"
            )  # fmt: skip
            if answer:
                self._put(key, entry, answer)
            return
        now, default = self.now.get(key.name), key.field.get_default(call_default_factory=True)
        if entry:
            now, default = (each.get(entry) if isinstance(each, Mapping) else None for each in (now, default))
        value = self.interview.ask(question_of(key, now, entry=entry))
        # Answers are as JSON has them.
        if now is None and value == (list(default) if isinstance(default, tuple) else default):
            return
        if entry:
            self.section.setdefault(key.name, {})[entry] = value
        else:
            self.section[key.name] = value

    def _optional(self, keys: list[AskedKey], facts: ModelFacts) -> bool:
        """Offer what the model can do without and does not have; whether something was added."""
        added = False
        for key in keys:
            for entry in key.ask.optional:
                if entry in facts.components or entry in self.section.get(key.name, {}):
                    continue
                options = self._candidates(key, f"{key.name}.{entry}")
                answer = self._ask_place(key, entry, options, self._place_now(key, entry), "train without it")
                if answer:
                    self._put(key, entry, answer)
                    added = True
        return added


def _existing(optional: bool, raw: Any) -> str:
    """A place that is there, as an absolute path, or a hub id; empty for nothing where that is allowed."""
    text = text_or_nothing(raw)
    if not text:
        if optional:
            return ""
        raise UsageError("a file, a folder or a hub id is needed")
    local = Path(text).expanduser().absolute()
    if local.exists():
        return str(local)
    if is_hub_id(text, Path.cwd()):
        return text
    raise _no_place(text)
