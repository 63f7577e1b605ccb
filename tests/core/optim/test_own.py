"""The optimizers of this package against their formulas, written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tuner.core.optim.adamw_bf16 import AdamWBf16
from tuner.core.optim.muon import Muon, orthogonalised
from tuner.core.optim.rounding import fresh_generator, round_kahan, round_stochastic


def gradients(shape: tuple[int, ...], count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def run(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, steps: list[torch.Tensor]) -> torch.Tensor:
    for gradient in steps:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def test_random_rounding_is_right_on_average_and_hits_neighbours_only() -> None:
    value = torch.full((20_000,), 1.0 + 1 / 1024)
    rounded = round_stochastic(value, fresh_generator(torch.device("cpu"), 1)).float()
    assert set(rounded.tolist()) == {1.0, 1.0078125}
    assert abs(float(rounded.mean()) - float(value[0])) < 1e-4


def test_random_rounding_keeps_what_bfloat16_can_say_and_what_is_no_number() -> None:
    exact = torch.tensor([0.0, -0.0, 1.5, -3.0, math.inf, -math.inf, math.nan])
    rounded = round_stochastic(exact, fresh_generator(torch.device("cpu"), 2)).float()
    assert torch.equal(rounded[:-1], exact[:-1]) and rounded[-1].isnan()


def test_random_rounding_repeats_for_the_same_path_only() -> None:
    value = torch.rand(100)
    once, again, other = (round_stochastic(value, fresh_generator(torch.device("cpu"), *path)) for path in
                          ((1, "a"), (1, "a"), (2, "a")))  # fmt: skip
    assert torch.equal(once, again) and not torch.equal(once, other)


def test_two_bfloat16_numbers_hold_sixteen_bits() -> None:
    value = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    rounded, rest = round_kahan(value)
    assert torch.equal(rounded, value.to(torch.bfloat16))
    assert float(((rounded.float() + rest.float() - value) / value).abs().max()) < 2**-16


def test_adamw_bf16_follows_adamw_as_closely_as_its_averages_allow() -> None:
    start, steps = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)), gradients((64, 32), 200)
    exact, ours = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    expected = run(torch.optim.AdamW([exact], lr=1e-2, weight_decay=0.1), exact, steps)
    found = run(AdamWBf16([ours], lr=1e-2, weight_decay=0.1), ours, steps)
    moved = (expected - start).norm()
    assert float((found - expected).norm() / moved) < 0.02


def test_averages_of_adamw_bf16_do_not_stand_still() -> None:
    """Rounded to the nearest, the second one would stay where the first gradients put it."""
    parameter = nn.Parameter(torch.zeros(4096))
    optimizer = AdamWBf16([parameter], betas=(0.9, 0.999))
    for size, count in ((1.0, 1), (0.1, 1000)):
        for _ in range(count):
            parameter.grad = torch.full((4096,), size)
            optimizer.step()
    expected = 0.999**1000 * 0.001 + (1 - 0.999**1000) * 0.01
    assert float(optimizer.state[parameter]["exp_avg_sq"].float().mean()) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_newton_schulz_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalised(matrix, 5))
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3


def test_a_matrix_moves_along_the_orthogonal_factor_and_a_vector_as_in_adamw() -> None:
    matrix, vector = nn.Parameter(torch.ones(8, 4)), nn.Parameter(torch.ones(5))
    same = nn.Parameter(torch.ones(5))
    step, other = gradients((8, 4), 1)[0], gradients((5,), 1)[0]
    matrix.grad, vector.grad, same.grad = step, other, other.clone()
    Muon([matrix, vector], lr=0.1, weight_decay=0.5).step()
    torch.optim.AdamW([same], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(vector, same)
    # The first momentum is a multiple of the gradient, and the direction does not depend on its length.
    expected = 0.95 - 0.1 * 0.2 * math.sqrt(8) * orthogonalised(step, 5)
    torch.testing.assert_close(matrix.detach(), expected, rtol=1e-4, atol=1e-5)
