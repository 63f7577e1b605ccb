"""The reader takes JSON, comments and trailing commas, knows the line of each key, and names what is wrong where."""

from __future__ import annotations

import json

import pytest

from tuner.core.config.jsonc import parse
from tuner.core.errors import UsageError


def message(text: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse(text, "c.json")
    return str(caught.value)


def test_comments_and_trailing_commas_are_allowed() -> None:
    text = '{ // one\n "a": [1, 2,], /* two\n lines */ "b": {"c": null,}, }'
    assert parse(text, "c.json").value == {"a": [1, 2], "b": {"c": None}}


@pytest.mark.parametrize(
    "text",
    ['{"a": "x // y /* z */"}', '[-1.5e-3, 0, 10, true, false, null, "\\u00e9\\n"]', '"\\\\"', "{}", "[]", "[[[]]]"],
)
def test_plain_json_means_the_same_as_to_the_standard_reader(text: str) -> None:
    assert parse(text, "c.json").value == json.loads(text)


def test_a_byte_order_mark_is_ignored() -> None:
    assert parse("\ufeff{}", "c.json").value == {}


def test_every_key_and_entry_has_its_line() -> None:
    lines = parse('{\n "a": {\n  "b": [\n   1,\n   2]}}', "c.json").lines
    assert lines == {("a",): 2, ("a", "b"): 3, ("a", "b", 0): 4, ("a", "b", 1): 5}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '{"a": 1 "b": 2}',
            "not valid JSON: expected ',' or '}' in the object, found '\"'\n  at: c.json, line 1, column 9",
        ),
        ('{\n"a": True}', "expected a value, found 'True'\n  at: c.json, line 2, column 6\n  fix: write true"),
        (
            '{"a": yes}',
            "expected a value, found 'yes'\n  at: c.json, line 1, column 7\n  fix: put text in double quotes",
        ),
        ('{"a": 1, "a": 2}', "the key 'a' comes twice in one object\n  at: c.json, line 1, column 10"),
        ("{'a': 1}", 'expected a key in double quotes, found "\'"'),
        ('{"a": "C:\\models"}', "write \\\\ for a backslash, or use / in paths"),
        ('{"a": .5}', "expected a value, found '.'"),
        ('{"a": 01}', "expected a value, found '0'"),
        ('{"a": NaN}', "expected a value, found 'NaN'"),
        ("{} {}", "text after the end of the document"),
        ("{", "an unclosed object"),
        ("[1,", "an unclosed list"),
        ('{"a"', "expected ':' after the key 'a'"),
        ("", "the text ends where a value should be"),
        ("/* never", "a comment that is never closed"),
        ('"two\nlines"', "a string that is not closed on its line"),
        ("[" * 200, "nested too deeply"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(text: str, expected: str) -> None:
    assert expected in message(text)
