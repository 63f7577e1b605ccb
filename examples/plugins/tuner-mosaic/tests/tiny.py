"""Random weights of a tiny Mosaic: python tests/tiny.py FILE"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tuner_mosaic.modules import Bytes, Denoiser


def tensors(width: int, blocks: int) -> dict[str, Tensor]:
    parts = {"denoiser": Denoiser(width, blocks), "bytes": Bytes(width)}
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


def write(path: Path) -> Path:
    torch.manual_seed(0)
    save_file(tensors(width=64, blocks=2), path)
    return path


if __name__ == "__main__":
    write(Path(sys.argv[1]))
