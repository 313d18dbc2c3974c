"""Weights on their way before anybody asks: a launch pulls what the next ones read first into the second-level cache.

Between two launches of a decode step, and while attention waits for its own numbers, memory would do nothing. A
program names a stretch of a coming weight and goes on; nobody waits for it.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from uniql_jax.pallas_kernels import compat, pointer

LINE = 128
"""Stretches begin and end on whole cache lines."""
PULLERS = 264
"""Most programs of a launch that pull: two for each multiprocessor of a large GPU, the last ones of the grid."""


PULL = """
.reg .pred p; .reg .b32 t; .reg .b64 a;
mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; setp.ge.and.s32 p, $2, 0, p;
cvt.s64.s32 a, $2; add.s64 a, a, $3; @p cp.async.bulk.prefetch.L2.global [a], {size};
"""
"""One thread asks for so many bytes from an offset on, unless that is negative."""


class Span(NamedTuple):
    """Bytes [start, start + size) of an array."""

    start: int
    size: int


@dataclasses.dataclass(frozen=True)
class Pull:
    """How a launch pulls: a span of each array, before its own work (`early`) or behind it."""

    spans: tuple[Span, ...] = ()
    early: bool = False

    def __call__(self, refs: Sequence[Any], program: Any, programs: int, *, early: bool) -> None:
        """Inside a kernel, at its begin (`early`) and at its end: pull, if this is the place for it.

        Shared out to the last programs of the grid; `program` is the number of the calling one, of `programs`.
        """
        if early != self.early:
            return
        pullers = min(programs, PULLERS)
        part = program - (programs - pullers)
        for ref, span in zip(refs, self.spans, strict=True):
            whole = ref.size * ref.dtype.itemsize
            piece = min(-(-span.size // (pullers * LINE)) * LINE, whole)
            offset = part * piece
            mine = (offset >= 0) & (offset < span.size)
            offset = jnp.where(mine, jnp.minimum(span.start + offset, whole - piece), -1)
            pointer.instruct(PULL.format(size=piece), ref, offset)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["pull"])
@dataclasses.dataclass(frozen=True)
class Ahead:
    """What a launch pulls: arrays, and how."""

    arrays: tuple[Array, ...] = ()
    pull: Pull = Pull()


NOTHING = Ahead()


# --- is it there? ---------------------------------------------------------------------------------------------------


def _probe(x_ref: Any, weight_ref: Any, out_ref: Any) -> None:
    at = jnp.arange(32)
    x = x_ref[at]
    Pull((Span(0, LINE),))([weight_ref], compat.pl.program_id(0), 1, early=False)
    out_ref[at] = x + 1.0


@functools.cache
def available() -> bool:
    """Whether launches can pull here: on Hopper and newer, if a tiny kernel that does it runs and is right."""
    if not pointer.PRESENT or compat.interpreted() or compat.capability() < 9.0:
        return False
    try:
        if compat.outside_traces(_probed):
            return True
        what = "a first kernel is wrong"
    except Exception as failure:  # whatever a newer JAX has against it
        what = (str(failure) or type(failure).__name__).splitlines()[0][:200]
    warnings.warn(f"weights are not pulled ahead here ({what}); decoding is slower", RuntimeWarning, stacklevel=2)
    return False


def _probed() -> bool:
    x = jnp.arange(32.0)
    return bool((jax.jit(_first)(x, jnp.zeros((256,), jnp.int32)) == x + 1.0).all())


def _first(x: Array, weight: Array) -> Array:
    """A first launch that pulls: x + 1."""
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return compat.call(_probe, name="pull_probe", grid=(1,), out_shape=shape)(x, weight)


# --- what to pull ---------------------------------------------------------------------------------------------------


class Budget(NamedTuple):
    """Bytes that a launch pulls, and whether before its own work."""

    size: int
    early: bool = False


def plan(launches: Sequence[Sequence[Array]], budgets: Sequence[Budget]) -> list[Ahead]:
    """What each launch of a chain pulls: the first bytes of what later ones read that no one pulled before, as many as
    its budget says, all arrays of one launch alike far.

    launches: the arrays that each reads, none for one that reads no weights.
    """
    found = []
    at, done = 0, 0  # the launch to pull for, and the bytes of it that are pulled
    for number, (budget, early) in enumerate(budgets):
        if at <= number:
            at, done = number + 1, 0
        chosen: list[tuple[Array, Span]] = []
        while budget >= LINE and at < len(launches):
            total = sum(array.nbytes for array in launches[at])
            take = min(budget, total - done)
            for array in launches[at]:
                start, end = (array.nbytes * edge // max(1, total) // LINE * LINE for edge in (done, done + take))
                if end > start and array.nbytes % 16 == 0:
                    chosen.append((array, Span(start, end - start)))
            budget, done = budget - take, done + take
            if done >= total:
                at, done = at + 1, 0
        arrays, spans = (tuple(part) for part in zip(*chosen, strict=True)) if chosen else ((), ())
        found.append(Ahead(arrays, Pull(spans, early)))
    return found
