"""The noisy input, the target, disturbed noise, and the preview sampler."""

from __future__ import annotations

import math

import pytest
import torch

from tests.helpers import golden
from tuner.core.config import InputPerturbation, NoiseOffset
from tuner.core.flow import (
    apply_cfg,
    euler_sample,
    euler_sigmas,
    heun_sample,
    offset_noise,
    perturb_noise,
    rectified_flow,
    rescale_cfg,
)

CASES = golden("core/noise.json")["cases"]
DATA = golden("core/noise.safetensors")
PREVIEW = golden("anima/preview_sampler.safetensors")
ALWAYS = torch.zeros(2)


@pytest.mark.parametrize("case", [case for case in CASES if "noise_offset" in case], ids=lambda case: case["key"])
def test_noise_offset_equals_the_reference(case: dict) -> None:
    config = NoiseOffset(strength=case["noise_offset"], adaptive=case["adaptive_noise_scale"] or 0.0)
    normal = DATA["channel_normal"].flatten(1)
    got = offset_noise(config, DATA["noise"], DATA["latents"], normal=normal, strength=torch.ones(2), chance=ALWAYS)
    torch.testing.assert_close(got, DATA[case["key"]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES if "ip_noise_gamma" in case], ids=lambda case: case["key"])
def test_input_perturbation_equals_the_reference_and_leaves_the_target_alone(case: dict) -> None:
    config = InputPerturbation(gamma=case["ip_noise_gamma"])
    normal = DATA["perturbation_normal"]
    noise = perturb_noise(config, DATA["noise"], normal=normal, strength=torch.rand(2), step=7, total=10)
    noisy = rectified_flow(DATA["latents"], noise, DATA["sigma"]).noisy
    torch.testing.assert_close(noisy, DATA[case["key"]], rtol=1e-6, atol=1e-6)


def test_every_noise_case_is_checked() -> None:
    assert all("noise_offset" in case or "ip_noise_gamma" in case for case in CASES)


def test_noise_offset_is_one_constant_per_sample_and_channel_for_the_drawn_share_of_samples() -> None:
    noise, latents = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    normal = torch.arange(6.0).view(2, 3) + 1
    config = NoiseOffset(strength=0.5, random=True, probability=0.4)
    got = offset_noise(
        config, noise, latents, normal=normal, strength=torch.tensor([0.5, 1.0]), chance=torch.tensor([0.39, 0.4])
    )
    assert torch.equal(got[0], (0.25 * normal[0]).view(3, 1, 1).expand(3, 4, 4))
    assert not got[1].any()


def test_input_perturbation_fades_to_nothing_over_its_steps() -> None:
    noise, normal = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    fades = [
        perturb_noise(config, noise, normal=normal, strength=torch.tensor([0.5]), step=step, total=8).mean().item()
        for config in (InputPerturbation(gamma=0.4, steps=4), InputPerturbation(gamma=0.4, steps="50%", random=True))
        for step in (0, 1, 4, 100)
    ]
    assert fades == pytest.approx([0.4, 0.3, 0.0, 0.0, 0.2, 0.15, 0.0, 0.0])


def test_the_ends_of_the_flow_are_the_latents_and_the_noise() -> None:
    latents, noise = DATA["latents"], DATA["noise"]
    out = rectified_flow(latents, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(out.noisy[0], latents[0])
    assert torch.equal(out.noisy[1], noise[1])
    assert torch.equal(out.target, noise - latents)
    assert out.timesteps.tolist() == [0.0, 1.0]
    assert out.weight.tolist() == [1.0, 1.0]


def test_everything_is_float32_even_for_bfloat16_latents() -> None:
    out = rectified_flow(DATA["latents"].bfloat16(), DATA["noise"].bfloat16(), DATA["sigma"])
    assert {out.noisy.dtype, out.target.dtype, out.sigmas.dtype, out.timesteps.dtype} == {torch.float32}


def test_the_preview_schedule_equals_the_reference() -> None:
    torch.testing.assert_close(euler_sigmas(6, 3.0), PREVIEW["sigmas"], rtol=1e-5, atol=1e-7)
    assert euler_sigmas(1, 3.0).tolist() == [1.0, 0.0]


def test_a_sampler_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one step"):
        euler_sigmas(0, 1.0)


def test_the_sampler_lands_on_the_latents_when_the_velocity_is_right() -> None:
    latents, noise = DATA["latents"], DATA["noise"]
    seen: list[tuple[torch.Size, torch.dtype]] = []

    def predict(noisy: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        seen.append((sigmas.shape, sigmas.dtype))
        assert noisy.dtype == torch.float32
        return noise - latents

    steps: list[int] = []
    out = euler_sample(predict, noise, euler_sigmas(5, 3.0), on_step=steps.append)
    torch.testing.assert_close(out, latents, rtol=1e-5, atol=1e-5)
    assert steps == [1, 2, 3, 4, 5]
    assert set(seen) == {(torch.Size([2]), torch.float32)}


def test_heun_is_of_second_order_and_predicts_twice_but_at_the_end() -> None:
    """dx / dsigma = x, whose value at 0 is 1/e of that at 1."""
    errors = []
    for steps in (10, 20):
        seen: list[float] = []

        def predict(noisy: torch.Tensor, sigmas: torch.Tensor, seen: list[float] = seen) -> torch.Tensor:
            seen.append(sigmas.item())
            return noisy

        counted: list[int] = []
        out = heun_sample(predict, torch.ones(1, 1, 1, 1), euler_sigmas(steps, 1.0), on_step=counted.append)
        errors.append(abs(out.item() - math.exp(-1)))
        assert counted == list(range(1, steps + 1))
        assert len(seen) == 2 * steps - 1 and min(seen) > 0
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    euler = euler_sample(lambda x, s: x, torch.ones(1, 1, 1, 1), euler_sigmas(20, 1.0))
    assert errors[0] < abs(euler.item() - math.exp(-1)) / 5


def test_rescaled_guidance_has_the_contrast_of_the_prediction_without() -> None:
    generator = torch.Generator().manual_seed(0)
    positive = torch.randn(2, 3, 4, 4, generator=generator).bfloat16()
    guided = 5 * torch.randn(2, 3, 4, 4, generator=generator) + 1
    assert rescale_cfg(guided, positive, 0.0) is guided
    fully = rescale_cfg(guided, positive, 1.0)
    axes = (1, 2, 3)
    torch.testing.assert_close(fully.std(axes), positive.float().std(axes))
    torch.testing.assert_close(rescale_cfg(guided, positive, 0.25), 0.25 * fully + 0.75 * guided)


def test_a_bfloat16_model_does_not_round_the_latents() -> None:
    out = euler_sample(lambda x, s: torch.full_like(x, 2**-9).bfloat16(), torch.ones(1, 1, 1, 1), euler_sigmas(2, 1.0))
    assert out.item() == 1 - 2**-9


def test_guidance_of_one_is_the_positive_prediction_and_zero_the_negative() -> None:
    positive, negative = torch.tensor([3.0]), torch.tensor([1.0])
    assert [apply_cfg(positive, negative, scale).item() for scale in (0.0, 1.0, 2.5)] == [1.0, 3.0, 6.0]


def test_the_table_schedule_ends_just_above_zero_and_then_at_zero() -> None:
    sigmas = euler_sigmas(4, 1.0, "table")
    torch.testing.assert_close(sigmas, torch.tensor([1.0, 0.667, 0.334, 0.001, 0.0]), rtol=1e-5, atol=1e-6)
    assert euler_sigmas(1, 3.0, "table").tolist() == [1.0, 0.0]
