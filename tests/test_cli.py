"""What every command shares: exit codes, signals, argument types, light imports, tables, whole files."""

from __future__ import annotations

import argparse
import errno
import io
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from uniql_jax import commands, console
from uniql_jax.commands import cli
from uniql_jax.errors import UserError
from uniql_jax.outputs import check_output_files
from uniql_jax.plan import MAX_PRUNE_RATE

ROOT = Path(__file__).parents[1]


def code_of(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.run(main, argv or [])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def raising(error: BaseException) -> Callable[[list[str]], int | None]:
    def main(argv: list[str]) -> None:
        raise error

    return main


def test_run_gives_the_commands_own_code() -> None:
    assert code_of(lambda argv: None) == 0
    assert code_of(lambda argv: 3) == 3
    assert code_of(lambda argv: len(argv), ["a", "b"]) == 2


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [(UserError("no such\n  folder"), 2, "error: no such folder\n"), (KeyboardInterrupt(), 130, "interrupted\n")],
)
def test_run_says_one_line(error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(raising(error)) == code
    assert capsys.readouterr() == ("", line)


def test_run_lets_bugs_through() -> None:
    with pytest.raises(ZeroDivisionError):
        cli.run(raising(ZeroDivisionError()), [])


def test_a_reader_who_leaves_is_no_error() -> None:
    program = "from uniql_jax.commands import cli\ncli.run(lambda argv: [print('x' * 999) for _ in range(9999)] and 0)"
    writer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert writer.stdout is not None
    assert writer.stderr is not None
    writer.stdout.readline()
    writer.stdout.close()
    assert writer.stderr.read() == b""
    writer.stderr.close()
    assert writer.wait() == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_cannot_be_written(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> None:
        raise OSError(number, os.strerror(number), "out/model.safetensors")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_drop_stdout", lambda: None)  # it is the test's own
        assert code_of(main) == 2
    assert capsys.readouterr().err == f"error: out/model.safetensors: {os.strerror(number)}\n"


def test_other_errors_of_the_system_are_bugs() -> None:
    with pytest.raises(FileNotFoundError):
        cli.run(raising(FileNotFoundError(errno.ENOENT, "no such file")), [])


def test_out_of_memory(capsys: pytest.CaptureFixture[str]) -> None:
    import jax

    for error in (MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")):
        assert code_of(raising(error)) == 1
        line = capsys.readouterr().err
        assert line.startswith("error: out of memory")
        assert line.count("\n") == 1
    with pytest.raises(jax.errors.JaxRuntimeError):
        cli.run(raising(jax.errors.JaxRuntimeError("INTERNAL: a bug")), [])


def in_a_process(body: str, shell: str = "{}", **env: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command's `main`, of which `body` is the last expression, as a program; `shell` redirects it."""
    program = f"import os, sys, time\nfrom uniql_jax.commands import cli\ncli.run(lambda argv: {body})"
    line = shell.format(f"{shlex.quote(sys.executable)} -c {shlex.quote(program)}")
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, check=False, timeout=120, cwd=ROOT, env=os.environ | env
    )


@pytest.mark.parametrize(
    "env", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_a_terminal_without_unicode(env: dict[str, str]) -> None:
    done = in_a_process(r"print('caf\u00e9 \u65e5')", **env)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"caf? ?\n", b"")


def test_outputs_that_cannot_be_written() -> None:
    done = in_a_process("print('x' * 10**6)", "{} > /dev/full")
    assert done.returncode == 2
    assert done.stderr == b"error: the output: No space left on device\n"
    closed = in_a_process("print('nobody reads this')", "{} >&-")
    assert (closed.returncode, closed.stderr) == (0, b"")
    head = in_a_process(
        "[print('x' * 999) for _ in range(9999)] and 0", "{} | head -1 >/dev/null; exit ${{PIPESTATUS[0]}}"
    )
    assert (head.returncode, head.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGTERM, 143, b"terminated\n"),
        (signal.SIGHUP, 129, b"hung up\n"),
        (signal.SIGINT, 130, b"interrupted\n"),
    ],
)
def test_signals_unwind(number: signal.Signals, code: int, line: bytes, tmp_path: Path) -> None:
    """What a command has staged is gone, and a line says why."""
    program = (
        "import sys, time\nfrom uniql_jax.commands import cli\n"
        "from uniql_jax.outputs import staged_output\n"
        "def main(argv):\n"
        "    with staged_output(argv[0]) as folder:\n"
        "        (folder / 'half').write_text('half')\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(100)\n"
        "cli.run(main)"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "out")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"ready\n"
    writer.send_signal(number)
    _, said = writer.communicate(timeout=60)
    assert (writer.returncode, said) == (code, line)
    assert not list(tmp_path.iterdir())


HEAVY = ("jax", "numpy", "flax", "transformers", "torch", "datasets", "matplotlib")


@pytest.mark.parametrize("verb", commands.VERBS)
def test_help_imports_nothing_heavy(verb: str) -> None:
    program = (
        "import sys\nfrom uniql_jax import commands\n"
        "try:\n    commands.run(sys.argv[1], ['--help'])\n"
        f"finally:\n    print('HEAVY', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, verb], capture_output=True, text=True, check=False, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    assert done.stdout.splitlines()[-1] == "HEAVY []"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--rate", "abc"], "prune rate must be a number from 0 to 0.35, not 'abc'"),
        ([], "--rate"),
        (["--rate", "0", "--huh"], "--huh"),
        (["--rat", "0"], "--rat"),
    ],
)
def test_parser_complains_in_one_line(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> None:
        parser = cli.Parser(prog="command")
        parser.add_argument("--rate", type=cli.prune_rate, required=True)
        parser.parse_args(argv)

    assert code_of(main, argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


def test_help_and_version_exit_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> None:
        parser = cli.Parser(prog="command", description="What it does.")
        parser.add_argument("--size", type=cli.positive_int, default=7, help="how big")
        parser.add_argument("--name", help="who")
        parser.parse_args(argv)

    assert code_of(main, ["--help"]) == 0
    text = capsys.readouterr().out
    assert "What it does." in text
    assert "how big (default: 7)" in text
    assert "None" not in text
    assert code_of(main, ["--version"]) == 0
    assert capsys.readouterr().out.startswith("uniql-jax")


@pytest.mark.parametrize("text", ["0", "0.0", "0.15", "1e-2", ".35", "0.35", "0.3500001", "-0"])
def test_good_prune_rates(text: str) -> None:
    assert cli.prune_rate(text) == pytest.approx(float(text), abs=1e-6)
    assert 0 <= cli.prune_rate(text) <= MAX_PRUNE_RATE


@pytest.mark.parametrize(
    "text", ["abc", "", "-0.1", "0.9", "0.36", "35", "35%", "nan", "inf", "0,1", "1e400", "٠.٢", "0.1_5"]
)
def test_bad_prune_rates(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"a number from 0 to 0\.35, not"):
        cli.prune_rate(text)


def test_lists_of_prune_rates() -> None:
    assert cli.prune_rates("0, 0.15,0.35,0.150") == [0.0, 0.15, 0.35]
    for bad in ("0,,0.1", "0,0.4", "", "0.1,"):
        with pytest.raises(argparse.ArgumentTypeError):
            cli.prune_rates(bad)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("3GiB", 3 * 2**30),
        ("900MB", 900_000_000),
        ("1.5 gb", 1_500_000_000),
        ("512KiB", 2**19),
        (".5TiB", 2**39),
        ("4096", 4096),
        ("10B", 10),
        ("500M", 500_000_000),
        ("0.5g", 500_000_000),
        ("2G", 2 * 10**9),
        ("3gi", 3 * 2**30),
        ("1.5t", 1_500_000_000_000),
        (" 64 k ", 64_000),
    ],
)
def test_good_memory_sizes(text: str, count: int) -> None:
    assert cli.memory_size(text) == count


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GiB",
        "3XB",
        "3 Gi B",
        "-1GB",
        "0",
        "0GB",
        "1,5GB",
        "1e9",
        "nanGB",
        "0.1",
        "80%",
        "1e30TB",
        "9" * 30,
        "٣GB",
        "3 bananas",
    ],
)
def test_bad_memory_sizes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="3GiB"):
        cli.memory_size(text)


def test_numbers_with_bounds() -> None:
    assert cli.positive_int("12") == 12
    assert cli.natural_int("0") == 0
    assert cli.bounded_float(0, 1)("0.5") == 0.5
    assert cli.bounded_float(0)("7") == 7.0
    for parse, bad in (
        (cli.positive_int, ("0", "-1", "1.5", "x", "", str(2**31), str(10**30))),
        (cli.natural_int, ("-1", "x", str(2**32))),
        (cli.bounded_float(0, 1), ("٠.٢", "0_1", "1.1", "-0.1", "nan", "x")),
        (cli.bounded_float(0), ("inf", "-1")),
    ):
        for text in bad:
            with pytest.raises(argparse.ArgumentTypeError, match="expected"):
                parse(text)


def test_a_number_that_is_too_large_hears_the_range() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="from 0 to 4294967295"):
        cli.natural_int("5000000000")
    with pytest.raises(argparse.ArgumentTypeError, match="from 1 to 2147483647"):
        cli.positive_int("3000000000")


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_name_is_none(text: str) -> None:
    """Path("") is the working folder."""
    with pytest.raises(argparse.ArgumentTypeError, match="empty"):
        cli.named(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (84_300_000, "84.3 MB"),
        (999_600, "1 MB"),
        (3.2e9, "3.2 GB"),
        (7e13, "70 TB"),
    ],
)
def test_format_bytes(count: float, text: str) -> None:
    assert console.format_bytes(count) == text


def test_table_aligns() -> None:
    text = console.table([["mean", 1.0, None], ["a longer name", 123.456, 7]], ["what", "value", "n"])
    assert text.splitlines() == [
        "what           value  n",
        "-------------  -----  -",
        "mean               1  -",
        "a longer name  123.5  7",
    ]


def test_progress_passes_everything_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(console.progress(iter("abc"), "letters", 3)) == ["a", "b", "c"]
    out, err = capsys.readouterr()
    assert out == ""
    assert "letters" in err


def test_files_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.json"
    console.write_whole(path, "old")
    assert path.read_text() == "old"
    assert path.stat().st_mode & 0o444

    class Full(io.FileIO):
        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli.os, "fdopen", lambda handle, mode: Full(handle, "wb"))
    with pytest.raises(UserError, match="No space left"):
        console.write_whole(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]
    assert path.read_text() == "old"


def test_output_files_are_checked_before_the_work(tmp_path: Path) -> None:
    there = tmp_path / "there.json"
    there.write_text("mine")
    check_output_files([None, tmp_path / "new.json"], inputs=[None, tmp_path, "demo"])
    check_output_files([there], overwrite=True, inputs=[tmp_path / "other", "sotu:before-1980"])
    with pytest.raises(UserError, match="--overwrite"):
        check_output_files([there])
    with pytest.raises(UserError, match="folder of"):
        check_output_files([tmp_path / "none" / "new.json"])
    with pytest.raises(UserError, match="is a folder"):
        check_output_files([tmp_path], overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path)
    for source in (there, tmp_path, tmp_path / "link"):
        with pytest.raises(UserError, match="a file of the input"):
            check_output_files([None, there], overwrite=True, inputs=["demo", source])
    with pytest.raises(UserError, match="two outputs"):
        check_output_files([tmp_path / "a.png", tmp_path / "link" / "a.png"])


@pytest.mark.parametrize(
    "module",
    [
        "train.finetune",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("train.own_text", "convert.from_hf", "convert.to_hf")
        ),
    ],
)
def test_module_of_a_checkout_is_the_command(module: str) -> None:
    folder = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=folder, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
