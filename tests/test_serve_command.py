"""`uniql serve` as a program: what it prints, how it ends, and what it refuses to start with."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests import tiny
from uniql_jax.commands import cli, serve
from uniql_jax.errors import UserError

KEY = "a-key-of-the-tests"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny") / "tiny-model", np.random.default_rng(11))


@pytest.fixture
def process(folder: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    (tmp_path / "key").write_text(f"{KEY}\n")
    size = ("--context", "96", "--batch", "3")  # as in test_server, so that programs are shared
    argv = ["serve", str(folder), "--port", "0", "--api-key-file", str(tmp_path / "key"), *size]
    started = subprocess.Popen(
        [sys.executable, "-m", "uniql_jax", *argv, "--memory-budget", "1GB", "--watch", "60", "--reserve", "1MB"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    yield started
    started.kill()
    started.communicate()


def test_it_serves_and_ends_in_good_order(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    lines: list[str] = []
    while not lines or "serving" not in lines[-1]:
        lines.append(process.stderr.readline())
        assert lines[-1], lines
    assert "prune rate 0: the least that fits 1 GB" in lines[0]
    found = re.search(r'serving "tiny-model" at (http://127\.0\.0\.1:\d+) ', lines[-1])
    assert found, lines
    with httpx.Client(base_url=found[1], timeout=100) as client:
        assert client.get("/health").json() == {"status": "ok"}
        body = {"model": "tiny-model", "prompt": "the people", "max_tokens": 5, "temperature": 0}
        assert client.post("/v1/completions", json=body).status_code == 401
        answer = client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {KEY}"})
        assert answer.json()["usage"]["completion_tokens"] == 5
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (0, 143)
    assert out == ""
    assert "Traceback" not in err


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.run(serve.main, [str(a) for a in argv])
    err = capsys.readouterr().err
    assert stop.value.code == 2, err
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    return last


def test_what_it_does_not_start_with(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "can be reached from elsewhere" in refused(capsys, folder, "--host", "0.0.0.0")
    (tmp_path / "short").write_text("short\n")
    assert "16 characters" in refused(capsys, folder, "--api-key-file", tmp_path / "short")
    assert "cannot read" in refused(capsys, folder, "--admin-key-file", tmp_path / "none")
    assert "3GiB" in refused(capsys, folder, "--memory-budget", "much")
    assert "no such checkpoint" in refused(capsys, tmp_path / "nowhere")
    assert "not what uniql evaluate" in refused(capsys, folder, "--quality", folder / "config.json")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "cannot listen" in refused(capsys, folder, "--port", port, "--context", 32)


def test_without_a_tokenizer(tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]) -> None:
    bare = tiny.checkpoint(tmp_path / "bare", rng, with_tokenizer=False)
    assert "no tokenizer" in refused(capsys, bare)


def test_keys_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(serve.API_KEY, KEY)
    assert serve.read_key(None, serve.API_KEY) == KEY
    monkeypatch.setenv(serve.API_KEY, "with a space, but long enough")
    with pytest.raises(UserError, match="ASCII without spaces"):
        serve.read_key(None, serve.API_KEY)
    monkeypatch.delenv(serve.API_KEY)
    assert serve.read_key(None, serve.API_KEY) is None
