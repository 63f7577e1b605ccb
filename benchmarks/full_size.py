"""One training step at full size on whatever machine this is: does it load, plan and fit?

Writes a synthetic set of weight files of the real sizes (28 blocks and adapter in bfloat16, 0.6B text encoder, image
autoencoder; random weights, about 6 GB) and one captioned picture, runs ``tuner train`` on it for one step at 256x256
in a process of its own, reports that process's peak resident memory beside what ``tuner plan`` predicts, and removes
the files.

    python -m benchmarks.full_size [--dir FOLDER] [--limit-gb 20] [--json]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.core.plan.plan import Plan

EDGE = 256
VAE_BASE = 96
ENCODER = {
    "vocab": 151936,
    "width": 1024,
    "layers": 28,
    "heads": 16,
    "key_heads": 8,
    "head_dim": 128,
    "mlp_width": 3072,
}
RUN = """
import resource, sys
from tuner.cli.main import main
code = main(["train", "--model", "anima", sys.argv[1]])
unit = 1 if sys.platform == "darwin" else 1024
print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}")
sys.exit(code)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where the files are made and removed (default: the temporary folder)")
    parser.add_argument("--limit-gb", type=float, default=20.0, help="peak resident memory allowed")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="tuner-full-size-", dir=arguments.dir))
    try:
        result = measure(folder)
    finally:
        shutil.rmtree(folder)
    result["within_limit"] = result["peak_rss_gb"] <= arguments.limit_gb
    print(json.dumps(result) if arguments.json else "\n".join(f"{key}: {value}" for key, value in result.items()))
    return 0 if result["exit_code"] == 0 and result["within_limit"] else 1


def measure(folder: Path) -> dict[str, Any]:
    """Make the files, then train one step in a child process, which tells its own peak memory."""
    config = write_files(folder)
    predicted = plan_of(config)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    started = time.monotonic()
    child = subprocess.run([sys.executable, "-c", RUN, str(config)], stdout=subprocess.PIPE, text=True, check=False)
    sys.stderr.write(child.stdout)
    peak = next((int(line.split()[1]) for line in child.stdout.splitlines() if line.startswith("peak ")), 0)
    return {
        "exit_code": child.returncode,
        "files_gb": round(size / 1e9, 2),
        "seconds": round(time.monotonic() - started, 1),
        "peak_rss_gb": round(peak / 1e9, 2),
        "peak_predicted_gb": round(predicted.host / 1e9, 2),
        "step_rss_gb": round(step_memory(folder) / 1e9, 2),
        "step_predicted_gb": round(predicted.phase("step").host / 1e9, 2),
    }


def step_memory(folder: Path) -> int:
    """Resident memory of the process after the step, as the run recorded it; 0 when it did not get there."""
    from tuner.core.track.events import read_events

    found = [event for event in read_events(folder / "out" / "events.jsonl") if event.get("state") == "compared"]
    return int(found[-1]["step_host_bytes"]) if found else 0


def plan_of(config: Path) -> Plan:
    """What the plan of this configuration expects on a CPU."""
    from tuner.core.config import load_config
    from tuner.core.plan.devices import CPU
    from tuner.core.plan.plan import predict
    from tuner.core.plan.prepare import prepare

    return predict(*prepare(load_config(config)), CPU)


def write_files(folder: Path) -> Path:
    """The weight files, one picture, and the configuration; returns its path."""
    import torch
    from PIL import Image

    from benchmarks.models import FULL
    from tests.fixtures.tiny_anima import make_tiny_anima
    from tuner.plugins.anima.sizes import AdapterSizes

    adapter = AdapterSizes(
        vocab=32128, embed_width=1024, width=1024, source_width=1024, out_width=1024, layers=6, heads=16,
        mlp_width=4096, in_proj_bias=False,
    )  # fmt: skip
    model = make_tiny_anima(
        folder / "models", dtype=torch.bfloat16, denoiser=FULL, adapter=adapter, encoder=ENCODER, vae_base=VAE_BASE
    )
    pictures = folder / "pictures"
    pictures.mkdir()
    Image.effect_noise((EDGE, EDGE), 60).convert("RGB").save(pictures / "one.png")
    (pictures / "one.txt").write_text("a red cat", encoding="utf-8")
    source = {"id": "pictures", "path": str(pictures)}
    config = {
        "model": model,
        "data": {"sets": [{"resolution": EDGE, "sources": [source]}], "workers": {"scan": 0, "cache": 0, "load": 0}},
        "cache": {"dir": str(folder / "cache")},
        "network": {"rank": 16},
        "optimizer": {"lr": 1e-4},
        "train": {"steps": 1},
        "precision": {"compute": "bf16", "vae": "bf16"},
        "memory": {"checkpointing": "block"},
        "checkpoint": {"dir": str(folder / "out")},
        "log": {"plain": True},
    }
    path = folder / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
