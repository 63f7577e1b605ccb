"""Checks what the demo's LoRA learned: `python examples/demo/verify.py RUN_FOLDER`. Exit code 1 when it did not."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.demo.proof import main

if __name__ == "__main__":
    sys.exit(main())
