"""A tensor on disk that is read in parts: what one of several devices has of it, and no more."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from uniql_jax.errors import UserError


class LazyTensor:
    """A tensor that begins at byte `offset` of a file, of which `take` reads the entries that are asked for.

    It has what `weights.parts` needs of an array of numpy. `count` hears how many bytes are read.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        offset: int,
        dtype: np.dtype,
        shape: tuple[int, ...],
        count: Callable[[int], object],
    ):
        self._name, self._path, self._offset, self._count = name, path, offset, count
        self.dtype, self.shape = dtype, shape

    @property
    def ndim(self) -> int:
        """How many axes it has."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Shaped[np.ndarray, "..."]:
        """All of it."""
        value = self.take(np.arange(self.shape[0]), 0)
        return value if dtype is None else value.astype(dtype)

    def take(self, index: Int[np.ndarray, " n"], axis: int) -> Shaped[np.ndarray, "..."]:
        """The entries of an axis at these places, as numpy's `take` gives them.

        Raises:
            UserError: when the file cannot be read, or has become shorter.
        """
        outer, entry = math.prod(self.shape[:axis]), math.prod(self.shape[axis + 1 :]) * self.dtype.itemsize
        out = np.empty((outer, len(index) * entry), np.uint8)
        breaks = np.flatnonzero(np.diff(index) != 1) + 1
        runs = [(int(run[0]), len(run) * entry) for run in np.split(index, breaks) if len(run)]
        what = f"cannot read tensor {self._name!r} of {self._path}"
        try:
            # Not through a memory map: its pages would count as this process's memory.
            with self._path.open("rb", buffering=0) as file:
                for row in range(outer):
                    done = 0
                    for first, size in runs:
                        file.seek(self._offset + row * self.shape[axis] * entry + first * entry)
                        if file.readinto(out[row, done : done + size].data) != size:
                            raise UserError(f"{what}: the file has become shorter")
                        done += size
        except OSError as error:
            raise UserError(f"{what} ({error.strerror or error})") from None
        self._count(out.nbytes)
        return out.view(self.dtype).reshape(*self.shape[:axis], len(index), *self.shape[axis + 1 :])
