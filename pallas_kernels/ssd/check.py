"""What the step of a Mamba2 block is tried on before it is trusted on a device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from uniql_jax.pallas_kernels import selfcheck
from uniql_jax.pallas_kernels.ssd import reference
from uniql_jax.pallas_kernels.ssd.reference import Kernels, Limits, Token, Weights, Window

CHANNELS, HEADS, STATES, GROUPS, WIDTH = 20, 6, 24, 2, 4
"""None fills a tile."""


def error(mixer_step: Callable[..., tuple[Array, Window]]) -> float:
    """The largest relative error of a kernel's outputs, windows and states, for each number of sequences."""
    rng = np.random.default_rng(0)

    def normal(*shape: int, dtype: Any = jnp.bfloat16) -> Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    x, b = (CHANNELS, HEADS), (STATES, GROUPS)
    kernels = Kernels(normal(*x, WIDTH), normal(*b, WIDTH), normal(*b, WIDTH), normal(*x), normal(*b), normal(*b))
    weights = Weights(kernels, normal(HEADS), normal(HEADS), normal(HEADS), normal(*x))
    run = functools.partial(mixer_step, limits=Limits(0.3, 2.5, 1e-5, CHANNELS * HEADS // GROUPS))
    want = functools.partial(reference.mixer_step, **run.keywords)
    found = []
    for count in selfcheck.ROWS[::2]:
        token = Token(normal(count, *x), normal(count, *x), normal(count, *b), normal(count, *b), normal(count, HEADS))
        before = [normal(count, WIDTH - 1, *size) for size in (x, b, b)]
        windows = Window(*before, state=normal(count, HEADS, CHANNELS, STATES, dtype=jnp.float32))
        args = token, weights, windows
        found.append(selfcheck.relative(jax.jit(run)(*args), selfcheck.expected(want, *args)))
    return max(found)
