"""What the launches of a fused decode step are tried on before they are trusted on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from uniql_jax.pallas_kernels import selfcheck
from uniql_jax.pallas_kernels.dequant_matmul import mma
from uniql_jax.pallas_kernels.dequant_matmul.fused_kernels import Job
from uniql_jax.pallas_kernels.dequant_matmul.selfcheck import packed
from uniql_jax.pallas_kernels.dequant_matmul.tiling import Weight

HIDDEN, FFN, QUERIES, GROUP, EPS = 512, 384, 72, 128, 1e-5


def error(prepare: Callable[..., Any], read: Callable[..., Any], write: Callable[..., Any], tiles: bool) -> float:
    """The largest relative error of two blocks of launches: gate and up, down, and queries behind them.

    prepare, read, write: those of fused.py; tiles: the layout of the weights.
    """
    rng = np.random.default_rng(0)
    last, first = ("rows", "groups") if tiles else ("last", "first")

    def draw(layout: str, features: int, width: int) -> tuple[Weight, tuple[Array, Array], np.ndarray]:
        data, scale, dense = packed(rng, layout, features, width, largest=0.02)
        return Weight(layout, features, width // GROUP, GROUP), (data, scale), dense

    (up, ups, up_dense), (_, gates, gate_dense) = draw(last, FFN, HIDDEN), draw(last, FFN, HIDDEN)
    (down, downs, down_dense), (query, queries, query_dense) = draw(first, HIDDEN, FFN), draw(last, QUERIES, HIDDEN)
    norm = rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32)
    bias = rng.standard_normal(QUERIES).astype(np.float32)

    def steps(xs: list[Array], gates: Any, ups: Any, downs: Any, queries: Any) -> list[tuple[Array, Array]]:
        found = []
        for x in xs:
            job = Job((up, up), activation="silu", blocked=x.shape[0] > 1)
            [hidden], stream = read(prepare(x, jnp.asarray(norm)), [job], [[gates, ups]], eps=EPS)
            stream = write(hidden, down, downs, stream, jnp.asarray(norm))
            [out], _ = read(stream, [Job((query,), biased=True)], [[(*queries, jnp.asarray(bias))]], eps=EPS)
            found.append((stream.x, out))
        return found

    counts = [count for count in selfcheck.ROWS if count <= mma.MOST]
    xs = [jnp.asarray(rng.standard_normal((count, HIDDEN)), jnp.bfloat16) for count in counts]

    def normed(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + EPS) * norm

    found = []
    for x, (after, out) in zip(xs, jax.jit(steps)(xs, gates, ups, downs, queries), strict=True):
        wide = np.asarray(x, np.float32)
        gate = normed(wide) @ gate_dense.T
        added = (gate / (1 + np.exp(-gate)) * (normed(wide) @ up_dense.T)) @ down_dense.T
        found.append(selfcheck.relative(after, wide + added))
        found.append(selfcheck.relative(out, normed(np.asarray(after, np.float32)) @ query_dense.T + bias))
    return max(found)
