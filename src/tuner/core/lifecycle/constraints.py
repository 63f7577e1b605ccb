"""What an installation of a plugin must leave as it is: this program, torch, and everything built against its CUDA."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.utils import canonicalize_name

from tuner.core.atomic import write_text

BOUND = re.compile(
    r"tuner|torch|torch(vision|audio|ao|data|text|codec)|(pytorch-)?triton(-.*)?|nvidia-.*|cuda-.*|cupy-cuda.*|.*-cu\d{2}"
    r"|xformers|flash-attn.*|sageattention|bitsandbytes|deepspeed|transformer-engine.*|apex"
)
"""Names of packages that are bound to one build of torch or of CUDA; another build breaks the others in silence."""


def pinned(distributions: Iterable[tuple[str, str]]) -> list[str]:
    """``name==version`` of the packages that must not change, out of (name, version) pairs; sorted."""
    found = {canonicalize_name(name): version for name, version in distributions}
    return [f"{name}=={version}" for name, version in sorted(found.items()) if BOUND.fullmatch(name)]


def installed() -> Iterator[tuple[str, str]]:
    """(name, version) of every package that can be imported here; the first of a name is the one in use."""
    seen = set()
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name and canonicalize_name(name) not in seen:
            seen.add(canonicalize_name(name))
            yield name, distribution.version


def write_constraints(folder: Path) -> Path:
    """The constraints of this environment as a file for installers; returns its path."""
    path = folder / "constraints.txt"
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["# Written by tuner: versions that installing a plugin must not change.", *pinned(installed())]
    write_text(path, "\n".join(lines) + "\n")
    return path
