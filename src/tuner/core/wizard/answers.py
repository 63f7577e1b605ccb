"""Answers from a file, for scripts: a JSON object from question to answer, comments allowed."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuner.core.config.jsonc import parse
from tuner.core.errors import UsageError
from tuner.core.wizard.questions import Question, Raw, shown


@dataclass(slots=True)
class FileAsker:
    """Answers every question from ``answers``. say: gets what a person would be told.

    UsageError for a question without an answer and without a default, and in the end for answers that were not asked
    for: a misspelt one must not be passed over.
    """

    answers: dict[str, Any]
    where: str
    say: Callable[[str], None]
    patient: bool = False
    asked: list[str] = field(default_factory=list)

    def put(self, question: Question[Any]) -> Raw:
        self.asked.append(question.id)
        raw = _typed(question, self.answers[question.id], self.where) if self.insists(question.id) else question.default
        if raw is not None:
            told = [f"  {option.title}" for option in question.options if option.title != option.value]
            self.say("\n".join([f"{question.text} {shown(raw)}", *told]))
            return raw
        values = ", ".join(option.value for option in question.options)
        raise UsageError(
            f"no answer to {question.id!r}",
            where=self.where,
            why=question.text,
            fix=f'add "{question.id}": ...' + (f", one of: {values}" if values else ""),
        )

    def insists(self, name: str) -> bool:
        return name in self.answers

    def tell(self, text: str) -> None:
        self.say(text)

    def refuse(self, problem: UsageError) -> None:
        raise problem

    def finish(self) -> None:
        left = [name for name in self.answers if name not in self.asked]
        if left:
            near = difflib.get_close_matches(left[0], self.asked, 1)
            raise UsageError(
                f"answers to questions that were not asked: {', '.join(map(repr, left))}",
                where=self.where,
                why=f"asked were {', '.join(self.asked)}",
                fix=f"did you mean {near[0]!r}?" if near else "take them out",
            )


def read_answers(path: Path) -> dict[str, Any]:
    """The answers of a file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("cannot read the answers", where=str(path), why=str(error)) from error
    found = parse(text, str(path)).value
    if not isinstance(found, dict):
        raise UsageError("the answers must be a JSON object", where=str(path), fix='{"goal": "character", ...}')
    return found


def _typed(question: Question[Any], value: Any, where: str) -> Raw:
    wanted = {"confirm": "true or false", "several": "a list of texts"}.get(question.kind, "a text or a number")
    if question.kind == "confirm":
        fits = isinstance(value, bool)
    elif question.kind == "several":
        fits = isinstance(value, list) and all(isinstance(each, str) for each in value)
    else:
        fits = isinstance(value, str | int | float) and not isinstance(value, bool)
    if not fits:
        raise UsageError(f"the answer to {question.id!r} must be {wanted}, got {value!r}", where=where)
    if isinstance(value, bool):
        return value
    return tuple(value) if isinstance(value, list) else str(value)
