"""Bad input to every command: exit code 2, exactly one line on stderr, and nothing left behind on the disk."""

from __future__ import annotations

import collections
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from uniql_jax.commands import cli

Folder = Callable[[str], Path]
Refuse = Callable[..., str]
ReadCommand = Callable[[Path, Path], tuple[object, ...]]


@pytest.fixture
def source(hf_folder: Folder, tmp_path: Path) -> Path:
    """A tiny checkpoint of its own, for a test to damage."""
    return Path(shutil.copytree(hf_folder("smollm2-135m"), tmp_path / "source"))


@pytest.fixture
def calib(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Token ids, since tiny models have no tokenizer."""
    path = tmp_path / "calib.npy"
    np.save(path, rng.integers(3, 256, (4, 32)).astype(np.int32))
    return path


@pytest.fixture
def refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """refuse(command, *argv) runs it, checks how it refuses and that the disk is as before; returns the one line."""

    def check(command: str, *argv: object) -> str:
        before = _listing(tmp_path)
        main = importlib.import_module(command_module(command)).main
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.run(main, [str(a) for a in argv])
        lines = capsys.readouterr().err.splitlines()
        said = [line for line in lines if line.startswith("error:")]
        assert stop.value.code == 2, lines
        assert len(said) == 1, lines
        assert said == lines[-1:], lines
        assert "Traceback" not in "\n".join(lines)
        assert len(said[0]) > len("error: ") + 10
        assert _listing(tmp_path) == before
        return said[0]

    return check


def command_module(command: str) -> str:
    """The module behind `python -m COMMAND`."""
    verb = {"convert.to_hf": "export"}.get(command, command.rpartition(".")[2])
    return f"uniql_jax.commands.{verb}"


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    } | {str(p.relative_to(folder)) + "/": (0, 0) for p in folder.rglob("*") if p.is_dir()}


@pytest.fixture(params=["uniql_jax.compress", "convert.from_hf"])
def read_command(request: pytest.FixtureRequest, calib: Path) -> ReadCommand:
    """(source, out) -> a command that reads a whole source checkpoint: each of the two commands that do."""
    if request.param == "uniql_jax.compress":
        return lambda source, out: _compress(source, out, calib)
    return lambda source, out: ("convert.from_hf", source, out)


def _compress(source: Path | str, out: Path, calib: Path, *more: object) -> tuple[object, ...]:
    return ("uniql_jax.compress", "--ckpt", source, "--out", out, "--calib", calib, *more)


def _edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_missing_checkpoint(refuse: Refuse, tmp_path: Path, read_command: ReadCommand) -> None:
    missing = tmp_path / "nothing" / "here"
    assert str(missing) in refuse(*read_command(missing, tmp_path / "out"))


def test_folder_without_config(refuse: Refuse, source: Path, tmp_path: Path, read_command: ReadCommand) -> None:
    (source / "config.json").unlink()
    assert "config.json" in refuse(*read_command(source, tmp_path / "out"))


def test_config_that_is_no_json(refuse: Refuse, source: Path, tmp_path: Path, read_command: ReadCommand) -> None:
    (source / "config.json").write_text('{"model_type": ')
    assert "config.json" in refuse(*read_command(source, tmp_path / "out"))


def test_unsupported_family(refuse: Refuse, source: Path, tmp_path: Path, read_command: ReadCommand) -> None:
    _edit_config(source, model_type="gpt_neox")
    line = refuse(*read_command(source, tmp_path / "out"))
    assert "gpt_neox" in line
    assert "llama" in line


@pytest.mark.parametrize("kept", [0, 4, 1000, -8], ids=["empty", "no header", "header cut", "data cut"])
def test_truncated_safetensors(
    refuse: Refuse, source: Path, tmp_path: Path, read_command: ReadCommand, kept: int
) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert "model.safetensors" in refuse(*read_command(source, tmp_path / "out"))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_weight_that_is_not_finite(
    refuse: Refuse, source: Path, tmp_path: Path, read_command: ReadCommand, name: str, bad: float
) -> None:
    path = source / "model.safetensors"
    tensors = load_file(path)
    tensors[name][3, 5] = bad
    save_file(tensors, path, metadata={"format": "pt"})
    assert name in refuse(*read_command(source, tmp_path / "out"))


def test_missing_tensor(refuse: Refuse, source: Path, tmp_path: Path, read_command: ReadCommand) -> None:
    path = source / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.2.self_attn.k_proj.weight"
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    assert name in refuse(*read_command(source, tmp_path / "out"))


def test_tensor_of_another_shape(refuse: Refuse, source: Path, tmp_path: Path, read_command: ReadCommand) -> None:
    path = source / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1].copy()
    save_file(tensors, path, metadata={"format": "pt"})
    assert name in refuse(*read_command(source, tmp_path / "out"))


@pytest.mark.parametrize("rate", ["-0.1", "0.9", "abc", "nan", ""])
@pytest.mark.parametrize(
    ("command", "flag", "rest"),
    [
        ("uniql_jax.generate", "--prune-rate", ("--prompt", "Once")),
        ("uniql_jax.evaluate", "--prune-rates", ("--text", "sotu:from-1981")),
        ("uniql_jax.benchmark", "--prune-rates", ("--size",)),
    ],
)
def test_prune_rate(refuse: Refuse, source: Path, command: str, flag: str, rest: tuple[str, ...], rate: str) -> None:
    line = refuse(command, "--ckpt", source, f"{flag}={rate}", *rest)
    assert "prune rate" in line
    assert repr(rate) in line


@pytest.mark.parametrize("rate", ["-0.1", "0.9", "abc"])
def test_prune_rate_of_an_export(refuse: Refuse, source: Path, tmp_path: Path, rate: str) -> None:
    assert repr(rate) in refuse("convert.to_hf", source, tmp_path / "out", f"--prune-rate={rate}")


def test_one_bad_rate_among_good_ones(refuse: Refuse, source: Path) -> None:
    line = refuse("uniql_jax.evaluate", "--ckpt", source, "--prune-rates", "0,0.25,0.5", "--text", "sotu:from-1981")
    assert "0.5" in line


def test_existing_output(refuse: Refuse, source: Path, tmp_path: Path, read_command: ReadCommand) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    assert "--overwrite" in refuse(*read_command(source, out))


def test_overwrite_spares_what_is_no_model(refuse: Refuse, source: Path, tmp_path: Path, calib: Path) -> None:
    """A slip of the hand in --out must not cost somebody's folder."""
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.txt").write_text("years of work")
    refuse(*_compress(source, out, calib, "--overwrite"))


def test_no_space(
    refuse: Refuse, source: Path, tmp_path: Path, read_command: ReadCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    assert "space" in refuse(*read_command(source, tmp_path / "out"))


@pytest.mark.parametrize("bits", ["3", "0", "four"])
def test_bits(refuse: Refuse, source: Path, tmp_path: Path, calib: Path, bits: str) -> None:
    assert bits in refuse(*_compress(source, tmp_path / "out", calib, "--bits", bits))


def test_missing_calibration_text(refuse: Refuse, source: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing.npy"
    assert "missing.npy" in refuse(*_compress(source, tmp_path / "out", missing))


def test_calibration_tokens_beyond_the_vocabulary(refuse: Refuse, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "wide.npy"
    np.save(path, np.full((4, 32), 256, np.int32))
    assert "256" in refuse(*_compress(source, tmp_path / "out", path))


def test_loading_what_was_never_compressed(refuse: Refuse, source: Path) -> None:
    assert "compress" in refuse("uniql_jax.generate", "--ckpt", source, "--prompt", "Once")


@pytest.mark.parametrize(
    "argv",
    [
        ("uniql_jax.evaluate", "--ckpt", "", "--text", "a.txt"),
        ("uniql_jax.evaluate", "--ckpt", "x", "--text", ""),
        ("uniql_jax.evaluate", "--ckpt", "x", "--text", "a.txt", " "),
        ("uniql_jax.evaluate", "--ckpt", "x", "--tasks", ""),
        ("uniql_jax.evaluate", "--ckpt", "x", "--text", "a.txt", "--baseline", ""),
        ("uniql_jax.generate", "--ckpt", "", "--prompt", "Once"),
        ("uniql_jax.chat", "--ckpt", ""),
    ],
)
def test_empty_names(refuse: Refuse, argv: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder, which they would name as paths, is not meant."""
    monkeypatch.chdir(tmp_path)
    assert "empty" in refuse(*argv)


@pytest.mark.parametrize("argv", [("--size",), ("--size", "--prune-rates", "0"), ("--tpot", "--gen-len", "1")])
def test_measuring_what_was_never_compressed(refuse: Refuse, source: Path, argv: tuple[str, ...]) -> None:
    assert "compress" in refuse("uniql_jax.benchmark", "--ckpt", source, *argv)


def test_measurements_that_are_there_already(refuse: Refuse, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    out.write_text("mine")
    assert "--overwrite" in refuse("uniql_jax.benchmark", "--config", "smollm2-135m", "--size", "--json", out)


def test_a_compilation_cache_that_is_a_file(refuse: Refuse, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "file"
    out.write_text("mine")
    for command, more in (("uniql_jax.generate", ("--prompt", "Once")), ("uniql_jax.benchmark", ("--size",))):
        assert str(out) in refuse(command, "--ckpt", source, *more, "--compilation-cache", out)


def test_unknown_option(refuse: Refuse, source: Path, tmp_path: Path, calib: Path) -> None:
    assert "--bitz" in refuse(*_compress(source, tmp_path / "out", calib, "--bitz", "4"))


def test_in_a_process_of_its_own(source: Path, tmp_path: Path, calib: Path) -> None:
    """The exit code and the line as a shell sees them, without any library's chatter around it."""
    _edit_config(source, model_type="gpt_neox")
    _, *argv = _compress(source, tmp_path / "out", calib)
    done = subprocess.run(
        [sys.executable, "-m", "uniql_jax.compress", *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("out*"))
