"""Programs that share a contraction, and the one among them that adds their parts up.

Each leaves its part in memory and is counted; the last one sees that it is, finds all parts there, and goes on alone.
None ever waits for another, and parts are added in their order, whichever comes last: the sum is always the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from uniql_jax.pallas_kernels import compat
from uniql_jax.pallas_kernels.compat import pl

COUNTS = 4096
"""Most blocks of work that are counted at a time."""


def counts() -> Int[Array, " blocks"]:
    """What `add_up_shares` counts with, zero before and after: made once, and handed from launch to launch."""
    return jnp.zeros((COUNTS,), jnp.int32)


def parts_shape(split: int, blocks: int, total: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Room for the parts of all programs, each of shape `total`."""
    return jax.ShapeDtypeStruct((split, blocks, *total), jnp.float32)


def add_up_shares(
    total: Float[Array, "..."],
    inside: Bool[Array, "..."],
    refs: tuple[Any, Any] | None,
    place: tuple[Array, Array],
    split: int,
    finish: Callable[[Array], None],
) -> None:
    """Call finish(sum over the shares of `total`) in one program of each block, where only what is `inside` counts.

    refs: parts as `parts_shape` has them, and counts (None where nothing is shared); place: the program's share and its
    block.
    """
    if refs is None:
        finish(total)
        return
    (parts_ref, counts_ref), (share, block) = refs, place
    axes = [jax.lax.broadcasted_iota(jnp.int32, total.shape, axis) for axis in range(total.ndim)]
    inside = jnp.broadcast_to(inside, total.shape)
    compat.store(parts_ref, (share, block, *axes), total, inside)
    done = compat.count(counts_ref, (block,))

    @pl.when(done == split - 1)
    def _() -> None:
        parts = [compat.load(parts_ref, (i, block, *axes), inside) for i in range(split)]  # no load waits for another
        counts_ref[block] = jnp.int32(0)
        finish(sum(parts[1:], parts[0]))
