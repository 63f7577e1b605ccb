"""A key of a feature that is not built is refused by that name; a secret is refused everywhere."""

from __future__ import annotations

from typing import Any

import pytest

from tests.core.config.samples import build, minimal
from tuner.core.config import RunConfig
from tuner.core.config.messages import known_keys
from tuner.core.config.planned import NOT_APPLICABLE, PLANNED, PLANNED_VALUES
from tuner.core.errors import UsageError


def nested(pattern: str, value: Any) -> dict[str, Any]:
    document: Any = value
    for part in reversed(pattern.split(".")):
        document = [document] if part == "*" else {part: document}
    return document  # type: ignore[no-any-return]


def refused(document: dict[str, Any]) -> str:
    merged = minimal() | document
    with pytest.raises(UsageError) as caught:
        from tuner.core.config import build_config

        build_config(merged)
    return str(caught.value)


@pytest.mark.parametrize("pattern", sorted(PLANNED))
def test_a_planned_key_says_that_it_is_not_built_yet(pattern: str) -> None:
    assert f"{pattern.replace('.*', '[0]')} is planned and not built yet" in refused(nested(pattern, True))


@pytest.mark.parametrize("pattern", sorted(NOT_APPLICABLE))
def test_an_inapplicable_key_says_why(pattern: str) -> None:
    message = refused(nested(pattern, True))
    assert f"{pattern} does not apply" in message
    assert NOT_APPLICABLE[pattern] in message


@pytest.mark.parametrize(
    ("pattern", "value"), [(pattern, value) for pattern, values in PLANNED_VALUES.items() for value in values]
)
def test_a_planned_value_says_that_it_is_not_built_yet(pattern: str, value: str) -> None:
    message = refused(nested(pattern, value))
    assert "is planned and not built yet" in message or "is not written" in message


@pytest.mark.parametrize("pattern", sorted({**PLANNED, **NOT_APPLICABLE}))
def test_no_table_names_a_key_of_the_schema(pattern: str) -> None:
    path = tuple(0 if part == "*" else part for part in pattern.split("."))
    assert path[-1] not in known_keys(RunConfig, path[:-1])


def test_planned_keys_are_recognised_where_sources_inherit_them_from() -> None:
    for data in ({"defaults": {"adapter_strength": 1}}, {"sets": [{"adapter_strength": 1, "sources": []}]}):
        assert "adapter_strength is planned and not built yet" in refused({"data": data})


def test_each_planned_key_is_reported_once() -> None:
    assert refused({"publish": {"repo": "x", "private": True}}).count("planned") == 1


@pytest.mark.parametrize("path", ["log.wandb_api_key", "model.token", "optimizer.args.password", "webhook.secret"])
def test_secrets_are_refused_wherever_they_are(path: str) -> None:
    message = refused(nested(path, "hunter2"))
    if not path.startswith("webhook"):
        assert "a secret does not belong into a configuration" in message
    assert "hunter2" not in message


def test_a_count_of_tokens_is_no_secret() -> None:
    assert build(text_encoder={"max_tokens": {"text": 5}}).text_encoder.max_tokens == {"text": 5}
