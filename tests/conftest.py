"""Settings for all tests."""

from __future__ import annotations

import os
import tempfile

# The tensors of the tests are tiny: threads only cost, and several test processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test may reach the network, whatever a library would like to look up.
os.environ["HF_HUB_OFFLINE"] = "1"
# Whoever imports distutils first decides which one setuptools accepts, and the compiler of torch imports setuptools.
os.environ["SETUPTOOLS_USE_DISTUTILS"] = "stdlib"
# What is remembered about broken plugins belongs to the user, not to tests that break some on purpose.
os.environ["TUNER_CACHE_DIR"] = tempfile.mkdtemp(prefix="tuner-tests-")
