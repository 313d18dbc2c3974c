"""Compiled programs of a running model, kept by name and shapes; what they need in addition to their arguments."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np

from uniql_jax.config import ModelConfig


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree)


class Programs:
    """Compiled programs by name and shapes; one that is there is never compiled again. Any thread may ask."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}
        self._lock = threading.Lock()
        self.compiled = 0

    def prepare(self, name: Hashable, function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Any:
        """The program of `function` for arguments of these shapes (arrays, or jax.ShapeDtypeStruct in their place).

        Args:
            name: tells apart functions that are given the same shapes.
            function: what to compile.
            args: its arguments.
            donate: numbers of the arguments whose memory the results may take.
        """
        leaves, tree = jax.tree.flatten(args)
        key = (name, tree, tuple((np.shape(x), np.dtype(x.dtype)) for x in leaves))
        with self._lock:
            found = self._made.get(key)
        if found is None:
            found = jax.jit(function, donate_argnums=donate).lower(*_abstract(args)).compile()
            with self._lock:
                self._made[key] = found
                self.compiled += 1
        return found

    def call(self, name: Hashable, function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Any:
        """`prepare`, and run it."""
        return self.prepare(name, function, *args, donate=donate)(*args)


@functools.lru_cache(maxsize=4)
def programs_of(config: ModelConfig) -> Programs:
    """The programs of a model: sessions of one process share them, as calls of a jitted function do."""
    return Programs()


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays, or of jax.ShapeDtypeStructs in their place."""
    return sum(math.prod(np.shape(leaf)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def work_space(program: Any) -> int:
    """Bytes that a compiled program needs in addition to its arguments: scratch, and results in new memory."""
    found = program.memory_analysis()
    return int(found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes)
