"""Training verbs on a disk that is full or read-only: one line, exit code 2, and nothing left that is of no use.

The disks are real ones: small file systems, mounted for one process of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import tiny

OWN_TEXT = ("own_text", "--out", "DISK/own.npy", "--windows", "512", "--length", "64", "--batch", "512")
FINETUNE = ("finetune", "--out", "DISK/out", "--steps", "1", "--batch", "2", "--length", "8", "--rank", "1")
CASES: dict[str, tuple[str, bool, tuple[str, ...]]] = {
    "own-text-full": ("size=64k", False, OWN_TEXT),
    "own-text-fills-up": ("size=64k", True, OWN_TEXT),
    "own-text-read-only": ("ro", False, OWN_TEXT),
    "finetune-full": ("size=64k", False, FINETUNE),
    "finetune-no-room-to-begin": ("size=4k", True, FINETUNE),
    "finetune-no-room-for-the-state": ("size=24k", True, FINETUNE),
    "finetune-no-room-for-the-output": ("size=200k", True, FINETUNE),
    "finetune-read-only": ("ro", False, FINETUNE),
}
"""Options of the mount, whether the disk was large enough when that was checked, and the command."""
MESSAGES = {
    "own-text-full": "no space for",
    "own-text-fills-up": "No space left",
    "own-text-read-only": "no permission",
    "finetune-full": "no space for",
    "finetune-no-room-to-begin": "No space left",
    "finetune-no-room-for-the-state": "no space for",
    "finetune-no-room-for-the-output": "no space for",
    "finetune-read-only": "no permission",
}
QUICK = ("own-text-fills-up", "finetune-full", "finetune-read-only")
OTHERS = tuple(name for name in CASES if name not in QUICK)
RUN = """
import contextlib, importlib, io, json, pathlib, subprocess, sys
from uniql_jax import outputs
from uniql_jax.commands import cli
from uniql_jax.train import finetune

root, check, found = pathlib.Path(sys.argv[1]), outputs.check_space, {}

def run(verb, argv):
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.run(importlib.import_module(f"uniql_jax.commands.{verb}").main, argv)
        except SystemExit as stop:
            return stop.code, err.getvalue(), sorted(path.name for path in disk.iterdir())

for name, (mount, late, argv) in json.loads(sys.argv[2]).items():
    disk = root / name
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", mount, "tmpfs", disk], check=True)
    outputs.check_space = finetune.check_space = (lambda *_: None) if late else check
    verb, *argv = [word.replace("DISK", str(disk)) for word in argv]
    found[name] = [run(verb, argv)]
    if found[name][0][2]:  # what is left is there to be gone on with
        subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        found[name].append(run(verb, [*argv, "--resume"]))
print(json.dumps(found))
"""


def _may_mount() -> bool:
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return (
        shutil.which("unshare") is not None and not subprocess.run(command, capture_output=True, check=False).returncode
    )


@pytest.mark.skipif(not _may_mount(), reason="this system does not let us mount small disks")
@pytest.mark.parametrize("names", [QUICK, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["at once", "others"])
def test_a_disk_that_cannot_be_written(tmp_path: Path, rng: np.random.Generator, names: tuple[str, ...]) -> None:
    ckpt, text = tiny.checkpoint(tmp_path / "ckpt", rng), tmp_path / "text.txt"
    text.write_text("\n".join(tiny.LINES * 4), encoding="utf-8")
    inputs = {"own_text": ("--ckpt", str(ckpt)), "finetune": ("--ckpt", str(ckpt), "--data", str(text))}
    cases = {name: (mount, late, (*argv, *inputs[argv[0]])) for name, (mount, late, argv) in CASES.items()}
    cases = {name: cases[name] for name in names}
    (tmp_path / "disks").mkdir()
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", RUN, tmp_path / "disks", json.dumps(cases)],
        capture_output=True, text=True, check=False, timeout=300, env=os.environ | {"UNIQL_TYPECHECK": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name in names:
        (code, err, left), *resumed = found[name]
        assert code == 2, (name, err)
        assert MESSAGES[name] in err.splitlines()[-1], (name, err)
        assert err.count("error:") == 1, (name, err)
        assert "Traceback" not in err + done.stderr, name
        if name == "finetune-no-room-for-the-output":
            assert left == ["out.partial"]
            assert "--resume" in err
            assert (resumed[0][0], resumed[0][2]) == (0, ["out"]), resumed
        else:
            assert left == [], (name, left)
