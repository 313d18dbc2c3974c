"""Output folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from uniql_jax import files, outputs
from uniql_jax.errors import UserError
from uniql_jax.files import ShardWriter
from uniql_jax.outputs import check_output, replace_output, staged_output


def test_space_is_checked(tmp_path, monkeypatch):
    files.check_space(tmp_path / "not" / "there" / "yet", 10)
    with pytest.raises(UserError, match="no space for"):
        files.check_space(tmp_path / "not" / "there" / "yet", 10**18)
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda path: _Usage(free=10))
    with pytest.raises(UserError, match="no space for"), staged_output(tmp_path / "out") as staging:
        write_zeros(staging)
    assert not list(tmp_path.iterdir())


def write_zeros(folder):
    writer = ShardWriter(folder)
    writer.add("x", np.zeros(100))
    writer.finish()


class _Usage:
    def __init__(self, free):
        self.free = free


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(UserError, match="no space left"), staged_output(tmp_path / "out") as staging:
        write_zeros(staging)
    assert not list(tmp_path.iterdir())


def test_staged_output_appears_whole(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with staged_output(out) as staging:
        (staging / "config.json").write_text("1")
        assert not out.exists()
        assert staging.parent == out.parent
    assert (out / "config.json").read_text() == "1"
    assert [p.name for p in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, UserError, RuntimeError, OSError(errno.ENOSPC, "full")])
def test_staged_output_leaves_nothing_after_a_failure(tmp_path, failure):
    enospc = isinstance(failure, OSError)
    with pytest.raises(UserError if enospc else failure), staged_output(tmp_path / "out") as staging:  # noqa: PT012
        (staging / "half").write_text("x")
        raise failure
    assert not list(tmp_path.iterdir())


def test_an_existing_output_is_refused_or_replaced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    with pytest.raises(UserError, match="--overwrite"), staged_output(out):
        raise AssertionError("must not start")
    with pytest.raises(RuntimeError), staged_output(out, overwrite=True):
        raise RuntimeError
    assert (out / "config.json").read_text() == "old"
    with staged_output(out, overwrite=True) as staging:
        (staging / "config.json").write_text("new")
    assert (out / "config.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwrite_never_deletes_what_is_no_model(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "one.jpg").write_text("x")
    file = tmp_path / "file"
    file.write_text("x")
    for place in (photos, file):
        with pytest.raises(UserError, match="overwrite"), staged_output(place, overwrite=True):
            raise AssertionError("must not start")
    with pytest.raises(UserError, match="cannot write"), staged_output(file / "below"):
        raise AssertionError("must not start")
    assert (photos / "one.jpg").exists()


def model_folder(path, text="old"):
    path.mkdir(parents=True)
    (path / "config.json").write_text(text)
    return path


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_during_a_run_is_never_deleted(tmp_path, overwrite):
    for name, content in (("photos", "one.jpg"), ("model", "config.json")):
        out = tmp_path / name
        with contextlib.suppress(UserError), staged_output(out, overwrite) as staging:
            (staging / "config.json").write_text("new")
            out.mkdir()
            (out / content).write_text("mine")
        replaced = overwrite and name == "model"
        assert (out / content).read_text() == ("new" if replaced else "mine")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "photos"]


@pytest.mark.parametrize("step", [0, 1])
def test_a_swap_that_fails_brings_the_old_one_back(tmp_path, monkeypatch, step):
    out, staging = model_folder(tmp_path / "out"), model_folder(tmp_path / "new", "new")
    calls, rename = [], Path.rename

    def failing(self, target):
        calls.append(self)
        if len(calls) == step + 1:
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(UserError, match="broken"):
        replace_output(staging, out, overwrite=True)
    assert (out / "config.json").read_text() == "old"
    assert (staging / "config.json").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "out"]
    monkeypatch.undo()
    replace_output(staging, out, overwrite=True)
    assert (out / "config.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_swap_that_is_interrupted_brings_the_old_one_back(tmp_path, monkeypatch):
    out, staging = model_folder(tmp_path / "out"), model_folder(tmp_path / "new", "new")
    rename = Path.rename

    def interrupted(self, target):
        if self == staging:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_output(staging, out, overwrite=True)
    assert (out / "config.json").read_text() == "old"


def test_files_are_on_disk_before_they_are_renamed(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append("rename"), rename(self, to))[1])
    staging = model_folder(tmp_path / "new")
    (staging / "sub").mkdir()
    (staging / "sub" / "file").write_text("x")
    replace_output(staging, tmp_path / "out")
    before = set(events[: events.index("rename")])
    assert before == {str(staging / p) for p in ("config.json", "sub/file", "sub", "")} - {f"{staging}/"} | {
        str(staging)
    }
    assert events[-1] == str(tmp_path)


@pytest.mark.parametrize("length", [235, 250, 255, 256, 5000])
def test_a_name_that_is_too_long_is_refused_before_any_work(tmp_path, length):
    with pytest.raises(UserError, match="too long") as error:
        check_output(tmp_path / ("n" * length))
    assert len(str(error.value)) < 200
    with pytest.raises(UserError, match="too long"):
        check_output(tmp_path / ("é" * (length // 2 + 1)))  # bytes count, not characters


def test_the_longest_name_that_is_taken_works(tmp_path):
    out = model_folder(tmp_path / ("n" * (255 - outputs.LONGEST_SUFFIX)))
    with staged_output(out, overwrite=True) as staging:
        (staging / "config.json").write_text("new")
    assert (out / "config.json").read_text() == "new"


def test_a_path_that_is_too_long_is_refused(tmp_path):
    with pytest.raises(UserError, match="too long"):
        check_output("/".join([str(tmp_path), *["folder"] * 600]))


@pytest.mark.parametrize("name", ["", ".", "..", "./", "../.", "/", "a/..", "with\0zero", "~nobody-of-this-name/x"])
def test_names_that_are_no_output(tmp_path, monkeypatch, name):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for overwrite in (False, True):
        with pytest.raises(UserError) as error, staged_output(name, overwrite):
            raise AssertionError("must not start")
        assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["work"]


@pytest.mark.parametrize("name", ["~/out", "out/", "./out", "sub/../out", "out//."])
def test_names_are_resolved(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with staged_output(name) as staging:
        (staging / "config.json").write_text("new")
    assert (tmp_path / "out" / "config.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_output_is_never_the_input(tmp_path, monkeypatch):
    source = model_folder(tmp_path / "models" / "source")
    (tmp_path / "link").symlink_to(source)
    monkeypatch.chdir(tmp_path)
    for out in (source, "models/source/", source / "out", tmp_path / "link" / "out", tmp_path / "models"):
        for given in (source, "models/source", tmp_path / "link"):
            with pytest.raises(UserError, match=r"input|exists"):
                check_output(out, False, given)
            with pytest.raises(UserError, match="input"):
                check_output(out, True, given)
    check_output(tmp_path / "models" / "source-2", False, source)
    check_output(tmp_path / "out", False, "org/name")


def test_parents_that_cannot_hold_an_output(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    (tmp_path / "gone").symlink_to("nothing")
    before = sorted(p.name for p in tmp_path.iterdir())
    for out in ("file/out", "file/a/b", "one/out", "one", "gone/out", "gone"):
        with pytest.raises(UserError) as error, staged_output(tmp_path / out, overwrite=True):
            raise AssertionError("must not start")
        assert "\n" not in str(error.value)
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path)
    with pytest.raises(UserError, match="no permission"):
        check_output(tmp_path / "a" / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_what_the_disk_refuses_is_one_line_and_leaves_nothing(tmp_path, code):
    out = tmp_path / "not" / "there" / "out"
    with pytest.raises(UserError, match=r"no space left|cannot write") as error, staged_output(out) as staging:
        raise OSError(code, os.strerror(code), str(staging / "model.safetensors"))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_error_about_another_file_stays_what_it_is(tmp_path):
    with pytest.raises(FileNotFoundError), staged_output(tmp_path / "out"):
        open(tmp_path / "input")  # noqa: SIM115
    with pytest.raises(PermissionError), staged_output(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "no", "/elsewhere/input")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_nothing_behind(tmp_path, number, code):
    script = """
import sys, time
from uniql_jax.commands import cli
from uniql_jax.outputs import staged_output
def main(argv):
    with staged_output(argv[0]) as staging:
        (staging / "half").write_text("x")
        print("ready", flush=True)
        time.sleep(60)
cli.run(main)
"""
    out = tmp_path / "deep" / "out"
    root = Path(__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", script, str(out)],
        cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "ready\n"
        assert len(list(out.parent.glob("out.partial-*"))) == 1
        process.send_signal(number)
        stderr = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert len(stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
