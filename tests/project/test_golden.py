"""Every file of published numbers is compared with by a test; what is left out is named here with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
GOLDEN = TESTS / "golden"

LATER: dict[str, str] = {}
"""Files of the reference set that no test reads yet. Tables inside a file that are left out are named beside its test:
`bias_weights` in test_sigmas, noise-prediction weights and information in test_losses, epoch and state folder names in
test_checkpoint, cosine curves of the other trainer in test_schedules."""

FILES = sorted(path.relative_to(GOLDEN).as_posix() for path in GOLDEN.rglob("*") if path.is_file())


def test_no_file_of_a_later_feature_lies_here_unread() -> None:
    assert not set(FILES) & set(LATER)


@pytest.mark.parametrize("name", FILES)
def test_a_golden_file_is_read_by_a_test(name: str) -> None:
    # some tests put the name together from the folder and a stem
    written = (name, Path(name).stem)
    sources = [path for path in TESTS.rglob("test_*.py") if path != Path(__file__)]
    sources += [*TESTS.rglob("golden_models.py")]
    assert any(f'"{one}' in path.read_text(encoding="utf-8") for path in sources for one in written)
