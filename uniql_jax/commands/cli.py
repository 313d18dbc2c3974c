"""What every command shares: a parser that fails in one line, argument types, exit codes and signals."""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

from uniql_jax.errors import UserError
from uniql_jax.limits import MAX_PRUNE_RATE

T = TypeVar("T")

UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000 ** (i + 1) for i, letter in enumerate("KMGT")},
    **{f"{letter}IB": 1024 ** (i + 1) for i, letter in enumerate("KMGT")},
}


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


def run(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Call a command's `main(argv)` and exit: 0, or its own code; 2 on a UserError, 130 on Ctrl-C, 143 on SIGTERM.

    One line on stderr in each of these cases; SIGTERM unwinds the stack as Ctrl-C does, so that nothing is left behind.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Unicode shows ? for what it lacks
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        code = main(list(sys.argv[1:] if argv is None else argv)) or 0
        sys.stdout.flush()
    except UserError as error:
        code = _complain(f"error: {error}", 2)
    except KeyboardInterrupt:
        code = _complain("interrupted", 130)
    except _Terminated:
        code = _complain("terminated", 143)
    except BrokenPipeError:
        # The reader (head, less) has left; Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


class _Terminated(BaseException):
    """SIGTERM, raised where the program stands."""


def _terminate(number: int, frame: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the cleaning up
    raise _Terminated


def _complain(line: str, code: int) -> int:
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # the line is one of its own, not the end of a progress bar
    print(" ".join(line.split()), file=sys.stderr)
    return code


def prune_rate(text: str) -> float:
    """Argument type: a prune rate in [0, MAX_PRUNE_RATE]."""
    try:
        rate = float(text)
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
    """Argument type: bytes, as 3GiB, 900MB, 1.5 GB or a plain number."""
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in UNITS or not float(match[1]) > 0:
        raise argparse.ArgumentTypeError(f"a memory size looks like 3GiB or 900MB, not {text!r}")
    return int(float(match[1]) * UNITS[match[2].upper()])


def positive_int(text: str) -> int:
    """Argument type: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, not {text!r}")
    return value


def natural_int(text: str) -> int:
    """Argument type: an integer of at least 0, such as a seed."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 0, not {text!r}")
    return value


def bounded_float(low: float | int, high: float | int = math.inf) -> Callable[[str], float]:
    """Argument type factory: a number in [low, high]."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or math.isinf(value):
            wanted = f"of at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"expected a number {wanted}, not {text!r}")
        return value

    return parse


def add_compilation_cache(parser: argparse.ArgumentParser) -> None:
    """The option of doors that compile for long; hand its value to `use_compilation_cache` before anything runs."""
    parser.add_argument(
        "--compilation-cache", metavar="DIR", help="keep compiled programs here, so that the next run starts sooner"
    )


def use_compilation_cache(folder: str | Path | None) -> None:
    """Keep compiled programs in a folder (made if need be), over processes; None changes nothing.

    Raises UserError when it cannot be written.
    """
    if folder is None:
        return
    path = Path(folder).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror or error}") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"no permission to write {path}")
    import jax  # here: `--help` and argument errors need no JAX

    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a model has many small programs
