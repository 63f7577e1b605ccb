"""Editing a configuration changes the values that were asked for and leaves every comment where it was."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.core.config.edit import edited_text, unified_diff
from tuner.core.config.jsonc import parse

TEXT = """\
// mine, since spring
{
  "model": {"family": "toy", "path": "a.safetensors"}, // the new one
  /* the pictures
     of the trip */
  "data": {
    "sets": [
      {"resolution": 512, "sources": [{"id": "a", "path": "images"}]} // one folder
    ],
  },
  "train": {
    // long
    "steps": 2000, // was 1500
    "seed": 7 // lucky
  },
  "network": {}
}
"""


def value() -> dict[str, Any]:
    found = parse(TEXT, "t").value
    assert isinstance(found, dict)
    return found


def comments(text: str) -> list[str]:
    return re.findall(r"//[^\n]*|/\*.*?\*/", text, re.DOTALL)


def edited(new: dict[str, Any], notes: dict[Any, str] | None = None) -> str:
    text = edited_text(TEXT, new, "t", notes)
    assert parse(text, "t").value == new
    return text


def test_equal_values_change_nothing() -> None:
    assert edited_text(TEXT, value(), "t") == TEXT


def test_one_value_changes_one_line() -> None:
    new = value()
    new["train"]["steps"] = 900
    assert edited(new) == TEXT.replace('"steps": 2000,', '"steps": 900,')
    diff = unified_diff(TEXT, edited(new), "config.json")
    assert [line for line in diff.splitlines() if line[:1] in "+-"][2:] == [
        '-    "steps": 2000, // was 1500', '+    "steps": 900, // was 1500'
    ]  # fmt: skip


def test_a_new_key_comes_last_in_the_layout_of_its_neighbours() -> None:
    new = value()
    new["train"]["batch_size"] = 2
    new["network"]["rank"] = 8
    new["model"]["flavour"] = "large"
    new["optimizer"] = {"lr": 1e-4}
    text = edited(new, {("train", "batch_size"): "two at a time"})
    assert '"seed": 7, // lucky\n    // two at a time\n    "batch_size": 2\n  },' in text
    assert '"path": "a.safetensors", "flavour": "large"}, // the new one' in text
    assert '"network": {"rank": 8},\n  "optimizer": {\n    "lr": 0.0001\n  }\n}' in text
    assert comments(text)[-1] == "// two at a time"


def test_a_key_that_goes_leaves_the_comments() -> None:
    new = value()
    del new["train"]["seed"], new["network"]
    text = edited(new)
    assert comments(text) == comments(TEXT)
    assert '"steps": 2000 // was 1500\n    // lucky' in text


def test_lists_grow_and_shrink_at_the_end() -> None:
    new = value()
    sets = new["data"]["sets"]
    sets[0]["sources"].append({"id": "b", "path": "more"})
    sets.append({"resolution": 768, "sources": [{"id": "c", "path": "third"}]})
    text = edited(new)
    assert comments(text) == comments(TEXT)
    assert edited_text(text, value(), "t").count("\n") == TEXT.count("\n")


def test_line_ends_and_a_byte_order_mark_stay() -> None:
    new = value()
    new["train"]["batch_size"] = 2
    windows = "\ufeff" + TEXT.replace("\n", "\r\n")
    text = edited_text(windows, new, "t")
    assert text.startswith("\ufeff//")
    assert "\n" not in text.replace("\r\n", "")
    assert parse(text, "t").value == new


def test_an_object_with_a_comment_alone_takes_a_key() -> None:
    for text in ('{"a": {\n  // nothing yet\n}}', '{"a": { /* nothing */ }}', '{"a": {} }', "{}", "{ // x\n}"):
        new = {"a": {"b": 1}}
        assert parse(edited_text(text, new, "t"), "t").value == new
        assert comments(edited_text(text, new, "t")) == comments(text)


def test_a_comment_of_the_caller_follows_its_value_and_others_stay() -> None:
    text = '{\n  // auto 1\n  "a": 1,\n  // mine\n  "b": 2,\n  // auto 3\n  "c": 3,\n  // auto 4\n  "d": 4\n}\n'
    new = {"a": 5, "b": 6, "d": 7}
    changed = edited_text(text, new, "t", {("a",): "auto 5", ("b",): "auto 6"}, is_own=lambda note: "auto" in note)
    assert changed == '{\n  // auto 5\n  "a": 5,\n  // mine\n  "b": 6,\n  "d": 7\n}\n'


plain = st.recursive(
    st.none() | st.booleans() | st.integers(0, 9) | st.text("ab/*,", max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcd"), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.sampled_from("abcd"), plain, max_size=4)


def spread(value: Any, notes: list[str], pad: str = "") -> str:
    """JSON with a comment at every place that takes one."""
    inner = pad + "  "
    if isinstance(value, dict | list) and value:
        notes.append(f"// n{len(notes)}")
        out = "{ " if isinstance(value, dict) else "[ "
        out += notes[-1] + "\n"
        entries = value.items() if isinstance(value, dict) else ((None, each) for each in value)
        for key, each in entries:
            notes.append(f"/* n{len(notes)} */")
            mine = notes[-1]
            label = "" if key is None else f'"{key}": '
            body = spread(each, notes, inner)
            notes.append(f"// n{len(notes)}")
            out += f"{inner}{label}{body} {mine}, {notes[-1]}\n"
        return out + pad + ("}" if isinstance(value, dict) else "]")
    return json.dumps(value)


@given(objects, objects)
@settings(max_examples=60, deadline=None)
def test_whatever_changes_the_result_reads_as_asked_and_equal_parts_keep_their_comments(
    old: dict[str, Any], new: dict[str, Any]
) -> None:
    text = spread(copy.deepcopy(old), [])
    changed = edited_text(text, new, "t")
    assert parse(changed, "t").value == new
    assert edited_text(changed, new, "t") == changed
    same = {**old, "z": 1}
    assert comments(edited_text(text, same, "t")) == comments(text)
