"""Finding model files by path: plain files, folders, variants, and the diffusers layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tuner.core.errors import UsageError
from tuner.core.places import Place, with_shards


def weights(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.zeros(1)}, path)
    return path


def place(path: Path) -> Place:
    return Place.of(str(path), where="model.path")


def test_a_file_is_its_own_weights_and_brings_no_folders(tmp_path):
    file = weights(tmp_path / "model.safetensors")
    assert place(file).weights("transformer") == file and place(file).folder("vae") is None
    assert with_shards(file) == (file,)


def test_a_folder_in_the_layout_of_diffusers_is_looked_into(tmp_path):
    file = weights(tmp_path / "transformer/diffusion_pytorch_model.safetensors")
    weights(tmp_path / "vae/diffusion_pytorch_model.safetensors")
    assert place(tmp_path).weights("transformer") == file
    assert place(tmp_path).folder("vae") == tmp_path / "vae" == place(file).folder("vae")


def test_the_plain_file_is_taken_unless_a_variant_is_asked_for(tmp_path):
    plain, half = weights(tmp_path / "model.safetensors"), weights(tmp_path / "model.fp16.safetensors")
    assert place(tmp_path).weights() == plain
    assert place(tmp_path).weights(variant="fp16") == half
    with pytest.raises(UsageError, match="variant 'fp8'"):
        place(tmp_path).weights(variant="fp8")
    weights(tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="several weight files"):
        place(tmp_path).weights()


@pytest.mark.parametrize("path", ("./absent", "absent.safetensors", "a/b/c/../d e:"))
def test_a_path_that_is_neither_here_nor_a_hub_id_is_refused(path):
    with pytest.raises(UsageError, match="no such file or folder"):
        Place.of(path, where="model.path")
