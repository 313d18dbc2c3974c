"""What every command shares: a parser that fails in one line, argument types, exit codes and signals."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib.metadata
import io
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

from uniql_jax import sizes
from uniql_jax.errors import CheckpointWarning, UserError
from uniql_jax.limits import MAX_PRUNE_RATE

T = TypeVar("T")


class _Help(argparse.HelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_something = action.default not in (None, False, argparse.SUPPRESS)
        return f"{action.help} (default: %(default)s)" if action.help and says_something else action.help


class ExamplesHelp(_Help, argparse.RawDescriptionHelpFormatter):
    """Defaults shown, examples kept as they are written."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are UserErrors (one line, no usage dump) and that knows --version."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("formatter_class", _Help)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self.add_argument("--version", action="version", version=version(), help="show the version and exit")

    def given(self, argv: Sequence[str]) -> set[str]:
        """Names of the values that these arguments set themselves, not by a default."""
        unset = object()
        found = argparse.Namespace(**dict.fromkeys(vars(self.parse_args(argv)), unset))  # defaults replace nothing
        return {name for name, value in vars(self.parse_args(argv, found)).items() if value is not unset}

    def error(self, message: str) -> NoReturn:
        """Raises UserError instead of printing the usage."""
        raise UserError(f"{message} (see {self.prog} --help)")


def version() -> str:
    """Name and version of the installed package, or that it runs uninstalled from its folder."""
    try:
        return f"uniql-jax {importlib.metadata.version('uniql-jax')}"
    except importlib.metadata.PackageNotFoundError:
        return "uniql-jax (not installed)"


def program(verb: str) -> str:
    """What `--help` calls a command: as it was called, `uniql VERB` or `python -m uniql_jax.VERB`."""
    called = Path(sys.argv[0]).stem if sys.argv else ""
    return f"uniql {verb}" if called in ("uniql", "__main__") else f"python -m uniql_jax.{verb.replace('-', '_')}"


def parser(verb: str, description: str, examples: str | None = None) -> Parser:
    """The parser of a command; examples stand below its help as they are written, with its name for {prog}."""
    prog = program(verb)
    if examples is None:
        return Parser(prog=prog, description=description)
    epilog = examples.replace("{prog}", prog)
    return Parser(prog=prog, description=description, epilog=epilog, formatter_class=ExamplesHelp)


def run(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Call a command's `main(argv)` and exit: with 0, or its own code, or one line on stderr and one of these codes.

    2: a UserError, or a disk that cannot be written; 1: out of memory; 129, 130, 143: SIGHUP, Ctrl-C, SIGTERM, each of
    which unwinds the stack, so that nothing is left behind. A reader of stdout who leaves is no error.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # its advice is to install PyTorch; none is needed
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Unicode shows ? for what it lacks
    if threading.current_thread() is threading.main_thread():
        for name in SIGNALS:
            if (number := getattr(signal, name, None)) and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _terminate)
    try:
        code = _run(main, list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        code = _complain(f"error: {error}", 2)
    except KeyboardInterrupt:
        code = _complain("interrupted", 130)
    except _Terminated as error:
        code = _complain(SIGNALS[error.args[0].name], 128 + error.args[0])
    except BrokenPipeError:
        _drop_stdout()
        code = 0
    except OSError as error:
        if error.errno not in DISK:
            raise
        _drop_stdout()  # which may be what is full
        code = _complain(f"error: {error.filename or 'the output'}: {error.strerror}", 2)
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        code = _complain(
            "error: out of memory; prune more, or lower the batch size, the number of tokens or their window", 1
        )
    sys.exit(code)


SIGNALS = {"SIGTERM": "terminated", "SIGHUP": "hung up"}
"""Signals that end a command in good order, and what it says."""
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG)


def _run(main: Callable[[list[str]], int | None], argv: list[str]) -> int:
    try:
        with _warnings_as_lines():
            code = main(argv) or 0
    except SystemExit as stop:  # --help and --version
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    if sys.stdout is not None:
        sys.stdout.flush()
    return code


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Show our own warnings as one line each, without the line of code that raised them."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", CheckpointWarning)
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
            if issubclass(category, CheckpointWarning):
                tqdm.write(" ".join(f"warning: {message}".split()), file=sys.stderr)  # above a progress bar
            else:
                others(message, category, *place)

        warnings.showwarning = show
        yield


class _Terminated(BaseException):
    """A signal, raised where the program stands."""


def _terminate(number: int, frame: object) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # a second one must not interrupt the cleaning up
    raise _Terminated(signal.Signals(number))


def _is_out_of_memory(error: Exception) -> bool:
    """Whether the host, or a device that JAX uses, has run out of memory."""
    # By name: jax may not be imported yet, and need not be for this.
    return isinstance(error, MemoryError) or (
        type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in str(error)
    )


def _drop_stdout() -> None:
    """Send what is left for stdout nowhere; Python would complain once more when it flushes at exit."""
    if sys.stdout is None:
        return
    with contextlib.suppress(OSError, ValueError):  # a stdout that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(line: str, code: int) -> int:
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # the line is one of its own, not the end of a progress bar
    print(" ".join(line.split()), file=sys.stderr)
    return code


def _plain(kind: Callable[[str], T], text: str) -> T:
    """A number as people write it: Python also reads digits of other scripts, and underscores. Raises ValueError."""
    if not text.isascii() or "_" in text:
        raise ValueError(text)
    return kind(text)


def prune_rate(text: str) -> float:
    """Argument type: a prune rate in [0, MAX_PRUNE_RATE]."""
    try:
        rate = _plain(float, text)
    except ValueError:
        rate = math.nan
    # a rate computed elsewhere may be a rounding above the limit
    if not -1e-9 <= rate <= MAX_PRUNE_RATE + 1e-6:
        raise argparse.ArgumentTypeError(f"prune rate must be a number from 0 to {MAX_PRUNE_RATE}, not {text!r}")
    return min(max(rate, 0.0), MAX_PRUNE_RATE)


def prune_rates(text: str) -> list[float]:
    """Argument type: prune rates joined by commas; repeated ones count once."""
    return list(dict.fromkeys(prune_rate(part.strip()) for part in text.split(",")))


def memory_size(text: str) -> int:
    """Argument type: bytes, as 3GiB, 900MB, 1.5 GB, 500M, 0.5g or a plain number."""
    try:
        return sizes.memory_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def memory_sizes(text: str) -> list[int]:
    """Argument type: sizes joined by commas; repeated ones count once."""
    return list(dict.fromkeys(memory_size(part) for part in text.split(",")))


def bounded_int(low: int, high: int) -> Callable[[str], int]:
    """Argument type factory: an integer in [low, high]."""

    def parse(text: str) -> int:
        try:
            value = _plain(int, text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            wanted = f"an integer of at least {low}" if value < low else f"an integer from {low} to {high}"
            raise argparse.ArgumentTypeError(f"expected {wanted}, not {text!r}")
        return value

    return parse


def positive_int(text: str) -> int:
    """Argument type: an integer from 1 to 2**31 - 1."""
    return bounded_int(1, 2**31 - 1)(text)


def natural_int(text: str) -> int:
    """Argument type: an integer from 0 to 2**32 - 1, such as a seed (JAX keeps 32 bits of one)."""
    return bounded_int(0, 2**32 - 1)(text)


def named(text: str) -> str:
    """Argument type: a name that is not blank; an empty path would mean the working folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a name, not an empty one")
    return text


def bounded_float(low: float | int, high: float | int = math.inf) -> Callable[[str], float]:
    """Argument type factory: a number in [low, high]."""

    def parse(text: str) -> float:
        try:
            value = _plain(float, text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or math.isinf(value):
            wanted = f"of at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"expected a number {wanted}, not {text!r}")
        return value

    return parse


def add_revision(parser: argparse.ArgumentParser) -> None:
    """The option of commands that take a hub id, for `uniql_jax.runtime.hub.local`."""
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub id (default: main)")


def add_devices(parser: argparse.ArgumentParser) -> None:
    """The option of commands that run a model, for `uniql_jax.load`."""
    parser.add_argument(
        "--devices",
        type=positive_int,
        default=1,
        metavar="N",
        help="share the model among the first N GPUs: its heads, MLP channels and vocabulary",
    )
