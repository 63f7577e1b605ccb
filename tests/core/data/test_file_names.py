"""Captions from file names equal those of bghira/SimpleTuner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers import golden
from tuner.core.config import CaptionsConfig
from tuner.core.data.captions import caption_set
from tuner.core.data.sidecar import raw_caption

TABLE = golden("core/captions_simpletuner.json")
INFORMATION = {"filter_list_reference"}
"""Tables that show what the reference does where this program follows its documentation instead."""


@pytest.mark.parametrize(
    "case",
    TABLE["filename_strategy"],
    ids=lambda case: f"{Path(case['path']).name}-{case['prepend_instance_prompt']}",
)
def test_a_file_name_becomes_the_published_caption(case: dict[str, Any]) -> None:
    prefix = case["instance_prompt"] if case["prepend_instance_prompt"] else None
    config = CaptionsConfig.model_validate({"from": "filename", "rule": "simpletuner", "prefix": prefix})
    found = raw_caption(config, Path(case["path"]), Path(case["path"]).name, None)
    assert caption_set(config, found.text, 9) == (case["expected"],)


def test_only_information_is_left_out() -> None:
    assert set(TABLE) == {"shuffle_variants", "filename_strategy", "textfile_strategy"} | INFORMATION
