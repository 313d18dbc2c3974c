"""Mutated inputs through the commands: exit 0 where the mutation is harmless, else one line, exit 2, nothing left."""

from __future__ import annotations

import json
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import compressed, tiny
from uniql_jax.commands import cli, compress, export, finetune, from_hf, inspect
from uniql_jax.commands import evaluate as evaluate_command
from uniql_jax.compression import pipeline
from uniql_jax.train import recover

SECONDS = 60
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 10**12, 2**63, -(2**70), 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), "",
    "7", "many", "\ud800", "x" * 5000, [], [1], [[]], [None], {}, {"a": 1}, {"rope_type": "no"}, {"type": None},
)  # fmt: skip


class TimeOut(BaseException):
    """A case that hangs."""


@pytest.fixture(autouse=True)
def _no_long_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What comes after all checks does not run: reaching it is success."""

    def reached(*args: Any, **kwargs: Any) -> Any:
        raise SystemExit(0)

    def hang(number: int, frame: object) -> None:
        raise TimeOut

    monkeypatch.setattr(pipeline, "run", reached)
    monkeypatch.setattr(recover, "train", reached)
    before = signal.signal(signal.SIGALRM, hang)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def _run(main: Callable[..., Any], argv: list[Any], work: Path, capsys: pytest.CaptureFixture[str]) -> int:
    """Run a command, check how it ends, and clean up after a harmless mutation; its exit code."""
    before = _listing(work)
    capsys.readouterr()
    signal.alarm(SECONDS)
    with pytest.raises(SystemExit) as stop:
        cli.run(main, [str(word) for word in argv])
    signal.alarm(0)
    said = [line for line in capsys.readouterr().err.split("\n") if line.rpartition("\r")[2].startswith("error:")]
    assert stop.value.code in (0, None, 2), (stop.value.code, argv)
    if stop.value.code == 2:
        assert len(said) == 1, said
        assert _listing(work) == before, argv
    for path in sorted(set(_listing(work)) - set(before), reverse=True):
        place = work / path
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    return int(stop.value.code or 0)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a JSON value, containers first."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def _mutated(rng: np.random.Generator, value: Any) -> Any:
    """A copy with one to three places dropped, replaced or given a new neighbour."""
    value = json.loads(json.dumps(value))
    for _ in range(int(rng.integers(1, 4))):
        places = list(_places(value))
        if not places:
            break
        *path, last = places[int(rng.integers(len(places)))]
        at = value
        for key in path:
            at = at[key]
        what = rng.integers(3)
        replacement = VALUES[int(rng.integers(len(VALUES)))]
        if what == 0:
            del at[last]
        elif what == 1 or isinstance(at, list):
            at[last] = replacement
        else:
            at[str(last)[:-1] or "x"] = replacement
    return value


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _header(rng: np.random.Generator, data: bytes) -> bytes:
    """A safetensors file with a mutated header, or a cut or overwritten one."""
    size = struct.unpack("<Q", data[:8])[0]
    what = rng.integers(4)
    if what == 0:
        return data[: int(rng.integers(len(data)))]
    if what == 1:
        at = int(rng.integers(min(len(data), size + 8)))
        return data[:at] + rng.bytes(4) + data[at + 4 :]
    if what == 2:
        return struct.pack("<Q", int(rng.choice([0, 1, size - 1, size + 1, 2**40, 2**63]))) + data[8:]
    header = _dump(_mutated(rng, json.loads(data[8 : 8 + size])))
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


@pytest.fixture
def sources(tmp_path_factory: pytest.TempPathFactory, seed: int) -> dict[str, Path]:
    made = compressed.made(tmp_path_factory, seed)
    return {family: made.source(family) for family in ("llama-biased", "qwen2", "mamba2", "bamba", "nemotron_h")}


@pytest.fixture
def calib(tmp_path: Path, rng: np.random.Generator) -> Path:
    path = tmp_path / "calib.npy"
    np.save(path, rng.integers(3, 200, (4, 16)).astype(np.int32))
    return path


def _configs(count: int, sources: dict[str, Path], calib: Path, rng: Any, capsys: Any) -> list[int]:
    """Mutated configs of every family, and now and then a mutated weight file, through two commands."""
    work, codes = calib.parent, []
    for number in range(count):
        family = list(sources)[number % len(sources)]
        folder = Path(shutil.copytree(sources[family], work / "source"))
        if number % 5 == 4:
            path = folder / "model.safetensors"
            path.write_bytes(_header(rng, path.read_bytes()))
        else:
            path = folder / "config.json"
            path.write_bytes(_dump(_mutated(rng, json.loads(path.read_text()))))
        if number % 2:
            argv = ["--ckpt", folder, "--out", work / "out", "--calib", calib, "--calib-length", 16]
            codes.append(_run(compress.main, argv, work, capsys))
        else:
            codes.append(_run(from_hf.main, [folder, work / "out"], work, capsys))
        shutil.rmtree(folder)
    return codes


def _checkpoints(count: int, work: Path, rng: Any, capsys: Any) -> list[int]:
    """Mutated elastic checkpoints and tokenizer files through the commands that read them."""
    whole, codes = tiny.checkpoint(work / "whole", rng), []
    (work / "text.txt").write_text("The people kept the peace at home and abroad. " * 40)
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json")
    for number in range(count):
        folder = Path(shutil.copytree(whole, work / "ckpt"))
        path = folder / names[number % len(names)]
        if path.suffix == ".safetensors":
            path.write_bytes(_header(rng, path.read_bytes()))
        elif rng.integers(8) == 0:
            path.write_bytes(rng.bytes(int(rng.integers(200))))
        else:
            value = json.loads(path.read_text())
            part = value["uniql"] if path.name == "config.json" and number % 2 else value
            changed = _mutated(rng, part)
            path.write_bytes(_dump(value | {"uniql": changed} if part is not value else changed))
        command = number % 4
        if command == 0:
            argv = ["--ckpt", folder, "--out", work / "out", "--data", work / "text.txt", "--length", 16, "--steps", 1]
            codes.append(_run(finetune.main, argv, work, capsys))
        elif command == 1:
            codes.append(_run(inspect.main, [folder], work, capsys))
        elif command == 2:
            codes.append(_run(export.main, [folder, work / "out", "--prune-rate", "0.2"], work, capsys))
        else:
            argv = [
                "--ckpt",
                folder,
                "--prune-rates",
                "0",
                "--text",
                work / "text.txt",
                "--max-tokens",
                32,
                "--window",
                16,
            ]
            codes.append(_run(evaluate_command.main, argv, work, capsys))
        shutil.rmtree(folder)
    return codes


def test_mutated_sources(sources: Any, calib: Path, rng: np.random.Generator, capsys: Any) -> None:
    assert set(_configs(60, sources, calib, rng, capsys)) == {0, 2}


def test_mutated_checkpoints(tmp_path: Path, rng: np.random.Generator, capsys: Any) -> None:
    assert set(_checkpoints(60, tmp_path, rng, capsys)) == {0, 2}


@pytest.mark.slow
def test_many_mutated_sources(sources: Any, calib: Path, rng: np.random.Generator, capsys: Any) -> None:
    assert set(_configs(1500, sources, calib, rng, capsys)) == {0, 2}


@pytest.mark.slow
def test_many_mutated_checkpoints(tmp_path: Path, rng: np.random.Generator, capsys: Any) -> None:
    assert set(_checkpoints(600, tmp_path, rng, capsys)) == {0, 2}
