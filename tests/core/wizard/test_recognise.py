"""Files are known by what is in them: every family's plugin says which keys a file may be given for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures.tiny_anima import make_tiny_anima
from tests.fixtures.tiny_flux import make_tiny_flux
from tests.fixtures.tiny_sd3 import make_tiny_sd3
from tuner.core.registry import Catalog
from tuner.core.wizard.files import look_for_models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("all")
    make_tiny_anima(folder / "anima")
    make_tiny_flux(folder / "flux")
    make_tiny_sd3(folder / "sd3", layout="separate")
    (folder / "empty.safetensors").touch()
    return folder


def test_every_part_of_three_families_is_known_by_its_header(folder: Path) -> None:
    found = look_for_models(folder, Catalog())
    models = {each.family: each.path.relative_to(folder).as_posix() for each in found.models}
    assert set(models) == {"anima", "flux", "sd3"}
    assert models["anima"] == "anima/anima.safetensors"
    parts = {key: {path.relative_to(folder).parts[0] for path in paths} for key, paths in found.parts.items()}
    assert parts["anima", "text_encoders.qwen3"] == {"anima"}
    assert parts["anima", "vae"] == {"anima"}
    # the same encoders and the same kind of autoencoder serve two families
    assert parts["flux", "vae"] == parts["sd3", "vae"] == {"flux", "sd3"}
    assert parts["flux", "text_encoders.t5"] == parts["sd3", "text_encoders.t5"] == {"flux", "sd3"}
    assert "sd3" in parts["sd3", "text_encoders.clip_g"]
    assert len(found.unread) == 1
    assert "it is empty" in found.unread[0]


def test_a_folder_with_a_plain_file_name_stands_for_its_file(folder: Path) -> None:
    found = look_for_models(folder / "anima", Catalog())
    assert found.parts["anima", "text_encoders.qwen3"] == [folder / "anima" / "qwen3"]
    assert folder / "anima" / "t5" in found.tokenizers


def test_a_named_file_is_the_model_and_its_neighbours_are_parts(folder: Path) -> None:
    found = look_for_models(folder / "flux" / "dev.safetensors", Catalog())
    assert [each.path for each in found.models] == [folder / "flux" / "dev.safetensors"]
    assert ("flux", "vae") in found.parts
