"""Pixels: every kind of file becomes upright RGB in -1..1, cut as planned, with its mask cut alike."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.core.data.pictures import data_config, pattern, picture
from tests.helpers import golden
from tuner.core.config import CropConfig, SetConfig
from tuner.core.data.augment import MAX_HUE, shift_color, turn_hue
from tuner.core.data.buckets import set_geometry
from tuner.core.data.crops import crop_offset, zoomed
from tuner.core.data.encode import reduce_mask
from tuner.core.data.images import load_pixels
from tuner.core.data.index import scan_source
from tuner.core.data.records import Fit, ImageRecord
from tuner.core.errors import UsageError
from tuner.core.rng import Rng


def indexed(path: Path, **source) -> ImageRecord:
    """The record of one image, as a run would get it."""
    data = data_config(path.parent, captions={"on_missing": "empty"}, **source)
    index = scan_source(data.sets[0].sources[0], path.parent / ".cache", data=data)
    assert not index.problems, [str(problem) for problem in index.problems]
    return next(record for record in index.records if record.path == path)


def whole(record: ImageRecord) -> Fit:
    """No resize, no crop."""
    return Fit(image=record.size, bucket=record.size, resized=record.size, crop=(0, 0))


def levels(pixels: torch.Tensor) -> np.ndarray:
    """[3,H,W] in -1..1 as [H,W,3] in 0..255."""
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    return ((pixels.permute(1, 2, 0) + 1) * 127.5).numpy()


def loaded(path: Path, mask: str | None = None) -> tuple[np.ndarray, torch.Tensor | None]:
    record = indexed(path)
    pixels, weights = load_pixels(record, whole(record), mask=mask)
    return levels(pixels), weights


def test_rgb_values_are_kept(tmp_path):
    path = picture(tmp_path / "a.png", 24, 16, seed=9)
    pixels, mask = loaded(path)
    assert np.abs(pixels - pattern(24, 16, 9)).max() < 1e-3
    assert mask is None


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_pixel_layout_becomes_rgb(tmp_path, mode):
    source = Image.fromarray(pattern(24, 16)).convert(mode)
    extension = "tiff" if mode == "CMYK" else "png"
    source.save(tmp_path / f"a.{extension}")
    pixels, _ = loaded(tmp_path / f"a.{extension}")
    expected = np.asarray(source.convert("RGB"), dtype=np.float32)
    assert np.abs(pixels - expected).max() < 1.01


def test_a_cmyk_jpeg_is_converted(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    pixels, _ = loaded(tmp_path / "a.jpg")
    assert np.abs(pixels[8, 8] - [255, 0, 0]).max() < 8


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    values = np.linspace(0, 65535, 16 * 16).reshape(16, 16).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    pixels, _ = loaded(tmp_path / "a.png")
    assert np.abs(pixels[..., 0] - values / 257.0).max() < 1.0
    assert (pixels[..., 0] == pixels[..., 2]).all()


def test_transparency_is_laid_over_white(tmp_path):
    colours = np.zeros((16, 16, 4), np.uint8)
    colours[:8, :, 0] = 200
    colours[:, :8, 3] = 255
    Image.fromarray(colours).save(tmp_path / "a.png")
    pixels, _ = loaded(tmp_path / "a.png")
    assert np.abs(pixels[0, 0] - [200, 0, 0]).max() < 1e-3
    assert np.abs(pixels[0, 15] - 255).max() < 1e-3


def test_a_transparent_palette_colour_is_laid_over_white(tmp_path):
    paletted = Image.fromarray(pattern(16, 16)).quantize(8)
    first = paletted.getpixel((0, 0))
    paletted.save(tmp_path / "a.png", transparency=first)
    pixels, _ = loaded(tmp_path / "a.png")
    assert np.abs(pixels[0, 0] - 255).max() < 1e-3


def test_the_alpha_mask_weights_pixels_and_keeps_the_colour_under_it(tmp_path):
    colours = np.dstack([pattern(16, 16), np.full((16, 16), 255, np.uint8)])
    colours[:, 8:, 3] = 0
    colours[:, 7, 3] = 51
    Image.fromarray(colours).save(tmp_path / "a.png")
    pixels, mask = loaded(tmp_path / "a.png", mask="alpha")
    assert np.abs(pixels - colours[..., :3]).max() < 1e-3
    assert mask is not None
    assert mask.dtype == torch.float32
    assert mask.shape == (16, 16)
    assert mask[0, [0, 7, 8]].tolist() == pytest.approx([1.0, 0.2, 0.0])


def test_an_image_without_alpha_has_a_mask_of_ones(tmp_path):
    _, mask = loaded(picture(tmp_path / "a.png"), mask="alpha")
    assert mask is not None
    assert torch.equal(mask, torch.ones(16, 24))


def test_a_mask_file_is_cut_like_the_image(tmp_path):
    path = picture(tmp_path / "images" / "a.png", 40, 20)
    marks = np.zeros((20, 40, 3), np.uint8)
    marks[:, 20:] = (255, 7, 7)
    (tmp_path / "masks").mkdir()
    Image.fromarray(marks).save(tmp_path / "masks" / "a.png")
    record = indexed(path, mask={"path": str(tmp_path / "masks")})
    fit = Fit(image=record.size, bucket=(16, 16), resized=(32, 16), crop=(8, 0))
    _, mask = load_pixels(record, fit, mask="file")
    assert mask is not None
    assert mask.shape == (16, 16)
    assert mask[:, :7].max() < 0.01
    assert mask[:, 9:].min() > 0.99
    _, mirrored = load_pixels(record, fit, mask="file", flip=True)
    assert mirrored is not None
    assert torch.equal(mirrored, mask.flip(1))


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_the_orientation_is_applied(tmp_path, extension, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    save = {"quality": 100} if extension in ("jpg", "webp") else {}
    path = picture(tmp_path / f"a.{extension}", 48, 32, exif=exif, **save)
    pixels, _ = loaded(path)
    upright = np.asarray(pattern(48, 32), dtype=np.float32)
    turned = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, -1), 7: upright[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(upright, 1),
    }[orientation]  # fmt: skip
    assert pixels.shape == turned.shape
    assert np.abs(pixels - turned).mean() < 4


def test_resizing_and_cropping_reach_the_planned_size(tmp_path):
    record = indexed(picture(tmp_path / "a.png", 200, 100))
    config = SetConfig.model_validate(
        {"sources": [{"id": "s", "path": "s"}], "resolution": 64, "buckets": {"min": 32, "step": 16}}
    )
    fit = set_geometry(config, (64, 64), 8).fit(*record.size)
    assert isinstance(fit, Fit)
    pixels, _ = load_pixels(record, fit)
    assert pixels.shape == (3, fit.bucket[1], fit.bucket[0])
    assert -1 <= pixels.min() <= pixels.max() <= 1
    left, _ = load_pixels(record, fit, crop=(0, 0))
    assert left[0].mean() <= pixels[0].mean()
    assert torch.equal(load_pixels(record, fit, flip=True)[0], pixels.flip(2))


def test_shrinking_means_over_areas_and_the_method_can_be_named(tmp_path):
    checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(np.dstack([checks] * 3)).save(tmp_path / "a.png")
    record = indexed(tmp_path / "a.png")
    fit = Fit(image=(64, 64), bucket=(16, 16), resized=(16, 16), crop=(0, 0))
    assert load_pixels(record, fit)[0].abs().max() < 0.01
    assert torch.equal(load_pixels(record, fit, resize="area")[0], load_pixels(record, fit)[0])
    assert load_pixels(record, fit, resize="nearest")[0].abs().min() == 1
    larger = Fit(image=(64, 64), bucket=(96, 96), resized=(96, 96), crop=(0, 0))
    enlarged = {name: load_pixels(record, larger, resize=name)[0] for name in ("auto", "lanczos", "area", "bilinear")}
    assert torch.equal(enlarged["auto"], enlarged["lanczos"])
    assert torch.equal(enlarged["area"], enlarged["bilinear"])
    assert not torch.equal(enlarged["auto"], enlarged["area"])


def test_an_image_that_broke_or_changed_after_indexing_is_named(tmp_path):
    path = picture(tmp_path / "a.png", 24, 16)
    record = indexed(path)
    picture(path, 30, 16)
    with pytest.raises(UsageError, match=r"changed after it was indexed\n(.|\n)*30x16 instead of 24x16"):
        load_pixels(record, whole(record))
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UsageError, match=r"an image cannot be used\n  at: .*a.png"):
        load_pixels(record, whole(record))
    path.unlink()
    with pytest.raises(UsageError, match=r"a\.png"):
        load_pixels(record, whole(record))


def test_what_a_worker_gets_and_raises_survives_pickling(tmp_path):
    record = indexed(picture(tmp_path / "a.png"))
    arguments = pickle.loads(pickle.dumps((record, whole(record), Rng(1, "color"))))
    assert arguments[:2] == (record, whole(record))
    assert load_pixels(*arguments[:2], color=arguments[2])[0].shape == (3, 16, 24)


def offset(style: str, rng: Rng | None, face: tuple[int, int, int, int] | None = None) -> tuple[int, int]:
    record = ImageRecord(
        source="s", key="a.png", path=Path("a.png"), digest="", width=400, height=200, mode="RGB", face=face
    )
    fit = Fit(image=(400, 200), bucket=(100, 80), resized=(200, 100), crop=(50, 10))
    return crop_offset(record, fit, CropConfig.model_validate({"style": style}), rng)


def test_the_crop_style_decides_what_is_kept():
    assert offset("center", Rng(1)) == (50, 10)
    assert offset("corner", Rng(1)) == (0, 0)
    assert offset("random", None) == (50, 10)
    drawn = {offset("random", Rng(1, visit)) for visit in range(300)}
    assert {left for left, _ in drawn} >= {0, 100}
    assert {top for _, top in drawn} == set(range(21))
    assert offset("random", Rng(5)) == offset("random", Rng(5))


def test_a_face_is_centred_as_far_as_the_image_reaches():
    assert offset("face", None, (200, 100, 40, 40)) == (50, 10)
    assert offset("face", None, (240, 90, 40, 40)) == (70, 5)
    assert offset("face", None, (0, 0, 40, 40)) == (0, 0)
    assert offset("face", None, (400, 200, 40, 40)) == (100, 20)
    with pytest.raises(UsageError, match=r"an image names no face\n  at: s/a.png"):
        offset("face", None)


def test_the_face_takes_a_share_of_the_crop_within_the_range():
    crop = CropConfig.model_validate({"style": "face", "face_range": [2.0, 4.0]})
    record = ImageRecord(
        source="s", key="a", path=Path("a"), digest="", width=800, height=400, mode="RGB", face=(400, 200, 50, 40)
    )
    fit = Fit(image=(800, 400), bucket=(100, 100), resized=(200, 100), crop=(50, 0))
    widths = {zoomed(record, fit, crop, Rng(0, visit)).resized[0] for visit in range(200)}
    assert 400 <= min(widths) < 430
    assert 770 < max(widths) <= 800
    middle = zoomed(record, fit, crop, None)
    assert middle.resized == (600, 300)
    assert crop_offset(record, middle, crop, None) == (250, 100)
    small = ImageRecord(
        source="s", key="a", path=Path("a"), digest="", width=90, height=120, mode="RGB", face=(40, 50, 60, 60)
    )
    least = Fit(image=(90, 120), bucket=(100, 100), resized=(100, 133), crop=(0, 16))
    assert zoomed(small, least, crop, Rng(1)).resized == (100, 133)
    assert zoomed(record, fit, CropConfig(style="face"), Rng(1)) is fit


def test_colours_change_for_a_third_of_the_visits_and_a_little():
    pixels = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    changed = [shift_color(pixels, Rng(0, visit)) for visit in range(300)]
    share = sum(not torch.equal(each, pixels) for each in changed) / 300
    assert 0.2 < share < 0.46
    assert max((each - pixels).abs().max() for each in changed) < 0.35
    assert all(each.min() >= 0 and each.max() <= 1 for each in changed)
    assert torch.equal(shift_color(pixels, Rng(0, 5)), changed[5])


def test_turning_the_hue_keeps_value_and_saturation():
    red = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
    assert turn_hue(red, 1 / 3).flatten().tolist() == pytest.approx([0.0, 1.0, 0.0], abs=1e-6)
    assert turn_hue(red, -1 / 3).flatten().tolist() == pytest.approx([0.0, 0.0, 1.0], abs=1e-6)
    assert turn_hue(red, 1 / 6).flatten().tolist() == pytest.approx([1.0, 1.0, 0.0], abs=1e-6)
    pixels = torch.rand(3, 9, 9, generator=torch.Generator().manual_seed(0))
    turned = turn_hue(pixels, MAX_HUE)
    assert torch.allclose(turned.amax(0), pixels.amax(0), atol=1e-6)
    assert torch.allclose(turned.amin(0), pixels.amin(0), atol=1e-6)
    assert torch.allclose(turn_hue(turned, -MAX_HUE), pixels, atol=1e-5)
    grey = torch.full((3, 2, 2), 0.4)
    assert torch.equal(turn_hue(grey, 0.1), grey)


def test_a_mask_is_reduced_as_the_reference_reduces_it() -> None:
    data = golden("core/losses.safetensors")
    for pixels, reduced in zip(data["mask_pixels"], data["mask_latent"], strict=True):
        size = (reduced.shape[-2], reduced.shape[-1])
        assert torch.allclose(reduce_mask(pixels, size), reduced.reshape(1, *size), rtol=1e-5, atol=0)
