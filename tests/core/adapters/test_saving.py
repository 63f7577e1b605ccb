"""Strings in the header of every adapter."""

from __future__ import annotations

import pytest

from tests.core.config.samples import build, toy_facts
from tuner.core.adapters.saving import adapter_strings


@pytest.mark.parametrize(
    ("noise", "weighting", "scheme"),
    [
        ({"timesteps": "uniform"}, "uniform", "uniform"),
        ({"timesteps": "uniform"}, "cosmap", "cosmap"),
        ({"timesteps": "sigma", "density": "mode"}, "uniform", "mode"),
        ({"timesteps": "logit_normal"}, "none", "logit_normal"),
        ({"timesteps": "logit_normal"}, "sigma_sqrt", "sigma_sqrt"),
    ],
)
def test_one_string_names_the_weight_or_where_there_is_none_the_density(noise, weighting, scheme) -> None:
    config = build(noise=noise, loss={"weighting": weighting})
    assert adapter_strings(config, toy_facts())["ss_weighting_scheme"] == scheme


def test_ranks_are_told_unless_a_file_decides_them() -> None:
    told = adapter_strings(build(network={"rank": 8}), toy_facts())
    assert (told["ss_network_dim"], told["ss_network_alpha"]) == (8, 8)
    assert "ss_network_dim" not in adapter_strings(build(network={"rank": "from_file", "init_from": "a"}), toy_facts())
