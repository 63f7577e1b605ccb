"""What caching costs: the image autoencoder against the 3-D network it comes from, captions against padding to 512.

Both arms of a case run in turn in every round, after one round that does not count; the statistic is the median of
process CPU seconds. The 3-D network is diffusers' ``AutoencoderKLQwenImage`` at the real width with the same weights.

    python -m benchmarks.encode [--json] [--rounds 5] [--threads 1] [--edge 128]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from tests.fixtures.tiny_anima import vae_tensors, write_qwen3
from tuner.plugins.anima import latents
from tuner.plugins.anima.latents import VAE
from tuner.plugins.anima.sizes import EncoderSizes
from tuner.plugins.anima.text import build_encoder, encode_states

BASE_WIDTH = 96
CAPTION_TOKENS = (60, 80, 90, 100, 100, 110, 120, 140)
"""Lengths of a plain set of captions, 100 on average."""
PADDED = 512
# The real encoder's shape at a quarter of its width and a seventh of its depth: cost follows tokens in the same way.
ENCODER = EncoderSizes(vocab=1000, width=256, layers=4, heads=4, key_heads=2, head_dim=64, mlp_width=768)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--edge", type=int, default=128, help="side of the picture in pixels")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with torch.no_grad():
        result = {
            "image": compare_images(arguments.edge, arguments.rounds),
            "text": compare_texts(arguments.rounds),
        }
    print(json.dumps(result, indent=None if arguments.json else 2))


def compare_images(edge: int, rounds: int) -> dict[str, float]:
    """Seconds and multiply-add counts of one encode, ours and 3-D, and the largest difference of their latents."""
    tensors = vae_tensors(torch.Generator().manual_seed(0), base=BASE_WIDTH)
    ours, reference = _ours(tensors), _reference(tensors)
    pixels = torch.rand(1, 3, edge, edge, generator=torch.Generator().manual_seed(1)) * 2 - 1
    arms: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours.posterior(pixels)[0],
        "3-D": lambda: reference.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0],
    }
    difference = float((arms["ours"]() - arms["3-D"]()).abs().max())
    flops = {name: _flops(arm) for name, arm in arms.items()}
    seconds = _medians(arms, rounds)
    return {
        "edge": edge,
        "seconds_ours": seconds["ours"],
        "seconds_3d": seconds["3-D"],
        "speedup": seconds["3-D"] / seconds["ours"],
        "gflops_ours": flops["ours"] / 1e9,
        "gflops_3d": flops["3-D"] / 1e9,
        "flops_ratio": flops["3-D"] / flops["ours"],
        "largest_difference": difference,
    }


def compare_texts(rounds: int) -> dict[str, float]:
    """Seconds for a set of captions at their own lengths and padded to 512."""
    encoder = _random_encoder()
    arms: dict[str, Callable[[], Any]] = {
        "own length": lambda: [_encode(encoder, tokens, tokens) for tokens in CAPTION_TOKENS],
        "padded": lambda: [_encode(encoder, tokens, PADDED) for tokens in CAPTION_TOKENS],
    }
    seconds = _medians(arms, rounds)
    return {
        "captions": len(CAPTION_TOKENS),
        "mean_tokens": statistics.mean(CAPTION_TOKENS),
        "seconds_own_length": seconds["own length"],
        "seconds_padded": seconds["padded"],
        "ratio": seconds["own length"] / seconds["padded"],
    }


def _random_encoder() -> torch.nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        write_qwen3(Path(folder), torch.Generator().manual_seed(0), sizes=asdict(ENCODER))
        tensors = load_file(Path(folder) / "model.safetensors")
    named = ((name.removeprefix("model."), value) for name, value in tensors.items())
    return build_encoder(named, ENCODER, {}, dtype=torch.float32)


def _encode(encoder: torch.nn.Module, tokens: int, length: int) -> torch.Tensor:
    ids = torch.arange(length)[None] % 900
    return encode_states(encoder, ids, (torch.arange(length) < tokens)[None])


def _ours(tensors: Mapping[str, torch.Tensor]) -> VAE:
    found = latents.names(tensors)
    shapes = {name: tuple(tensors[key].shape) for name, key in found.items()}
    return latents.build(((name, tensors[key]) for name, key in found.items()), shapes, dtype=torch.float32)


def _reference(tensors: Mapping[str, torch.Tensor]) -> Any:
    from diffusers import AutoencoderKLQwenImage

    network = AutoencoderKLQwenImage(base_dim=BASE_WIDTH)
    names = latents.names(network.state_dict())
    network.load_state_dict({key: tensors[name] for name, key in names.items()}, strict=True)
    return network.eval()


def _flops(arm: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        arm()
    return counter.get_total_flops()


def _medians(arms: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, arm in arms.items():
            started = time.process_time()
            arm()
            if number:
                taken[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in taken.items()}


if __name__ == "__main__":
    main()
