from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tuner.core.compute.autoencoder import autoencoder_names, decode_image, encode_image, load_autoencoder
from tuner.core.errors import UsageError
from tuner.core.files import weight_header
from tuner.core.rng import Rng

LEVELS = 4


@pytest.fixture(scope="module")
def stock():
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * LEVELS,
        up_block_types=("UpDecoderBlock2D",) * LEVELS,
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def original_name(name: str) -> str:
    """diffusers' name to the original one, written out independently of the table under test."""
    parts = name.split(".")
    side = parts[0]
    if parts[1] == "conv_norm_out":
        return ".".join([side, "norm_out", *parts[2:]])
    if parts[1] == "mid_block":
        if parts[2] == "resnets":
            return ".".join([side, "mid", f"block_{int(parts[3]) + 1}", *parts[4:]])
        inner = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}[parts[4]]
        return ".".join([side, "mid.attn_1", inner, parts[-1]])
    if parts[1] in ("down_blocks", "up_blocks"):
        level = int(parts[2]) if side == "encoder" else LEVELS - 1 - int(parts[2])
        down = "down" if side == "encoder" else "up"
        if parts[3] == "resnets":
            return ".".join([side, down, str(level), "block", *parts[4:]]).replace("conv_shortcut", "nin_shortcut")
        return ".".join([side, down, str(level), f"{down}sample", *parts[5:]])
    return name


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
def test_original_names_with_any_prefix_load_as_the_same_autoencoder(stock, tmp_path, prefix):
    tensors = {}
    for name, value in stock.state_dict().items():
        spelled = original_name(name)
        flat = ".attn_1." in spelled and value.ndim == 2
        tensors[prefix + spelled] = (value[:, :, None, None] if flat else value).contiguous()
    assert any(".mid.attn_1.q." in name for name in tensors)
    save_file(tensors, tmp_path / "ae.safetensors")
    loaded = load_autoencoder(weight_header(tmp_path / "ae.safetensors"), dtype=torch.float32)
    pixels = Rng(0, "pixels").uniform((1, 3, 16, 24)) * 2 - 1
    assert torch.equal(encode_image(loaded, pixels, None, scale=1, shift=0), stock.encode(pixels).latent_dist.mean)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in stock.state_dict().items())


def test_diffusers_names_load_and_encode_and_decode_use_scale_and_shift(stock, tmp_path):
    save_file(stock.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    loaded = load_autoencoder(weight_header(tmp_path), dtype=torch.float32)
    pixels = Rng(0, "pixels").uniform((2, 3, 16, 24)) * 2 - 1
    mode = encode_image(loaded, pixels, None, scale=0.5, shift=0.25)
    assert torch.allclose(mode, (stock.encode(pixels).latent_dist.mean - 0.25) * 0.5)
    assert torch.allclose(
        decode_image(loaded, mode, scale=0.5, shift=0.25),
        stock.decode(mode / 0.5 + 0.25).sample.clamp(-1, 1),
        atol=1e-6,
    )
    sample = encode_image(loaded, pixels, Rng(1), scale=0.5, shift=0.25)
    assert not torch.equal(sample, mode)
    assert torch.equal(sample, encode_image(loaded, pixels, Rng(1), scale=0.5, shift=0.25))


def test_missing_and_unknown_tensors_are_named(stock, tmp_path):
    tensors = dict(stock.state_dict())
    del tensors["decoder.conv_out.bias"]
    tensors["decoder.surplus.weight"] = torch.zeros(1)
    save_file(tensors, tmp_path / "ae.safetensors")
    with pytest.raises(UsageError, match=r"decoder\.conv_out\.bias.*decoder\.surplus\.weight"):
        load_autoencoder(weight_header(tmp_path / "ae.safetensors"), dtype=torch.float32)
    with pytest.raises(UsageError, match="not a KL autoencoder"):
        save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
        load_autoencoder(weight_header(tmp_path / "other.safetensors"), dtype=torch.float32)


def test_names_of_both_spellings_meet(stock):
    names = list(stock.state_dict())
    assert autoencoder_names(names) == {name: name for name in names}
    assert set(autoencoder_names(map(original_name, names))) == set(names)
