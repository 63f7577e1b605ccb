"""The folded VAE against the reference's numbers and against diffusers' 3-D network.

Golden data: executions of kohya-ss/sd-scripts on a tiny random VAE, float32, CPU (tests/golden/anima).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fixtures.tiny_anima import vae_tensors
from tests.helpers import golden, golden_path
from tuner.core.compute.weights import read_tensors
from tuner.core.errors import UsageError
from tuner.core.files import safetensors_header
from tuner.core.rng import Rng
from tuner.plugins.anima import latents
from tuner.plugins.anima.latents import VAE

PARITY = 1e-5


def build(tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> VAE:
    found = latents.names(tensors)
    shapes = {name: tuple(tensors[key].shape) for name, key in found.items()}
    return latents.build(((name, tensors[key]) for name, key in found.items()), shapes, dtype=dtype)


@pytest.fixture(scope="module")
def vae() -> VAE:
    header = safetensors_header(golden_path("anima/vae_weights.safetensors"))
    return latents.build(read_tensors(header), {name: header.shape(name) for name in header}, dtype=torch.float32)


@pytest.fixture(scope="module")
def reference() -> Any:
    """diffusers' own network on the golden weights, under its own names."""
    from diffusers import AutoencoderKLQwenImage

    network = AutoencoderKLQwenImage(
        base_dim=6, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True]
    )
    weights = golden("anima/vae_weights.safetensors")
    own_names = latents.names(network.state_dict())
    network.load_state_dict({key: weights[name] for name, key in own_names.items()}, strict=True)
    return network.eval()


def test_posterior_latents_and_pixels_equal_the_reference(vae: VAE) -> None:
    expected = golden("anima/vae_io.safetensors")
    with torch.no_grad():
        mean, logvar = vae.posterior(expected["pixels"])
        results = {
            "posterior_mean": mean,
            "posterior_logvar": logvar,
            "latents": vae.encode(expected["pixels"]),
            "decode_out": vae.decode(expected["decode_in"]),
            "roundtrip": vae.decode(vae.encode(expected["pixels"])),
        }
    for name, result in results.items():
        assert (result - expected[name]).abs().max() <= PARITY, name


def test_both_key_layouts_give_the_same_network(vae: VAE, reference: Any) -> None:
    other = build(reference.state_dict())
    assert set(latents.names(reference.state_dict())) == set(golden("anima/vae_weights.safetensors"))
    for name, value in vae.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_folding_equals_the_3d_network_at_two_and_a_half_times_fewer_flops(vae: VAE, reference: Any) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    pixels = torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        with FlopCounterMode(display=False) as full_encode:
            mean = reference.encode(pixels[:, :, None]).latent_dist.mean[:, :, 0]
        with FlopCounterMode(display=False) as folded_encode:
            folded_mean, _ = vae.posterior(pixels)
        with FlopCounterMode(display=False) as full_decode:
            picture = reference.decode(mean[:, :, None]).sample[:, :, 0]
        with FlopCounterMode(display=False) as folded_decode:
            folded_picture = vae.decode((mean - vae.latent_mean) / vae.latent_std)
    assert (mean - folded_mean).abs().max() <= PARITY
    assert (picture - folded_picture).abs().max() <= PARITY
    assert full_encode.get_total_flops() >= 2.5 * folded_encode.get_total_flops()
    assert full_decode.get_total_flops() >= 2.5 * folded_decode.get_total_flops()


@pytest.mark.parametrize("rows", [2, 3, 6, 16])
def test_bands_of_rows_change_nothing(rows: int) -> None:
    whole, banded = (build(golden("anima/vae_weights.safetensors")) for _ in range(2))
    banded.set_band_rows(rows)
    data = golden("anima/vae_io.safetensors")
    with torch.no_grad():
        assert (whole.encode(data["pixels"]) - banded.encode(data["pixels"])).abs().max() <= 1e-6
        assert (whole.decode(data["decode_in"]) - banded.decode(data["decode_in"])).abs().max() <= 1e-6


def test_bands_lower_no_precision_at_odd_heights() -> None:
    tensors = vae_tensors(torch.Generator().manual_seed(1))
    whole, banded = build(tensors), build(tensors)
    banded.set_band_rows(4)
    pixels = torch.rand(1, 3, 88, 40, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        assert (whole.encode(pixels) - banded.encode(pixels)).abs().max() <= 1e-6


def test_a_posterior_sample_is_the_mean_plus_scaled_noise(vae: VAE) -> None:
    pixels = golden("anima/vae_io.safetensors")["pixels"]
    noise = Rng(7, "image").normal((2, 16, 4, 6))
    with torch.no_grad():
        mean, logvar = vae.posterior(pixels)
        sample = vae.encode(pixels, noise=noise)
    expected = (mean + torch.exp(0.5 * logvar) * noise - vae.latent_mean) / vae.latent_std
    assert torch.equal(sample, expected)
    assert not torch.equal(sample, vae.encode(pixels))


def test_decoded_pixels_stay_in_range(vae: VAE) -> None:
    with torch.no_grad():
        pixels = vae.decode(torch.full((1, 16, 4, 4), 50.0))
    assert pixels.min() >= -1.0
    assert pixels.max() <= 1.0


def test_bfloat16_weights_give_float32_latents_near_the_float32_ones(vae: VAE) -> None:
    pixels = golden("anima/vae_io.safetensors")["pixels"]
    low = build(golden("anima/vae_weights.safetensors"), torch.bfloat16)
    with torch.no_grad():
        exact, rounded = vae.encode(pixels), low.encode(pixels)
    assert rounded.dtype == torch.float32
    assert (exact - rounded).norm() / exact.norm() < 0.03


def test_any_base_width_is_read_from_the_weights() -> None:
    vae = build(vae_tensors(torch.Generator().manual_seed(0)))
    with torch.no_grad():
        assert vae.encode(torch.zeros(1, 3, 32, 16)).shape == (1, 16, 4, 2)


def test_missing_and_unknown_weights_are_named() -> None:
    tensors = golden("anima/vae_weights.safetensors")
    del tensors["encoder.head.2.bias"]
    tensors["encoder.extra.weight"] = torch.zeros(1)
    with pytest.raises(UsageError, match="do not fit") as caught:
        build(tensors)
    assert "missing: encoder.head.2.bias" in str(caught.value)
    assert "unknown: encoder.extra.weight" in str(caught.value)


def test_another_autoencoder_is_refused() -> None:
    with pytest.raises(UsageError, match="not a Qwen-Image VAE"):
        build({"encoder.conv_in.weight": torch.zeros(8, 3, 3, 3), "decoder.conv_in.weight": torch.zeros(8, 4, 3, 3)})


def test_a_pth_file_loads_through_the_restricted_loader(tmp_path: Path, vae: VAE) -> None:
    from tuner.plugins.anima.load import _read_pickle

    path = tmp_path / "vae.pth"
    torch.save(golden("anima/vae_weights.safetensors"), path)
    assert torch.equal(build(_read_pickle(path)).conv2.weight, vae.conv2.weight)


def test_a_pth_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    from tuner.plugins.anima.load import _read_pickle

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    path = tmp_path / "vae.pth"
    torch.save({"conv1.bias": Evil()}, path)
    with pytest.raises(UsageError, match="plain weights"):
        _read_pickle(path)
    assert not (tmp_path / "ran").exists()
