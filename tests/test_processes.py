"""Two processes on one pass: what they do together, what one says when the other ends, and the whole command."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from uniql_jax import forward, load
from uniql_jax.checkpoint import open_checkpoint
from uniql_jax.commands import compress
from uniql_jax.errors import UserError

TOGETHER = """
import contextlib, os, sys, time, jax, jax.numpy as jnp, numpy as np
from uniql_jax.compression.devices import Devices
from uniql_jax.compression.joining import joined

index, coordinator, dies = int(sys.argv[1]), sys.argv[2], sys.argv[3] == str(sys.argv[1])
with joined(coordinator, 2, index):
    devices = Devices(1)
    processes = devices.processes
    assert (processes.count, processes.index) == (2, index)
    assert [*processes.share(5)] == [[0, 1], [2, 3, 4]][index]
    total = devices.total([{"gram": jnp.full((2, 3), index + 1.0), "count": jnp.int32(index)}])
    np.testing.assert_array_equal(total["gram"], np.full((2, 3), 3.0))
    assert int(total["count"]) == 1 and len(total["gram"].devices()) == 1
    rows = jnp.arange(15.0).reshape(5, 3)
    doubled, none = devices.by_rows(lambda part, factor: (part * factor, None), rows, 2.0)
    np.testing.assert_array_equal(doubled, rows * 2)
    assert none is None
    assert processes.all(True) and not processes.all(index == 0)
    assert processes.first(index == 0) and not processes.first(index == 1)
    tensors = {"a": np.arange(6, dtype=np.int32).reshape(2, 3), "b": jnp.full(3, 0.5, jnp.bfloat16)}
    for owner in (0, 1):
        found, record = processes.given(owner, *((tensors, {"loss": [0.1]}) if index == owner else (None, None)))
        assert record == {"loss": [0.1]}
        for name, value in tensors.items():
            assert found[name].dtype == value.dtype
            np.testing.assert_array_equal(found[name], value)
    if dies:
        os._exit(9)
    if sys.argv[3] != "nobody":
        time.sleep(60)  # the end of the other is heard while nothing is asked of it
    print("done")
"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def started(commands: Sequence[Sequence[str]]) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            [sys.executable, "-W", "error", *command],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]


@pytest.fixture
def run() -> Iterator[Callable[[Sequence[Sequence[str]]], list[subprocess.Popen[str]]]]:
    """Starts processes; none outlives the test."""
    found: list[subprocess.Popen[str]] = []

    def start(commands: Sequence[Sequence[str]]) -> list[subprocess.Popen[str]]:
        found.extend(started(commands))
        return found[-len(commands) :]

    yield start
    for process in found:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_what_two_processes_do_together(run: Callable[..., list[subprocess.Popen[str]]]) -> None:
    coordinator = f"localhost:{free_port()}"
    for process in run([["-c", TOGETHER, str(i), coordinator, "nobody"] for i in (0, 1)]):
        out, err = process.communicate(timeout=240)
        assert (process.returncode, out.splitlines()[-1]) == (0, "done"), err


def test_a_process_ends_with_the_other(run: Callable[..., list[subprocess.Popen[str]]]) -> None:
    coordinator = f"localhost:{free_port()}"
    first, second = run([["-c", TOGETHER, str(i), coordinator, "1"] for i in (0, 1)])
    assert second.wait(timeout=240) == 9
    start = time.monotonic()
    _, err = first.communicate(timeout=60)
    assert first.returncode == 2, err
    assert err.splitlines()[-1].startswith("error: another process of this run has ended; start all of them again")
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--processes", "2"], "go with --coordinator"),
        (["--coordinator", "localhost:1", "--processes", "2"], "wants --processes N and --process I"),
        (["--coordinator", "localhost:1", "--processes", "2", "--process", "2"], "have numbers from 0"),
        (["--coordinator", "localhost", "--processes", "2", "--process", "1"], "HOST:PORT or auto"),
    ],
)
def test_options_that_make_no_run(options: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        compress.main(["--ckpt", "demo", "--out", str(tmp_path / "out"), *options])


@pytest.mark.slow
def test_two_processes_compress_as_one_does_and_resume(
    run: Callable[..., list[subprocess.Popen[str]]],
    hf_folder: Callable[[str], Path],
    tmp_path: Path,
    rng: np.random.Generator,
) -> None:
    """One is killed in the middle; both start again. Within float32 rounding: sums are in another order."""
    np.save(tmp_path / "calib.npy", rng.integers(3, 256, (7, 32)).astype(np.int32))
    common = ["-m", "uniql_jax.compress", "--ckpt", str(hf_folder("smollm2-135m")), "--bits", "16"]
    common += ["--calib", str(tmp_path / "calib.npy"), "--calib-windows", "7", "--calib-length", "32"]
    common += ["--stream-dtype", "float32"]
    [alone] = run([[*common, "--out", str(tmp_path / "one")]])
    assert alone.wait(timeout=300) == 0, alone.communicate()[1]

    def both(*more: str) -> list[subprocess.Popen[str]]:
        where = ["--out", str(tmp_path / "two"), "--coordinator", f"localhost:{free_port()}", "--processes", "2"]
        return run([[*common, *where, "--process", str(i), *more] for i in (0, 1)])

    first, second = both()
    while not list(tmp_path.glob("two.partial/sorted/*.safetensors")):
        assert first.poll() is None
        time.sleep(0.05)
    second.kill()
    assert first.wait(timeout=60) == 2
    assert "another process of this run has ended" in first.communicate()[1]
    assert not (tmp_path / "two").exists()
    for process in both("--resume"):
        assert process.wait(timeout=300) == 0, process.communicate()[1]
    assert [path.name for path in tmp_path.glob("two*")] == ["two"]
    assert open_checkpoint(tmp_path / "one").plan == open_checkpoint(tmp_path / "two").plan
    tokens = jnp.asarray(rng.integers(3, 256, (2, 16)).astype(np.int32))
    for rate in (0.0, 0.35):
        one, two = (np.asarray(forward(load(tmp_path / name, rate), tokens, rate)) for name in ("one", "two"))
        np.testing.assert_allclose(two, one, atol=2e-2 * np.abs(one).max())  # weights are bfloat16
