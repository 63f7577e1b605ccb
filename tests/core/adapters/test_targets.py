"""Which modules the configuration chooses, in the documented order, and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.core.adapters.toy import FACTS, PATHS, toy_config
from tuner.core.adapters.targets import select_targets
from tuner.core.errors import UsageError


def choose(network: dict[str, Any] | None = None, components: tuple[str, ...] = ("denoiser",)) -> dict[str, Any]:
    config = toy_config(network, components)
    targets = select_targets({name: PATHS[name] for name in components}, config.network, FACTS)
    return {target.path: target for target in targets}


def test_the_default_is_all_that_is_not_excluded() -> None:
    assert set(choose()) == set(PATHS["denoiser"]) - {"embed", "head"}


def test_a_preset_replaces_the_default() -> None:
    assert set(choose({"preset": "mlp"})) == {f"blocks.{i}.mlp.{j}" for i in range(3) for j in (0, 2)}


def test_targets_replace_the_preset_and_its_exclusions() -> None:
    assert set(choose({"preset": "mlp", "targets": [r".*\.q", "head"]})) == {
        *(f"blocks.{i}.q" for i in range(3)),
        "head",
    }


def test_include_lifts_the_built_in_exclusion_and_beats_a_users_exclude() -> None:
    got = choose({"include": ["head", r"blocks\.0\.q"], "exclude": [r".*\.q"]})
    assert "head" in got
    assert "blocks.0.q" in got
    assert "blocks.1.q" not in got
    assert "embed" not in got


def test_a_pattern_must_match_the_whole_path_with_or_without_the_component() -> None:
    assert set(choose({"targets": [r"denoiser\..*\.q"]})) == {f"blocks.{i}.q" for i in range(3)}
    with pytest.raises(UsageError, match="matches no module"):
        choose({"targets": [r"\.q"]})


def test_each_setting_comes_from_the_first_rule_that_gives_it() -> None:
    rules = [
        {"match": r".*mlp.*", "rank": 4},
        {"match": r".*\.0\.mlp.*", "rank": 3, "alpha": 1.0, "lr": 1e-5},
        {"match": r".*k_proj", "rank": 0},
    ]
    got = choose({"rules": rules, "alpha": 8})
    assert (got["blocks.0.mlp.0"].rank, got["blocks.0.mlp.0"].alpha, got["blocks.0.mlp.0"].lr) == (4, 1.0, 1e-5)
    assert (got["blocks.1.mlp.0"].rank, got["blocks.1.mlp.0"].alpha, got["blocks.1.mlp.0"].lr) == (4, 8.0, None)
    assert (got["blocks.1.q"].rank, got["blocks.1.q"].alpha) == (2, 8.0)
    assert not any("k_proj" in path for path in got)


def test_without_any_alpha_it_is_the_modules_own_rank() -> None:
    got = choose({"rules": [{"match": r".*mlp.*", "rank": 5}]})
    assert (got["blocks.0.mlp.0"].alpha, got["blocks.0.q"].alpha) == (5, 2)


def test_rank_zero_with_rules_leaves_what_the_rules_name() -> None:
    assert set(choose({"rank": 0, "rules": [{"match": r".*\.q", "rank": 3}]})) == {f"blocks.{i}.q" for i in range(3)}


@pytest.mark.parametrize(
    ("blocks", "left"),
    [("all", {0, 1, 2}), ([0], {0}), (["1-2"], {1, 2}), ([0, "2-2"], {0, 2})],
)
def test_blocks_cut_last(blocks: Any, left: set[int]) -> None:
    got = choose({"blocks": {"main": blocks}, "include": ["head"]})
    assert {int(path.split(".")[1]) for path in got if path != "head"} == left
    assert "head" in got


def test_no_block_leaves_what_lies_outside_them() -> None:
    assert set(choose({"blocks": {"main": "none"}, "include": ["head"]})) == {"head"}


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"include": ["blokcs.0.q"]}, r"blokcs\.0\.q.*matches no module(.|\n)*close names: blocks\.0\.q"),
        ({"exclude": ["nothing"]}, "network.exclude"),
        ({"rules": [{"match": "nothing", "rank": 1}]}, "network.rules"),
        ({"rules": [{"match": "head", "rank": 1}]}, "has no effect"),
        ({"include": ["("]}, "no regular expression"),
        ({"preset": "mlpp"}, "unknown preset(.|\n)*mlp"),
        ({"blocks": {"mian": "all"}}, "unknown block group(.|\n)*main"),
        ({"blocks": {"main": [3]}}, "there is no block 3(.|\n)*0 to 2"),
        ({"blocks": {"main": ["2-1"]}}, "empty"),
        ({"rank": 0}, "no module gets an adapter(.|\n)*rank is 0"),
        ({"exclude": [".*"]}, "no module gets an adapter"),
        ({"blocks": {"main": "none"}}, "no module gets an adapter"),
    ],
)
def test_a_choice_without_effect_is_an_error(network: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        choose(network)
    assert re.search(message, str(error.value)), str(error.value)


def test_every_component_that_trains_needs_a_module() -> None:
    with pytest.raises(UsageError, match="component words trains"):
        choose({"targets": [r"blocks\..*"]}, ("denoiser", "words"))
