"""Rotation of the residual stream, folded offline, for any hidden size (method: quantization).

Outliers of single stream coordinates are spread over all of them, so that 4 bits lose less. The rotation costs nothing
at run time: norm weights move into the matrices that follow, and every matrix takes its share of the orthogonal factor.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from uniql_jax import elastic
from uniql_jax.compiling import jit


def orthogonal(size: int, seed: int) -> Float[np.ndarray, "size size"]:
    """An orthogonal matrix, float64: a signed Hadamard matrix of the largest power of two that divides `size`, times
    a random orthogonal matrix of the odd rest.
    """
    rng = np.random.default_rng(seed)
    power = size & -size
    hadamard = np.ones((1, 1))
    while hadamard.shape[0] < power:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    odd, upper = np.linalg.qr(rng.standard_normal((size // power, size // power)))
    odd = odd * np.sign(np.diagonal(upper))
    return rng.choice([-1.0, 1.0], size)[:, None] * np.kron(hadamard / np.sqrt(power), odd)


@functools.partial(jit, static_argnames="kind")
def rotate_block(kind: str, block: Mapping[str, Any], q: Float[Array, "h h"]) -> dict[str, Any]:
    """A block that reads and writes the rotated stream x Q; its norm weight becomes ones.

    Args:
        kind: the block's kind, a key of `elastic.BLOCKS`.
        block: its leaves, float32.
        q: an orthogonal matrix, float32.

    Returns:
        The leaves of the rotated block, float32.
    """
    norm = jnp.asarray(block["norm"], jnp.float32)
    out: dict[str, Any] = {}
    for name, value in block.items():
        leaf = elastic.BLOCKS[kind][name]
        if leaf.contract == "last":
            out[name] = (value * norm) @ q
        elif leaf.contract == "first" or (leaf.dims == ("embed",) and name != "norm"):
            out[name] = value @ q
        else:
            out[name] = jnp.ones_like(norm) if name == "norm" else value
    return out


@jit
def rotate_top(top: Mapping[str, Any], q: Float[Array, "h h"]) -> dict[str, Any]:
    """Embedding and head on the rotated stream.

    An untied head takes the final norm and Q. A tied model keeps ONE rotated table E Q: its head reads the stream
    through head_in = Q^T diag(norm) Q, since (x Q) head_in (E Q)^T = (x * norm) E^T.
    """
    norm = jnp.asarray(top["norm"], jnp.float32)
    out = {"embed": top["embed"] @ q, "norm": jnp.ones_like(norm)}
    if "head" in top:
        return out | {"head": (top["head"] * norm) @ q}
    return out | {"head_in": (q.T * norm) @ q}
