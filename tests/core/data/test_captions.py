"""Captions: every draw is a pure function of settings, text, rng, epoch and step, and only listed texts occur."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from tests.helpers import golden
from tuner.core.config import CaptionsConfig
from tuner.core.data.captions import (
    caption_set,
    draw_caption,
    plain_caption,
    shuffled_orders,
)
from tuner.core.rng import Rng

REFERENCE = golden("core/captions_sd_scripts.json")
OTHER = golden("core/captions_simpletuner.json")


def settings(**values) -> CaptionsConfig:
    return CaptionsConfig.model_validate(values)


def from_sd_scripts(case: dict, rule: str) -> CaptionsConfig:
    """The reference's options of a golden row in this program's names."""
    options = REFERENCE["defaults"] | case["options"]
    values = {
        "rule": rule,
        "prefix": options["caption_prefix"],
        "suffix": options["caption_suffix"],
        "dropout": options["caption_dropout_rate"],
        "dropout_every_n_epochs": options["caption_dropout_every_n_epochs"],
        "wildcards": options["enable_wildcard"],
        "lines": "random" if options["enable_wildcard"] else "first",
        "shuffle": options["shuffle_caption"],
        "tag_dropout": options["caption_tag_dropout_rate"],
        "keep_first": options["keep_tokens"],
        "fixed_marker": options["keep_tokens_separator"],
        "separator": options["caption_separator"],
        "group_separator": options["secondary_separator"],
        "replace": [{"find": find, "with": to} for find, to in case.get("repl", {}).items()],
    }
    steps = options["token_warmup_step"]
    if steps:
        values["tag_warmup"] = {
            "from": options["token_warmup_min"],
            "steps": f"{steps * 100:g}%" if steps < 1 else int(steps),
        }
    return settings(**values)


def differs_on_purpose(case: dict) -> bool:
    """Rows that only the import-compatible rule reproduces."""
    options, lines = case["options"], "\n" in case["caption"]
    by_tags = {"shuffle_caption", "caption_tag_dropout_rate", "token_warmup_step"} & set(options)
    marker_stays = "keep_tokens_separator" in options and not by_tags
    return marker_stays or (lines and bool({"caption_prefix", "caption_suffix"} & set(options)))


def rows(kind: str, rule: str) -> list:
    cases = [case for case in REFERENCE[kind] if rule == "sd_scripts" or not differs_on_purpose(case)]
    return [pytest.param(rule, case, id=f"{rule}: {case['note']} {case.get('step', '')}".strip()) for case in cases]


def draw(config: CaptionsConfig, raw: str, visit: int = 0, *, epoch: int = 1, step: int = 0, max_steps: int = 0) -> str:
    return draw_caption(config, raw, rng=Rng(7, "visit", visit), epoch=epoch, step=step, max_steps=max_steps)


@pytest.mark.parametrize(("rule", "case"), rows("deterministic", "sd_scripts") + rows("deterministic", "tuner"))
def test_the_text_equals_the_reference(rule, case):
    text = draw(
        from_sd_scripts(case, rule),
        case["caption"],
        epoch=case.get("epoch", 1),
        step=case.get("step", 0),
        max_steps=case.get("max_steps", 0),
    )
    assert text == case["expected"]


@pytest.mark.parametrize(("rule", "case"), rows("stochastic", "sd_scripts") + rows("stochastic", "tuner"))
def test_draws_reach_exactly_the_reference_texts_about_as_often(rule, case):
    config, draws = from_sd_scripts(case, rule), 1500
    counts = dict.fromkeys(case["reachable"], 0)
    for visit in range(draws):
        counts[draw(config, case["caption"], visit, epoch=case.get("epoch", 1))] += 1
    for text, share in case["frequency"].items():
        spread = math.sqrt(share * (1 - share) * (1 / draws + 1 / case["draws"]))
        assert abs(counts[text] / draws - share) < 5 * spread, text
    assert min(counts.values()) > 0


@pytest.mark.parametrize("case", OTHER["shuffle_variants"])
def test_fixed_orders_equal_the_other_reference(case):
    config = case["config"]
    if not config["enable"]:
        plain = settings(rule="simpletuner")
        assert caption_set(plain, case["caption"], 99) == tuple(case["expected"])
        return
    shuffling = settings(
        rule="simpletuner",
        separator={"comma": ",", "space": " ", "period": "."}[config.get("split_on", "comma")],
        keep_first=config.get("position_start", 0),
        variants={
            "count": config["count"],
            "seed": config.get("seed", case["base_seed"]),
            "include_original": config.get("include_original", True),
        },
    )
    assert shuffled_orders(shuffling, case["caption"]) == case["expected"]
    assert caption_set(shuffling, case["caption"], 99) == tuple(case["expected"])


@pytest.mark.parametrize("case", OTHER["textfile_strategy"])
def test_caption_files_are_read_as_by_the_other_reference(case):
    config = settings(
        rule="simpletuner",
        lines="join" if case["disable_multiline_split"] else "random",
        prefix=case["instance_prompt"] if case["prepend_instance_prompt"] else None,
    )
    expected = case["expected"] if isinstance(case["expected"], list) else [case["expected"]]
    assert caption_set(config, case["text"], 99) == tuple(expected)


def random_settings(draws: random.Random) -> CaptionsConfig:
    """Some caption settings that work, of any rule."""
    rule = draws.choice(["tuner", "tuner", "sd_scripts", "simpletuner"])
    values = {
        "rule": rule,
        "prefix": draws.choice([None, "{p|q} of"]),
        "suffix": draws.choice([None, "end"]),
        "lines": draws.choice(["first", "random", "join"]),
        "keep_first": draws.choice([0, 0, 1, 5]),
        "replace": draws.choice(
            [[], [{"find": "b", "with": "B"}], [{"find": r"(\w)$", "with": r"<\1>", "regex": True}]]
        ),
    }
    if rule == "simpletuner":
        return settings(**values, variants=draws.choice([None, 2, {"count": 3, "include_original": False}]))
    shuffle, tag_dropout = draws.choice([False, True]), draws.choice([0, 0, 0.5, 1.0])
    values |= {
        "shuffle": shuffle,
        "tag_dropout": tag_dropout,
        "wildcards": draws.choice([False, True]),
        "fixed_marker": draws.choice([None, "|||"]),
        "group_separator": draws.choice([None, ";;"]),
    }
    if draws.random() < 0.3:
        return settings(**values, tag_warmup={"from": draws.choice([0, 1, 4]), "steps": 6})
    return settings(**values, variants=draws.choice([None, 2]) if shuffle or tag_dropout else None)


TEXTS = (
    "", "a", "a, b, c", "a, b ||| c;;d, {x|y} ||| e", "one {1|2|3}\n\n two, b \nthree", " ,a,,b ", "{{a}} {b|}, {c",
    "||| a",
)  # fmt: skip


def test_every_draw_is_in_the_set_and_small_sets_are_drawn_completely():
    draws, checked = random.Random(3), 0
    for config, raw in itertools.product([random_settings(draws) for _ in range(60)], TEXTS):
        texts = caption_set(config, raw, 1000)
        if texts is None:
            continue
        assert len(set(texts)) == len(texts)
        seen = {draw(config, raw, visit, step=visit % 8, max_steps=8) for visit in range(12)}
        assert seen <= set(texts), (config, raw)
        if config.tag_dropout < 1 and (config.variants is None or config.variants.include_original):
            assert plain_caption(config, raw) in texts, (config, raw)
        if len(texts) <= 2:
            more = {draw(config, raw, visit, step=visit % 8, max_steps=8) for visit in range(64)}
            assert more == set(texts), (config, raw)
        checked += 1
    assert checked > 250


def test_a_set_above_the_limit_is_not_listed():
    shuffled = settings(shuffle=True)
    assert caption_set(shuffled, "a, b, c", 6) is not None
    assert caption_set(shuffled, "a, b, c", 5) is None
    assert caption_set(shuffled, ", ".join(map(str, range(40))), 32) is None
    assert caption_set(settings(wildcards=True), "{a|b|c|d}" * 30, 32) is None


def test_the_set_leaves_out_whole_caption_dropout():
    assert caption_set(settings(dropout=0.5, dropout_every_n_epochs=2), "a, b", 32) == ("a, b",)


def test_variants_bound_what_shuffling_draws_and_depend_on_text_and_seed_only():
    raw = "a, b, c, d, e, f, g, h"
    bounded = settings(shuffle=True, tag_dropout=0.2, variants=4)
    texts = caption_set(bounded, raw, 32)
    assert texts is not None
    assert texts[0] == raw
    assert len(texts) == 5
    assert {draw(bounded, raw, visit, epoch=visit, step=visit) for visit in range(200)} == set(texts)
    reseeded = settings(shuffle=True, tag_dropout=0.2, variants={"count": 4, "seed": 1})
    assert set(caption_set(reseeded, raw, 32) or ()) != set(texts)


def test_the_marker_never_stays_in_the_text():
    assert draw(settings(fixed_marker="|||"), "a, b ||| c,, d ||| e") == "a, b, c, d, e"
    assert draw(settings(fixed_marker="|||", rule="sd_scripts"), "a ||| b") == "a ||| b"


def test_prefix_and_suffix_belong_to_the_chosen_line():
    config = settings(prefix="P", suffix="S", lines="random")
    assert caption_set(config, "l1\n l2 \n\nl3", 9) == ("P l1 S", "P l2 S", "P l3 S")
    assert plain_caption(config, "l1\nl2") == "P l1 S"


def test_only_line_breaks_end_a_line():
    text = "a\u2028b\x85c\x0cd"
    assert draw(settings(), f"{text}\r\nnext") == text
    assert draw(settings(), f"{text}\rnext") == text


def test_joined_lines_keep_their_breaks():
    assert draw(settings(lines="join"), " a, b\nc \n") == "a, b\nc"


def test_join_and_separator_are_free():
    config = settings(separator=".", join=" / ", tag_dropout=1.0, keep_first=2)
    assert draw(config, "a. b. c") == "a / b"


def test_warmup_counts_a_share_of_the_planned_steps():
    config = settings(tag_warmup={"from": 1, "steps": "50%"})
    drawn = [draw(config, "a, b, c, d, e", step=step, max_steps=16) for step in range(10)]
    assert [text.count(",") + 1 for text in drawn] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_replacements_run_in_order_with_text_and_patterns():
    steps = [
        {"find": "arafed "},
        {"find": "cat", "with": "dog"},
        {"find": r"^a (\w+)", "with": r"the \1", "regex": True},
    ]
    assert draw(settings(replace=steps), "arafed a cat and cat") == "the dog and dog"
