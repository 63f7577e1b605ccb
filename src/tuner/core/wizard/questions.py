"""Questions as data, and who can put them: a person at a terminal, or a file of answers."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

from tuner.core.errors import UsageError

T = TypeVar("T")
Raw = str | bool | tuple[str, ...]
"""An answer as it is given: text, yes or no, or the values of several options."""
NOTHING = "-"
"""What is typed to leave something out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """value: what an answers file says; title: what a person reads."""

    value: str
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Question(Generic[T]):
    """One question.

    id: what an answers file calls it. kind: ``text``; ``place``, a text that names a file or folder, with ``options``
    as suggestions; ``choice`` of one option, ``several`` of them; ``confirm``. default: taken when nothing is given,
    None when an answer is required. read: from the raw answer to its value; its UsageError is told, and asked again.
    """

    id: str
    text: str
    read: Callable[[Any], T]
    kind: Literal["text", "place", "choice", "several", "confirm"] = "text"
    help: str = ""
    options: tuple[Option, ...] = ()
    default: Raw | None = None


class Asker(Protocol):
    """Puts questions. ``patient``: whether it asks again when an answer will not do."""

    patient: bool

    def put(self, question: Question[Any]) -> Raw:
        """The raw answer. KeyboardInterrupt when the user wants out."""

    def insists(self, name: str) -> bool:
        """Whether there is an answer to this question already, so that it is put even where a guess would do."""

    def tell(self, text: str) -> None:
        """Something to know before the next question; several lines."""

    def refuse(self, problem: UsageError) -> None:
        """The last answer will not do; it will be asked again."""

    def finish(self) -> None:
        """No more questions. UsageError when answers are left that nobody asked for."""


@dataclass(slots=True)
class Interview:
    """Asks until an answer will do. given: the answers that did, by question, as an answers file has them."""

    asker: Asker
    given: dict[str, Raw] = field(default_factory=dict)

    def ask(self, question: Question[T]) -> T:
        while True:
            raw = self.asker.put(question)
            try:
                value = question.read(_among(question, raw))
            except (UsageError, OSError) as error:
                # What the file system has against a path is an answer that will not do, too.
                problem = error if isinstance(error, UsageError) else UsageError(error.strerror or str(error))
                named = UsageError(
                    problem.what, where=f"{question.id}: {shown(raw)}", why=problem.why, fix=problem.fix
                )  # fmt: skip
                if not self.asker.patient:
                    raise named from error
                self.asker.refuse(named)
            else:
                self.given[question.id] = raw
                return value

    def tell(self, *lines: str) -> None:
        self.asker.tell("\n".join(lines))

    def confirm(self, name: str, text: str, *, default: bool | None = None, help: str = "") -> bool:
        return self.ask(Question(id=name, text=text, kind="confirm", read=bool, default=default, help=help))

    def choose(
        self, name: str, text: str, options: tuple[Option, ...], *, default: str | None = None, help: str = ""
    ) -> str:
        return self.ask(
            Question(id=name, text=text, kind="choice", read=str, options=options, default=default, help=help)
        )


def text_or_nothing(raw: Any) -> str:
    """The text without blanks around it; empty for the mark of leaving out."""
    text = str(raw).strip()
    return "" if text == NOTHING else text


def _among(question: Question[Any], raw: Raw) -> Raw:
    """The answer, when it is one of the options that it must be."""
    known = [option.value for option in question.options]
    chosen = {"choice": (raw,), "several": raw}.get(question.kind, ())
    assert isinstance(chosen, tuple)
    for each in chosen:
        if each not in known:
            near = difflib.get_close_matches(str(each), known, 1)
            raise UsageError(
                f"there is no choice {each!r}",
                why=f"there are {', '.join(known)}",
                fix=f"did you mean {near[0]!r}?" if near else None,
            )
    return raw


def shown(raw: Raw) -> str:
    """The answer as a person would write it."""
    if isinstance(raw, bool):
        return "yes" if raw else "no"
    return ", ".join(raw) if isinstance(raw, tuple) else raw
