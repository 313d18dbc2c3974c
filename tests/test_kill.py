"""A compression that is killed at any moment, and resumed, gives the bytes of one that never was, and redoes little."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import published, reference, tiny
from tests.commands import exit_code
from uniql_jax import console
from uniql_jax.commands import compress as command
from uniql_jax.commands import export
from uniql_jax.compression import pipeline
from uniql_jax.compression.compress import compress
from uniql_jax.compression.settings import CompressionSettings, Resources
from uniql_jax.compression.workspace import MANIFEST, work_folder
from uniql_jax.errors import UserError
from uniql_jax.manifest import Manifest
from uniql_jax.train.loop import on_device
from uniql_jax.train.settings import RecoverySettings, alpha_of

Stamp = tuple[int, int]
SIZES = ("--calib-windows", "6", "--calib-length", "24", "--recover-length", "24")
TRAINING = ("--recover-steps", "4", "--recover-tune", "4", "--recover-batch", "4", "--recover-rank", "2")


class Inputs:
    """A tiny model with a tokenizer, calibration windows, examples to train on, and a cache of compiled programs."""

    def __init__(self, root: Path, seed: int, rounding: str):
        self.root, self.rounding = root, rounding
        config = published.shrink(published.SMOLLM2_135M, num_hidden_layers=2, vocab_size=tiny.VOCAB)
        self.ckpt = reference.save(reference.build(config, seed), root / "model", config)
        tiny.tokenizer().save_pretrained(self.ckpt)
        draw = np.random.default_rng(seed)
        self.calib, self.recover = root / "calib.npy", root / "recover.npy"
        np.save(self.calib, draw.integers(3, 256, (6, 24)).astype(np.int32))
        np.save(self.recover, draw.integers(3, 256, (24, 24)).astype(np.int32))

    def argv(self, out: Path, *more: str) -> list[str]:
        texts = ["--calib", str(self.calib), "--recover", str(self.recover)]
        return ["--ckpt", str(self.ckpt), "--out", str(out), *texts, *SIZES, *TRAINING, *more,
                "--rounding", self.rounding]  # fmt: skip

    def start(self, out: Path, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "uniql_jax.compress", *self.argv(out, *more)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip


class Watch:
    """What a run has finished so far, by name; notes what is written a second time."""

    def __init__(self, out: Path):
        self.folder = work_folder(out)
        self.seen: dict[str, Stamp] = {}
        self.again: list[str] = []

    def look(self) -> int:
        try:
            paths = [*self.folder.glob("*/*.safetensors"), *self.folder.glob("*/state/[0-9]*")]
        except FileNotFoundError:  # a folder went while it was listed: the run is ending
            return len(self.seen)
        for path in paths:
            name = str(path.relative_to(self.folder))
            if path.parent.name == "checkpoint" or not (path.name.isdigit() or path.suffix == ".safetensors"):
                continue
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            # a folder's time changes when a part of it is removed
            stamp = (stat.st_ino, stat.st_mtime_ns if path.is_file() else 0)
            if self.seen.setdefault(name, stamp) != stamp:
                self.again.append(name)
        return len(self.seen)

    def follow(self, process: subprocess.Popen[str], until: int = sys.maxsize) -> bool:
        """Wait for so many finished artifacts; whether they came before the end of the process."""
        while process.poll() is None:
            if self.look() >= until:
                return True
            time.sleep(0.02)
        return False


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _finish(process: subprocess.Popen[str], watch: Watch) -> None:
    watch.follow(process)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"), seed, "nearest")


@pytest.fixture(scope="module")
def whole(inputs: Inputs) -> tuple[Path, int]:
    return _uninterrupted(inputs)


def _uninterrupted(inputs: Inputs) -> tuple[Path, int]:
    """The checkpoint of a run without interruption, and how many artifacts it leaves on the way."""
    out = inputs.root / "whole" / "out"
    watch = Watch(out)
    with inputs.start(out) as process:
        _finish(process, watch)
    assert not watch.again
    return out, len(watch.seen)


def _killed_and_resumed(inputs: Inputs, out: Path, moments: list[int], delays: list[float]) -> int:
    """Kill a run when so many artifacts are there and some time has passed, each time resumed; then let it end."""
    watch, kills, resume = Watch(out), 0, ()
    for moment, delay in zip(moments, delays, strict=True):
        with inputs.start(out, *resume) as process:
            if watch.follow(process, moment):
                time.sleep(delay)
            process.kill()
            kills += process.wait() == -signal.SIGKILL
        watch.look()
        # killed before it began: nothing to go on with, and --resume starts anew
        resume = ("--resume",)
    with inputs.start(out, *resume) as process:
        _finish(process, watch)
    assert not watch.again
    return kills


@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed(inputs: Inputs, whole: tuple[Path, int], tmp_path: Path, rng: np.random.Generator, times: int) -> None:
    expected, count = whole
    out = tmp_path / "out"
    moments = sorted(rng.integers(1, count - 1, times).tolist())
    assert _killed_and_resumed(inputs, out, moments, rng.uniform(0, 0.3, times).tolist()) >= max(1, times - 1)
    assert _files(out) == _files(expected)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_killed_twenty_times(tmp_path: Path, rng: np.random.Generator, seed: int) -> None:
    inputs = Inputs(tmp_path / "inputs", seed, "gptq")
    expected, count = _uninterrupted(inputs)
    kills = 0
    while kills < 20:
        place = tmp_path / f"after-{kills}"
        place.mkdir()
        size = min(4, 20 - kills)
        moments, delays = sorted(rng.integers(0, count + 1, size).tolist()), rng.uniform(0, 2, size).tolist()
        kills += _killed_and_resumed(inputs, place / "out", moments, delays)
        assert _files(place / "out") == _files(expected)
        assert [path.name for path in place.iterdir()] == ["out"]


@pytest.mark.slow
def test_one_process_at_a_time_and_a_folder_that_appears(
    inputs: Inputs, whole: tuple[Path, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    watch = Watch(out)
    with inputs.start(out) as process:
        assert watch.follow(process, 2)
        for more in ((), ("--resume",), ("--overwrite",)):
            assert exit_code(command.main, *inputs.argv(out, *more)) == 2
            shown = capsys.readouterr().err
            assert shown.count("\n") == 1
            assert f"another process (pid {process.pid}) is working on" in shown
        process.terminate()
        assert process.wait() == 128 + signal.SIGTERM
    assert (work_folder(out) / MANIFEST).is_file()
    done = watch.look()
    with inputs.start(out, "--resume") as process:
        assert watch.follow(process, done + 1)
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
        _, errors = process.communicate()
        assert process.returncode == 2, errors
        assert "exists" in errors
        assert "Traceback" not in errors
    assert _files(out) == {"thesis.txt": b"mine"}
    shutil.rmtree(out)
    with inputs.start(out, "--resume") as process:
        _finish(process, watch)
    assert not watch.again
    assert _files(out) == _files(whole[0])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _edit_npy(path: Path) -> None:
    value = np.load(path)
    value[-1, -1] += 1
    np.save(path, value)


def _edit_weight(folder: Path, part: str) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if part in name:
                tensors[name] = tensors[name].copy()
                tensors[name].reshape(-1)[-1] += 0.5
        save_file(tensors, file, metadata={"format": "pt"})


def _edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CHANGES: dict[str, tuple[Callable[[Inputs], object], tuple[str, ...], str]] = {
    "first layer": (lambda i: _edit_weight(i.ckpt, "layers.0.mlp.up_proj"), (), "tensors of the source"),
    "last layer": (lambda i: _edit_weight(i.ckpt, "layers.1.self_attn.k_proj"), (), "tensors of the source"),
    "embedding": (lambda i: _edit_weight(i.ckpt, "embed_tokens"), (), "tensors of the source"),
    "config": (lambda i: _edit_json(i.ckpt / "config.json", rms_norm_eps=1e-3), (), "config of the source"),
    "tokenizer": (
        lambda i: _edit_json(i.ckpt / "tokenizer_config.json", model_max_length=7), (), "tokenizer_config.json",
    ),
    "calibration": (lambda i: _edit_npy(i.calib), (), "calibration tokens"),
    "windows": (lambda i: None, ("--calib-windows", "5"), "calibration tokens"),
    "length": (lambda i: None, ("--calib-length", "12"), "calibration tokens"),
    "seed": (lambda i: None, ("--seed", "1"), "setting seed"),
    "bits": (lambda i: None, ("--bits", "8"), "setting bits (4 -> 8)"),
    "recovery text": (lambda i: _edit_npy(i.recover), (), "examples"),
    "recovery steps": (lambda i: None, ("--recover-steps", "5"), "recovery setting steps"),
    "tuning steps": (lambda i: None, ("--recover-tune", "5"), "tuning setting steps"),
}  # fmt: skip


@pytest.fixture(params=["unfinished", "finished"])
def left(
    request: pytest.FixtureRequest,
    inputs: Inputs,
    whole: tuple[Path, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Inputs, Path]:
    """Copies of the inputs, and what a run of them left: a work folder, or the checkpoint."""
    own = Inputs.__new__(Inputs)
    own.root, own.rounding = tmp_path / "inputs", inputs.rounding
    own.root.mkdir()
    own.ckpt = Path(shutil.copytree(inputs.ckpt, own.root / "model"))
    own.calib, own.recover = (Path(shutil.copy(path, own.root)) for path in (inputs.calib, inputs.recover))

    def stop(*args: object) -> None:
        raise UserError("stopped")

    monkeypatch.setattr(pipeline, "run", stop)  # whatever gets past the comparison of inputs ends here
    out = tmp_path / "outputs" / "out"
    if request.param == "finished":
        shutil.copytree(whole[0], out)
    else:
        assert exit_code(command.main, *own.argv(out)) == 2
        assert (work_folder(out) / MANIFEST).is_file()
    return own, out


@pytest.mark.parametrize("change", CHANGES)
def test_changed_inputs_are_refused_and_named(
    change: str, left: tuple[Inputs, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    own, out = left
    before = _files(out.parent)
    edit, argv, named = CHANGES[change]
    edit(own)
    capsys.readouterr()
    assert exit_code(command.main, *own.argv(out, "--resume"), *argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert named in lines[0]
    assert {name: value for name, value in _files(out.parent).items() if ".lock" not in name} == {
        name: value for name, value in before.items() if ".lock" not in name
    }


def test_other_resources_are_not_refused(left: tuple[Inputs, Path]) -> None:
    own, out = left
    settings = CompressionSettings(rounding="nearest")
    device = on_device() | {"accumulate": 2, "remat": "all"}
    training = RecoverySettings(steps=4, batch=4, rank=2, alpha=alpha_of(2), **device)

    def again() -> object:
        return compress(
            str(own.ckpt), out, calib=[str(own.calib)], calib_windows=6, calib_length=24, settings=settings,
            recover=[str(own.recover)], recover_settings=training, recover_length=24, recover_tune=4, resume=True,
            resources=Resources(batch_tokens=24, stream_interval=1000),
        )  # fmt: skip

    if out.exists():
        (work_folder(out) / "sorted").mkdir(parents=True)  # of a run killed while it removed its work
        entries = json.loads((out / "config.json").read_text())["uniql"]["manifest"]["inputs"]
        Manifest(entries).save(work_folder(out) / MANIFEST)
        assert again() is None
        assert not work_folder(out).exists()
    else:
        with pytest.raises(UserError, match=r"^stopped$"):
            again()


def test_a_terminated_export_leaves_nothing(
    whole: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def progress(items: object, name: str) -> object:
        assert any(".partial-" in path.name for path in tmp_path.iterdir())
        os.kill(os.getpid(), signal.SIGTERM)
        return items

    monkeypatch.setattr(console, "progress", progress)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert exit_code(export.main, whole[0], tmp_path / "dense") == 128 + signal.SIGTERM
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert not list(tmp_path.iterdir())


def test_a_work_folder_that_is_not_ours_is_left_alone(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = work_folder(tmp_path / "out")
    own.mkdir()
    (own / "thesis.txt").write_text("mine")
    for more in ((), ("--resume",), ("--overwrite",)):
        assert exit_code(command.main, *inputs.argv(tmp_path / "out", *more)) == 2
        assert "holds something else" in capsys.readouterr().err
    assert _files(tmp_path) == {"out.partial/thesis.txt": b"mine"}
