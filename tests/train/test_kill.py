"""A training process killed by the system at any moment, and gone on with, ends as the one that was never killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from uniql_jax.train.work import LOG

CHILD = """
import sys
from pathlib import Path

import jax
import numpy as np

from tests.train import cases
from uniql_jax.train import recover
from uniql_jax.train.examples import from_windows
from uniql_jax.train.settings import RecoverySettings

folder, seed = Path(sys.argv[1]), int(sys.argv[2])
rng = np.random.default_rng(seed)
model = cases.model("llama", rng, num_hidden_layers=1)
top = {name: value for name, value in model.params.items() if name != "layers"}
settings = RecoverySettings(
    rank=2, batch=4, lr=1e-2, warmup=0, steps=40, evaluations=20, validation_rates=(0.0, 0.35), patience=99
)
training, validation = (from_windows(cases.tokens(rng, count)) for count in (30, 4))
result = recover.train(model.config, model.params["layers"], top, model.plan, training, validation, settings, folder)
np.savez(folder / "result.npz", *jax.tree.leaves(result.factors), np.asarray(list(result.after.values())))
"""


def _start(folder: Path, seed: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", CHILD, str(folder), str(seed)])


def _lines(folder: Path) -> int:
    return (folder / LOG).read_bytes().count(b"\n") if (folder / LOG).exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 5])
def test_killed_by_the_system(rng: np.random.Generator, seed: int, tmp_path: Path, kills: int) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert _start(whole, seed).wait() == 0
    for _ in range(kills):
        before = _lines(broken)
        with _start(broken, seed) as process:
            while process.poll() is None and _lines(broken) <= before:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))  # in a step, an evaluation or the writing of a state
            process.send_signal(signal.SIGKILL)
    assert _start(broken, seed).wait() == 0
    assert (broken / LOG).read_bytes() == (whole / LOG).read_bytes()
    with np.load(whole / "result.npz") as want, np.load(broken / "result.npz") as got:
        assert want.files == got.files
        for name in want.files:
            assert want[name].tobytes() == got[name].tobytes()
