"""A command as a shell runs it, in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from uniql_jax.commands import cli


def exit_code(main: Callable[[list[str]], int | None], *argv: object) -> int:
    """What the program of a command's `main` exits with, for these arguments."""
    with pytest.raises(SystemExit) as stop:
        cli.run(main, [str(word) for word in argv])
    assert isinstance(stop.value.code, int)
    return stop.value.code
