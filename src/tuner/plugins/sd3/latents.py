"""Numbers of SD3's autoencoder: what is stored and trained on is (z - SHIFT) * SCALE."""

from __future__ import annotations

SCALE = 1.5305
SHIFT = 0.0609
