"""The option --compilation-cache, and what it does: compiled programs kept in a folder for later processes."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path

from uniql_jax.errors import UserError

COMPILED_BYTES = 4 * 2**30
"""Compiled programs that the user's cache folder keeps; the oldest ones go first."""


def add_option(parser: argparse.ArgumentParser) -> None:
    """The option of commands that compile for long; hand its value to `use` before anything runs."""
    parser.add_argument(
        "--compilation-cache",
        metavar="DIR",
        help="keep compiled programs here for the next run (default on GPUs: in the user's cache; none: nowhere)",
    )


def use(folder: str | Path | None) -> None:
    """Keep compiled programs in a folder (made if need be), over processes.

    None: on GPUs, where compiling takes long, the user's cache folder, unless JAX has been given one; "none": nowhere.

    Raises UserError when a folder that was asked for cannot be written.
    """
    import jax  # here: `--help` and argument errors need no JAX

    if folder == "none":
        return
    if folder is None:
        if os.environ.get("JAX_COMPILATION_CACHE_DIR") or jax.default_backend() != "gpu":
            return
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        path = cache / "uniql-jax" / "compiled"
        with contextlib.suppress(OSError):
            path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            return
        jax.config.update("jax_compilation_cache_max_size", COMPILED_BYTES)
    else:
        path = Path(folder).expanduser().absolute()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {path}: {error.strerror or error}") from None
        if not os.access(path, os.W_OK):
            raise UserError(f"no permission to write {path}")
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a model has many small programs
