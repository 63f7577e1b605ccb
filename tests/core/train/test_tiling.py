"""A run whose autoencoder works in tiles: other cache entries, and pictures that are nearly those of the whole."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.core.train.test_modes import losses
from tuner.core.errors import UsageError
from tuner.core.train.run import train

LARGE = {"data__sets__0__resolution": 128, "train__steps": 1, "optimizer__lr": 1e-6}


def test_training_and_pictures_change_a_little_and_the_plain_latents_stay_cached(make_config, tmp_path):
    cache, found, pictures = tmp_path / "cache", {}, []
    for name, tiling in (("plain", None), ("tiled", 64), ("again", None)):
        out = tmp_path / name
        sample = {"prompts": ["a dog --w 128 --h 128 --s 1 --l 1"]}
        train(
            make_config(checkpoint__dir=str(out), cache__dir=str(cache), latents__tiling=tiling, sample=sample, **LARGE)
        )
        found[name] = (losses(out), len(list(cache.rglob("*.safetensors"))))
        with Image.open(next((out / "samples").glob("base-*/000.png"))) as image:
            pictures.append(np.asarray(image).astype(np.float32))
    assert found["again"][0] == found["plain"][0] != found["tiled"][0]
    assert found["tiled"][0] == {1: pytest.approx(found["plain"][0][1], rel=0.2)}
    # One more entry for every image, and for no caption.
    assert found["tiled"][1] == found["again"][1] == found["plain"][1] + 6
    assert np.array_equal(pictures[0], pictures[2])
    assert 0 < float(np.abs(pictures[1] - pictures[0]).mean()) < 32


def test_tiles_that_do_not_fit_the_latents_are_refused(make_config):
    with pytest.raises(UsageError, match=r"latents\.tiling: 100 is not a multiple of 32"):
        train(make_config(latents__tiling=100))
