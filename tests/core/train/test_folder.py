"""The run folder: nothing of an earlier run is overwritten, and two runs never write to one folder."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from tuner.core.errors import UsageError
from tuner.core.train.folder import FolderLock, open_folder


def test_a_new_folder_is_made_and_named_after_itself(tmp_path):
    folder = open_folder(tmp_path / "out" / "hero", None, resume=False)
    assert folder.path.is_dir()
    assert folder.final == tmp_path / "out" / "hero" / "hero.safetensors"


def test_a_used_folder_is_refused_and_the_way_to_resume_is_named(tmp_path):
    folder = open_folder(tmp_path / "hero", None, resume=False)
    folder.config.write_text("{}")
    folder.events.write_text('{"kind": "step", "step": 1}\n')
    with pytest.raises(UsageError, match="not empty") as error:
        open_folder(tmp_path / "hero", None, resume=False)
    assert "--resume" in str(error.value)
    assert open_folder(tmp_path / "hero", None, resume=True).path == folder.path


def test_what_a_failed_start_leaves_does_not_block_the_next_one(tmp_path):
    folder = open_folder(tmp_path / "hero", None, resume=False)
    folder.config.write_text("{}")
    folder.events.write_text('{"kind": "run_start"}\n')
    (folder.path / "log.txt").touch()
    open_folder(tmp_path / "hero", None, resume=False, log_file=str(folder.path / "log.txt"))
    with pytest.raises(UsageError, match="it holds an earlier run"):
        open_folder(tmp_path / "hero", None, resume=False)


def test_a_second_process_is_kept_out_until_the_first_is_gone(tmp_path):
    folder = open_folder(tmp_path / "hero", None, resume=False)
    script = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from tuner.core.train.folder import FolderLock, RunFolder
        with FolderLock(RunFolder(Path(sys.argv[1]), "hero")):
            print("locked", flush=True)
            sys.stdin.read()
    """)
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(folder.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UsageError, match="another run"), FolderLock(folder):
            pass
        other.kill()
        other.wait()
    with FolderLock(folder):
        assert not folder.is_used()
