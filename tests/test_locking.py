"""A work folder has one process at a time, and a killed process holds nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from uniql_jax.errors import UserError
from uniql_jax.locking import hold_lock

HOLD = """
import sys, time
from uniql_jax.locking import hold_lock
with hold_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_another_process_is_named_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"pid {process.pid}\) is working on {folder}"), hold_lock(folder):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    with hold_lock(folder):
        pass


def _fail_inside(folder: Path) -> None:
    with hold_lock(folder):
        with pytest.raises(UserError, match=f"pid {os.getpid()}"), hold_lock(folder):
            pass
        raise KeyError


def test_the_lock_is_free_after_the_block_and_after_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    with pytest.raises(KeyError):
        _fail_inside(folder)
    assert not folder.exists()
    with hold_lock(folder):
        (folder / "work").write_text("")
    assert (folder / "work").exists()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot lock"), hold_lock(tmp_path / "file"):
        pass
