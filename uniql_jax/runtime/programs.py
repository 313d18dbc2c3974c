"""Compiled programs of a running model, kept by name and shapes; what they need in addition to their arguments."""

from __future__ import annotations

import collections
import functools
import gc
import math
import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np

from uniql_jax.config import ModelConfig


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree)


MOST = 256
"""Programs of a model that are kept."""
REGIONS = 0.6
"""Share of the memory regions that a process may map. On CPUs a program takes several for each of its loops, and where
there are no more, nothing compiles."""


class Programs:
    """Compiled programs by name and shapes; one that is there is not compiled again. Any thread may ask.

    Where there are too many, those that were not used for the longest time go.
    """

    def __init__(self) -> None:
        self._made: collections.OrderedDict[Hashable, Any] = collections.OrderedDict()
        self._keys: weakref.WeakKeyDictionary[Any, Hashable] = weakref.WeakKeyDictionary()
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
        if found is not None:
            self.used(found)
            return found
        found = jax.jit(function, donate_argnums=donate).lower(*_abstract(args)).compile()
        with self._lock:
            self._made[key] = found
            self._keys[found] = key
            self.compiled += 1
        self._make_room()
        return found

    def used(self, program: Any) -> None:
        """Note that a program was used now."""
        with self._lock:
            key = self._keys.get(program)
            if key in self._made:
                self._made.move_to_end(key)

    def _make_room(self) -> None:
        """Let the half of the programs that was used least recently go where there are too many, never the newest."""
        with self._lock:
            if len(self._made) <= MOST and regions() <= REGIONS:
                return
            for _ in range(len(self._made) // 2):
                self._made.popitem(last=False)
        gc.collect()

    def call(self, name: Hashable, function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Any:
        """`prepare`, and run it."""
        return self.prepare(name, function, *args, donate=donate)(*args)


@functools.lru_cache(maxsize=4)
def programs_of(config: ModelConfig) -> Programs:
    """The programs of a model: sessions of one process share them, as calls of a jitted function do."""
    return Programs()


def regions() -> float:
    """Share of the memory regions that this process may map which it has mapped; 0 where the system does not say."""
    try:
        with open("/proc/self/maps", "rb") as maps, open("/proc/sys/vm/max_map_count", "rb") as most:
            return sum(1 for _ in maps) / int(most.read())
    except (OSError, ValueError):
        return 0.0


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays, or of jax.ShapeDtypeStructs in their place."""
    return sum(math.prod(np.shape(leaf)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def work_space(program: Any) -> int:
    """Bytes that a compiled program needs in addition to its arguments: scratch, and results in new memory."""
    found = program.memory_analysis()
    return int(found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes)
