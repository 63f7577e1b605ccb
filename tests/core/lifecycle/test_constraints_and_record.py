"""What installing a plugin must leave as it is, and what is remembered about installed ones."""

from __future__ import annotations

from importlib import metadata

import pytest

from tuner.core.errors import UsageError
from tuner.core.lifecycle.constraints import pinned, write_constraints
from tuner.core.lifecycle.record import PluginRecord, config_folder


def test_torch_this_program_and_what_is_bound_to_cuda_are_pinned_and_nothing_else():
    names = [
        "torch", "TorchVision", "tuner", "tuner-cubist", "nvidia_cublas_cu12", "triton", "pytorch-triton-rocm",
        "cuda-bindings", "bitsandbytes", "flash_attn", "numpy", "transformers", "torchmetrics",
    ]  # fmt: skip
    assert [line.split("==")[0] for line in pinned((name, "1.0+cu1") for name in names)] == [
        "bitsandbytes", "cuda-bindings", "flash-attn", "nvidia-cublas-cu12", "pytorch-triton-rocm", "torch",
        "torchvision", "triton", "tuner",
    ]  # fmt: skip


def test_the_constraints_file_names_the_installed_build(tmp_path):
    text = write_constraints(tmp_path / "config").read_text()
    assert f"torch=={metadata.version('torch')}\n" in text and f"tuner=={metadata.version('tuner')}\n" in text


def test_the_record_keeps_what_was_asked_for(tmp_path):
    record = PluginRecord(tmp_path / "config" / "plugins.json")
    assert record.read() == {}
    record.add({"tuner-x": "tuner-x>=1", "tuner-a": "/wheels/tuner_a.whl"})
    record.add({"tuner-x": "tuner-x>=2"})
    record.remove("tuner-a", "tuner-unknown")
    assert PluginRecord(record.path).read() == {"tuner-x": "tuner-x>=2"}


@pytest.mark.parametrize("text", ["", "[]", '{"plugins": 3}'])
def test_a_record_that_cannot_be_read_is_never_overwritten(tmp_path, text):
    path = tmp_path / "plugins.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="record of installed plugins"):
        PluginRecord(path).add({"tuner-x": "tuner-x"})
    assert path.read_text() == text


def test_the_folder_of_the_user_can_be_moved(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNER_CONFIG_DIR", str(tmp_path))
    assert config_folder() == tmp_path
    monkeypatch.delenv("TUNER_CONFIG_DIR")
    assert config_folder().name == "tuner"
