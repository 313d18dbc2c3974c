"""Phases of one launch that need each other's results: programs count themselves done, later ones wait for a count.

A GPU starts the programs of a grid in the order of their numbers, so that who waits for lower numbers alone always
waits for programs that run or are done. What a program loads of its own before it waits is on its way meanwhile: no
phase begins with an empty memory bus, as each launch does.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels import compat, pointer
from pallas_kernels.compat import pl

COUNTS = 4
"""Phases of a launch that are counted, at most."""

WAIT = """
.reg .pred p; .reg .b32 t, v;
mov.u32 t, %tid.x; setp.ne.u32 p, t, 0; @p bra DONE;
AGAIN: ld.relaxed.gpu.global.b32 v, [$2 + {offset}]; setp.lt.s32 p, v, {programs}; @p bra AGAIN;
ld.acquire.gpu.global.b32 v, [$2 + {offset}];
DONE: bar.sync 0;
"""
"""One thread looks, again and again; the others wait at a barrier."""


def counts() -> Int[Array, " phases"]:
    """What phases count with, zero before and after: made once, and handed from launch to launch."""
    return jnp.zeros((COUNTS,), jnp.int32)


@dataclasses.dataclass(frozen=True)
class Order:
    """Inside a kernel: the counts, and the number of the calling program."""

    counts: Any
    program: Array

    def wait(self, phase: int, programs: int) -> None:
        """Go on once `programs` programs of a phase are done; what they stored is then seen."""
        if not compat.interpreted():  # which runs program after program
            pointer.instruct(WAIT.format(offset=4 * phase, programs=programs), self.counts)

    def arrive(self, phase: int) -> Array:
        """One more program of a phase is done. Returns how many were before it."""
        return compat.count(self.counts, (0 * self.program + phase,))  # an index must be an array

    def finish(self, phase: int, programs: int) -> None:
        """The same for the last phase, whose last program leaves all counts zero."""
        before = self.arrive(phase)

        @pl.when(before == programs - 1)
        def _() -> None:
            self.counts[jnp.arange(COUNTS)] = jnp.zeros((COUNTS,), jnp.int32)


# --- is it there? ---------------------------------------------------------------------------------------------------


def _probe(x_ref: Any, _: Any, out_ref: Any, middle_ref: Any, counts_ref: Any) -> None:
    """The first program writes, the second waits and reads."""
    at = jnp.arange(32)
    order = Order(counts_ref, pl.program_id(0))

    @pl.when(order.program == 0)
    def _() -> None:
        middle_ref[at] = x_ref[at] + 1.0
        order.arrive(0)

    @pl.when(order.program == 1)
    def _() -> None:
        order.wait(0, 1)
        out_ref[at] = 2.0 * middle_ref[at]
        order.finish(1, 1)


def _probed() -> str | None:
    x = jnp.arange(32.0)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype)] * 2 + [jax.ShapeDtypeStruct((COUNTS,), jnp.int32)]
    call = compat.call(_probe, name="flow_probe", grid=(2,), out_shape=shapes, aliases={1: 2})
    out, _, after = jax.jit(call)(x, counts())
    return None if bool((out == 2.0 * (x + 1.0)).all() & (after == 0).all()) else "a first kernel is wrong"


@functools.cache
def available() -> bool:
    """Whether launches can have phases here: if a tiny kernel that does it compiles and is right."""
    if compat.interpreted():
        return True
    if not pointer.PRESENT or not compat.ampere():
        return False
    # The caller may be inside a trace, in which nothing can be computed; a thread of its own is outside of all of them.
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        try:
            complaint = executor.submit(_probed).result()
        except Exception as failure:  # whatever a newer JAX has against it
            complaint = (str(failure) or type(failure).__name__).splitlines()[0][:200]
    if complaint is not None:
        warnings.warn(f"launches of several phases fail here ({complaint}); decoding is slower", RuntimeWarning, 2)
    return complaint is None
