"""The installed plugins, known in three stages so that nothing is imported before it is needed.

Stage 0 reads package metadata only. Stage 1 imports one plugin's descriptor, which is free of torch. Stage 2 imports
its hooks. A failure at any stage belongs to that plugin alone.
"""

from __future__ import annotations

import configparser
import importlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any, TypeVar

from tuner.core.errors import UsageError
from tuner.core.registry.problems import PluginProblem, ProblemMemory, problem_key
from tuner.core.types import API_VERSION, ExtensionPlugin, ModelPlugin

MODELS, EXTENSIONS = "tuner.models", "tuner.extensions"
HOME = "tuner"
"""The distribution whose plugins are built in and whose names nobody else may take."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One plugin as package metadata describes it. ``value`` is ``module:attribute`` of its descriptor."""

    name: str
    group: str
    value: str
    dist: str
    version: str
    summary: str = ""

    @property
    def kind(self) -> str:
        return "model" if self.group == MODELS else "extension"

    @property
    def builtin(self) -> bool:
        return self.dist == HOME


@dataclass
class Catalog:
    """Installed plugins. ``path`` limits the search to these folders, ``sys.path`` when None."""

    path: Sequence[str] | None = None
    memory: ProblemMemory = field(default_factory=ProblemMemory)
    problems: list[PluginProblem] = field(default_factory=list)
    _entries: dict[tuple[str, str], Entry] | None = None
    _descriptors: dict[tuple[str, str], ModelPlugin | ExtensionPlugin] = field(default_factory=dict)

    # --- stage 0 ------------------------------------------------------------------------------------------------------

    def entries(self, group: str) -> list[Entry]:
        """Usable plugins of a group by name: what the metadata shows, nothing is imported."""
        return sorted((entry for entry in self._scan().values() if entry.group == group), key=lambda entry: entry.name)

    def entry(self, group: str, name: str) -> Entry:
        """The plugin called ``name``. UsageError when there is none or its metadata shows a problem."""
        found = self._scan().get((group, name))
        if found is not None:
            return found
        kind = "model" if group == MODELS else "extension"
        for problem in self.problems:
            if problem.name == name:
                raise problem.as_error()
        known = [entry.name for entry in self.entries(group)]
        from difflib import get_close_matches  # 5 ms that --help need not spend

        guess = get_close_matches(name, known, n=1)
        listed = f"installed: {', '.join(known)}" if known else f"no {kind} is installed"
        raise UsageError(
            f"there is no {kind} plugin {name!r}",
            why=listed,
            fix=f"did you mean {guess[0]!r}?" if guess else "tuner plugins list",
        )

    def warnings(self) -> list[PluginProblem]:
        """Problems known without importing: from metadata, and remembered import failures of what is installed."""
        entries = self._scan().values()
        remembered = self.memory.recall()
        known = [remembered.get(problem_key(entry.dist, entry.version, entry.name)) for entry in entries]
        return [*self.problems, *(problem for problem in known if problem is not None)]

    def _scan(self) -> dict[tuple[str, str], Entry]:
        if self._entries is None:
            self._entries = {}
            found: dict[tuple[str, str], list[Entry]] = {}
            for entry in self._read_metadata():
                found.setdefault((entry.group, entry.name), []).append(entry)
            for key, entries in found.items():
                owner = self._owner(entries)
                if owner is not None:
                    self._entries[key] = owner
        return self._entries

    def _owner(self, entries: list[Entry]) -> Entry | None:
        """The one plugin that may use a name; the others become problems."""
        first = entries[0]
        if len(entries) == 1:
            return first
        home = next((entry for entry in entries if entry.builtin), None)
        for entry in entries:
            if entry is home:
                continue
            others = ", ".join(f"{other.dist} {other.version}" for other in entries if other is not entry)
            error = f"the name is reserved by {HOME}" if home else f"the name is also taken by {others}"
            self.problems.append(
                _problem(entry, "metadata", error, f"uninstall one of the two: tuner plugins uninstall {entry.dist}")
            )
        return home

    def _read_metadata(self) -> Iterator[Entry]:
        seen: set[str] = set()
        found = metadata.distributions() if self.path is None else metadata.distributions(path=list(self.path))
        for dist in found:
            result = self._guarded(None, "metadata", lambda dist=dist: _entries_of(dist))  # type: ignore[misc]
            if result is None:
                known = self._guarded(None, "metadata", lambda dist=dist: (dist.name, dist.version))  # type: ignore[misc]
                name, version = known or ("?", "?")
                self.problems[-1] = replace(self.problems[-1], dist=name, version=version)
            for entry, unmet in result or ():
                if entry.dist in seen:
                    continue
                if unmet:
                    hint = f"pip install --upgrade {entry.dist}"
                    self.problems.append(_problem(entry, "metadata", f"needs {unmet}", hint))
                else:
                    yield entry
            seen.update(entry.dist for entry, _ in result or ())

    # --- stage 1 ------------------------------------------------------------------------------------------------------

    def model(self, name: str) -> ModelPlugin:
        """The descriptor of a model plugin. UsageError when it cannot be imported or was made for another API."""
        descriptor = self._descriptor(MODELS, name, ModelPlugin)
        assert isinstance(descriptor, ModelPlugin)
        return descriptor

    def extension(self, name: str) -> ExtensionPlugin:
        """The descriptor of an extension."""
        descriptor = self._descriptor(EXTENSIONS, name, ExtensionPlugin)
        assert isinstance(descriptor, ExtensionPlugin)
        return descriptor

    def _descriptor(self, group: str, name: str, wanted: type) -> ModelPlugin | ExtensionPlugin:
        if (group, name) in self._descriptors:
            return self._descriptors[group, name]
        entry = self.entry(group, name)
        found = self.load(entry, "descriptor", entry.value)
        if not isinstance(found, wanted):
            raise self._refuse(entry, "descriptor", f"{entry.value} is not a {wanted.__name__}")
        assert isinstance(found, ModelPlugin | ExtensionPlugin)
        if found.name != name:
            raise self._refuse(entry, "descriptor", f"it calls itself {found.name!r} and is installed as {name!r}")
        if (trouble := api_trouble(found.api)) is not None:
            error, hint = trouble
            raise self._refuse(entry, "descriptor", error, hint.format(dist=entry.dist))
        self.memory.forget(entry.dist, entry.version, entry.name)
        self._descriptors[group, name] = found
        return found

    # --- all stages ---------------------------------------------------------------------------------------------------

    def load(self, entry: Entry, stage: str, reference: str) -> Any:
        """Import ``module`` or ``module:attribute`` of a plugin; a failure names the plugin and is remembered."""
        before = len(self.problems)
        found = self._guarded(entry, stage, lambda: _resolve(reference))
        if len(self.problems) > before:
            raise self.problems[-1].as_error()
        return found

    def call(self, entry: Entry, what: str, function: Callable[..., T], *arguments: Any) -> T:
        """Call a plugin's function for facts; its UsageErrors pass, anything else is a problem of the plugin."""
        before = len(self.problems)
        found = self._guarded(entry, what, lambda: function(*arguments))
        if len(self.problems) > before:
            raise self.problems[-1].as_error()
        if found is None and what != "detect":
            raise UsageError(f"plugin {entry.name!r} ({entry.dist} {entry.version}): its {what} returned nothing")
        return found  # type: ignore[return-value]

    def _guarded(self, entry: Entry | None, stage: str, action: Callable[[], T]) -> T | None:
        """Run code of a third party. Whatever it raises becomes a problem instead of ending the program."""
        try:
            return action()
        except UsageError:
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001  # one broken plugin must not break the others
            place = entry or Entry(name="?", group="", value="", dist="?", version="?")
            text = f"{type(error).__name__}: {error}".strip().splitlines()[0].rstrip(": ")
            problem = PluginProblem(
                name=place.name,
                dist=place.dist,
                version=place.version,
                stage=stage,
                error=f"{text} (while reading its {stage})",
                hint=f"tuner plugins check {place.name}"
                if stage == "hooks"
                else f"tuner plugins uninstall {place.dist}",
                trace="".join(traceback.format_exception(error)),
            )
            self.problems.append(problem)
            if entry is not None:
                self.memory.remember(problem)
            return None

    def _refuse(self, entry: Entry, stage: str, error: str, hint: str = "") -> UsageError:
        problem = _problem(entry, stage, error, hint or f"tell the author of {entry.dist}")
        self.problems.append(problem)
        self.memory.remember(problem)
        return problem.as_error()


def api_trouble(api: tuple[int, int]) -> tuple[str, str] | None:
    """(error, hint) when a plugin made for ``api`` cannot run here: its major must be ours, its minor not newer."""
    theirs, ours = ".".join(map(str, api)), ".".join(map(str, API_VERSION))
    if api[0] == API_VERSION[0] and api[1] <= API_VERSION[1]:
        return None
    error = f"it is made for hook API {theirs}, this {HOME} has {ours}"
    if api > API_VERSION:
        return error, f"pip install --upgrade {HOME}"
    return error, "pip install --upgrade {dist}"


def _problem(entry: Entry, stage: str, error: str, hint: str) -> PluginProblem:
    return PluginProblem(name=entry.name, dist=entry.dist, version=entry.version, stage=stage, error=error, hint=hint)


def _entries_of(dist: metadata.Distribution) -> list[tuple[Entry, str]]:
    """Plugins of a distribution, each with the requirement on this program that is not met, or ``""``."""
    text = dist.read_text("entry_points.txt")
    if not text or "tuner." not in text:
        return []
    parser = configparser.ConfigParser(delimiters=("=",), interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(text)
    sections = [group for group in (MODELS, EXTENSIONS) if parser.has_section(group)]
    if not sections:
        return []
    name = dist.metadata["Name"] or "unknown"
    summary = "" if name == HOME else dist.metadata["Summary"] or ""
    about = {"dist": name, "version": dist.version, "summary": summary}
    unmet = "" if name == HOME else _unmet(dist)
    return [
        (Entry(name=key, group=group, value=value.split("[")[0].strip(), **about), unmet)
        for group in sections
        for key, value in parser.items(group)
    ]


def _unmet(dist: metadata.Distribution) -> str:
    from packaging.requirements import Requirement  # only installations with foreign plugins pay for it

    for text in dist.requires or ():
        requirement = Requirement(text)
        if requirement.name != HOME or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        installed = metadata.version(HOME)
        if not requirement.specifier.contains(installed, prereleases=True):
            return f"{requirement.name}{requirement.specifier}, this is {installed}"
    return ""


def _resolve(reference: str) -> Any:
    module, _, attribute = reference.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split(".") if attribute else ():
        found = getattr(found, part)
    return found
