"""Who puts the questions of ``tuner configure``: questionary on a full terminal, else rich, or a file of answers."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.cli.console import out
from tuner.core.errors import UsageError
from tuner.core.wizard.questions import NOTHING, Asker, Question, Raw

if TYPE_CHECKING:
    from rich.console import Console

YES, NO = ("y", "yes", "true"), ("n", "no", "false")
_MARGIN = 5
"""Columns of a menu before its texts, and one after."""
ELSEWHERE = object()
"""What stands for a place that is not among the suggestions."""


def open_asker(answers: Path | None, *, quiet: bool = False) -> Asker:
    """A file when there is one, which may answer without a word, else whoever suits the terminal."""
    if answers is not None:
        from tuner.core.wizard.answers import FileAsker, read_answers

        return FileAsker(read_answers(answers), str(answers), _nothing if quiet else out)
    if sys.stdin is None:
        raise _nobody("standard input is closed")
    full = sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    if full and importlib.util.find_spec("questionary") is not None:
        return QuestionaryAsker()
    return LineAsker()


def _nobody(why: str, question: str | None = None) -> UsageError:
    return UsageError("the answers ended", where=question, why=why, fix="tuner configure --answers FILE")


def _nothing(text: str) -> None:
    """Where the result alone is printed."""


class LineAsker:
    """Plain lines, with rich's colours where the terminal has them; needs no cursor keys, so a pipe serves as well."""

    patient = True

    def __init__(self) -> None:
        from rich.console import Console

        self.console: Console = Console(highlight=False, soft_wrap=True)

    def put(self, question: Question[Any]) -> Raw:
        self._print(question.text, style="bold")
        if question.help:
            self._print(f"  {question.help}", style="dim")
        for number, option in enumerate(question.options, 1):
            self._print(f"  {number}  {option.title}")
        while True:
            answer = self._line(question)
            raw = self._raw(question, answer)
            if raw is not None:
                return raw
            self.refuse(UsageError("an answer is needed", where=question.id))

    def insists(self, name: str) -> bool:
        return False

    def tell(self, text: str) -> None:
        self._print(text, style="cyan")

    def refuse(self, problem: UsageError) -> None:
        self._print(str(problem), style="red")

    def finish(self) -> None:
        """Nothing can be left over."""

    def _print(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, markup=False)

    def _line(self, question: Question[Any]) -> str:
        hint = _hint(question)
        try:
            return self.console.input(f"{hint}> ", markup=False).strip()
        except EOFError as error:
            raise _nobody("there is nobody to ask, or Ctrl-D was typed", question.id) from error

    def _raw(self, question: Question[Any], answer: str) -> Raw | None:
        """What was meant: an option by its number or value, yes or no; None for nothing where something is needed."""
        if not answer:
            return question.default
        values = [option.value for option in question.options]
        named = [values[int(each) - 1] if each.isdigit() and 0 < int(each) <= len(values) else each
                 for each in (part.strip() for part in answer.split(","))]  # fmt: skip
        if question.kind == "several":
            return tuple(named)
        if question.kind == "confirm":
            word = answer.lower()
            return True if word in YES else False if word in NO else None
        return named[0] if question.options and len(named) == 1 else answer


class QuestionaryAsker:
    """Menus and completion of paths, on a full terminal."""

    patient = True

    def __init__(self) -> None:
        self.lines = LineAsker()

    def put(self, question: Question[Any]) -> Raw:
        if question.help:
            self.lines._print(f"  {question.help}", style="dim")
        try:
            return self._ask(question)
        except EOFError as error:
            raise _nobody("Ctrl-D was typed", question.id) from error

    def _ask(self, question: Question[Any]) -> Raw:
        import questionary

        if question.kind == "confirm":
            # Where somebody has to say yes, the Enter key alone does not.
            return bool(questionary.confirm(question.text, default=question.default is True).unsafe_ask())
        if question.kind == "several":
            choices = [questionary.Choice(option.title, option.value) for option in question.options]
            return tuple(questionary.checkbox(question.text, choices=choices).unsafe_ask())
        if question.kind == "choice" or (question.kind == "place" and question.options):
            answer = self._choice(question)
            if answer is not ELSEWHERE:
                return str(answer)
        default = question.default if isinstance(question.default, str) else ""
        ask = questionary.path if question.kind == "place" else questionary.text
        shown = "" if default == NOTHING else default
        # What was suggested stands on the line: who deletes it does not mean it.
        return str(ask(question.text, default=shown).unsafe_ask()) or (NOTHING if default == NOTHING else "")

    def insists(self, name: str) -> bool:
        return False

    def tell(self, text: str) -> None:
        self.lines.tell(text)

    def refuse(self, problem: UsageError) -> None:
        self.lines.refuse(problem)

    def finish(self) -> None:
        """Nothing can be left over."""

    def _choice(self, question: Question[Any]) -> object:
        import questionary

        choices = [questionary.Choice(title, option.value)
                   for title, option in zip(self._titles(question), question.options, strict=True)]  # fmt: skip
        if question.kind == "place":
            choices.append(questionary.Choice("another place", ELSEWHERE))
        known = [option.value for option in question.options]
        default = question.default if question.default in known else None
        return questionary.select(question.text, choices=choices, default=default).unsafe_ask()

    def _titles(self, question: Question[Any]) -> list[str]:
        """What the entries of a menu say: a menu cuts its lines, so long ones are told above it, where they wrap."""
        width = shutil.get_terminal_size().columns - _MARGIN
        if all(len(option.title) <= width for option in question.options):
            return [option.title for option in question.options]
        for option in question.options:
            self.lines._print(f"  {option.title}")
        # Of a path the end tells most.
        return [value if len(value) <= width else f"…{value[1 - width :]}"
                for value in (option.value for option in question.options)]  # fmt: skip


def _hint(question: Question[Any]) -> str:
    """What an empty line means."""
    if question.kind == "confirm":
        return "[y/n] " if question.default is None else "[Y/n] " if question.default else "[y/N] "
    if question.kind == "several":
        return "numbers, with commas "
    return f"[{question.default}] " if question.default is not None else ""
