"""Who asks: what an empty line, a lone Enter key, the end of the input and a closed input mean."""

from __future__ import annotations

import io
import sys
import types
from typing import Any

import pytest

from tuner.cli.askers import LineAsker, QuestionaryAsker, open_asker
from tuner.core.errors import UsageError
from tuner.core.wizard.questions import Interview, Option, Question, text_or_nothing


class Menus(types.ModuleType):
    """Stands in for questionary: notes what it was given, and gives the answers of a user in turn."""

    def __init__(self, *answers: Any) -> None:
        super().__init__("questionary")
        self.answers, self.given = list(answers), list[dict[str, Any]]()
        self.text = self.path = self.confirm = self.select = self.checkbox = self._ask
        self.titles: list[str] = []
        self.Choice = self._choice

    def _choice(self, title: str, value: object) -> object:
        self.titles.append(title)
        return value

    def _ask(self, text: str, **given: Any) -> Menus:
        self.given.append(given)
        return self

    def unsafe_ask(self) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


@pytest.fixture
def menus(monkeypatch: pytest.MonkeyPatch) -> Menus:
    found = Menus()
    monkeypatch.setitem(sys.modules, "questionary", found)
    return found


def question(**other: Any) -> Question[str]:
    given: dict[str, Any] = {"id": "x", "text": "Which word?", "read": text_or_nothing} | other
    return Question(**given)


def test_where_a_yes_is_needed_the_enter_key_is_none(menus: Menus) -> None:
    menus.answers = [False, True, True]
    interview = Interview(QuestionaryAsker())
    assert interview.confirm("write", "Change the file?") is False
    interview.confirm("new", "Write it?", default=True)
    interview.confirm("deep", "Subfolders?", default=False)
    assert [each["default"] for each in menus.given] == [False, True, False]


def test_a_suggestion_that_was_deleted_is_not_meant(menus: Menus) -> None:
    menus.answers = ["", "", "mila", "zoe"]
    interview = Interview(QuestionaryAsker())
    assert interview.ask(question(default="mila")) == ""
    assert interview.ask(question(default="-")) == ""
    assert interview.ask(question(default="mila")) == "mila"
    assert interview.ask(question()) == "zoe"
    assert [each["default"] for each in menus.given] == ["mila", "", "mila", ""]


def test_ctrl_d_ends_with_how_to_answer_and_ctrl_c_is_left_to_the_command(menus: Menus) -> None:
    menus.answers = [EOFError(), KeyboardInterrupt()]
    with pytest.raises(UsageError, match="Ctrl-D"):
        QuestionaryAsker().put(question())
    with pytest.raises(KeyboardInterrupt):
        QuestionaryAsker().put(question())


def test_another_place_than_those_offered_can_be_typed(menus: Menus) -> None:
    options = (Option(value="/a", title="/a"),)
    asker = QuestionaryAsker()
    menus.answers = ["/a"]
    assert asker.put(question(kind="place", options=options)) == "/a"
    from tuner.cli.askers import ELSEWHERE

    menus.answers = [ELSEWHERE, "/b"]
    assert asker.put(question(kind="place", options=options, default="/a")) == "/b"


def test_lines_that_a_menu_would_cut_are_told_above_it(
    menus: Menus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    long = Option(value="quick", title="quick: rank 16, 1024 px, 500 steps; 15.3 GB, about 2 h")
    menus.answers = ["quick", "/models/very/deep/in/a/folder/of/weights"]
    asker = QuestionaryAsker()
    asker.put(question(kind="choice", options=(long, Option(value="slow", title="slow"))))
    assert menus.titles == ["quick", "slow"]
    assert "15.3 GB, about 2 h" in capsys.readouterr().out
    path = "/models/very/deep/in/a/folder/of/weights"
    assert asker.put(question(kind="place", options=(Option(value=path, title=path),))) == path
    assert menus.titles[2] == "…s/very/deep/in/a/folder/of/weights"


def test_closed_input_is_told_before_the_first_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UsageError, match="standard input is closed"):
        open_asker(None)


def test_plain_lines_take_numbers_values_and_the_proposal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (Option(value="one", title="the first"), Option(value="two", title="the second"))
    monkeypatch.setattr("sys.stdin", io.StringIO("2\none\n\nmaybe\ny\n1, two\n\nmila, a dog\n"))
    asker = LineAsker()
    choice = question(kind="choice", options=options, default="two")
    assert [asker.put(choice) for _ in range(3)] == ["two", "one", "two"]
    assert asker.put(question(kind="confirm")) is True
    assert asker.put(question(kind="several", options=options)) == ("one", "two")
    assert asker.put(question()) == "mila, a dog"
    assert capsys.readouterr().out.count("an answer is needed") == 2
