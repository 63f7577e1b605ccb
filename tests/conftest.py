"""Settings for all tests."""

from __future__ import annotations

import os

# The tensors of the tests are tiny: threads only cost, and several test processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test may reach the network, whatever a library would like to look up.
os.environ["HF_HUB_OFFLINE"] = "1"
