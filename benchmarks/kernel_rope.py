"""RoPE for `kernels.py`: the chain that is timed, and its error against float64."""

from __future__ import annotations

import functools
from typing import Any


@functools.lru_cache(maxsize=1)
def arguments(width: int, heads: int, kv_heads: int, tokens: int) -> tuple[Any, list[Any], list[Any]]:
    """Positions, and five distinct q and k, which no cache holds together."""
    import jax
    import jax.numpy as jnp

    def draw(seed: int, count: int) -> Any:
        return jax.random.normal(jax.random.key(seed), (1, tokens, width // 2, 2, count), jnp.bfloat16)

    positions = jnp.arange(tokens, dtype=jnp.int32)[None]
    return positions, [draw(i, heads) for i in range(5)], [draw(9 + i, kv_heads) for i in range(5)]


def turn(row: dict) -> Any:
    """One rotation: (q, k, positions) -> (q, k), [1, tokens, pairs, 2, heads].

    "gathered" has what is usual instead: [1, tokens, heads, 2, pairs], and rows of two tables of cosines and sines,
    whose columns are then picked for each head, since pruning keeps other pairs in each.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from uniql_jax.pallas_kernels.rope import pallas, rope_qk

    pairs, kv_heads, way = row["k"] // 2, row["group"], row["kernel"].removeprefix("rope ")
    base = 500000.0 ** (-np.arange(pairs) / pairs)
    order = np.stack([np.random.default_rng(head).permutation(pairs) for head in range(kv_heads)], axis=1)
    inv_freq = jnp.asarray(base[order], jnp.float32)
    if way == "copy":
        return lambda q, k, positions: (q + 1, k + 1)
    if row["settings"]:
        cut = pallas.Settings(**row["settings"])
        return lambda q, k, positions: pallas.rope_qk(q, k, positions, inv_freq, cut)
    if way != "gathered":
        return lambda q, k, positions: rope_qk(q, k, positions, inv_freq, implementation=way)
    angles = np.arange(row["count"])[:, None] * base
    cos_table, sin_table = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    columns = jnp.asarray(order.T)  # [kv_heads, pairs]

    def one(x: Any, positions: Any) -> Any:
        cos, sin = (table[positions][..., columns][:, :, :, None] for table in (cos_table, sin_table))
        share = x.reshape(*x.shape[:2], kv_heads, -1, 2, pairs).astype(jnp.float32)
        first, second = share[..., 0, :], share[..., 1, :]
        turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-2)
        return turned.astype(x.dtype).reshape(x.shape)

    def gathered(q: Any, k: Any, positions: Any) -> Any:
        positions = jax.lax.optimization_barrier(positions)  # or every call would share one gather
        return one(q, positions), one(k, positions)

    return gathered


def as_rows(row: dict, x: Any) -> Any:
    """[1, tokens, pairs, 2, heads] in the layout that the row turns: for "gathered" a new view of the same bytes."""
    if row["kernel"] != "rope gathered":
        return x
    return x.reshape(*x.shape[:2], x.shape[4], 2, x.shape[2])


def chain(row: dict, length: int) -> Any:
    """Turns five distinct q and k, one after another, again and again."""
    import jax

    one = jax.jit(turn(row))

    def run(positions: Any, qs: Any, ks: Any) -> Any:
        qs, ks = [as_rows(row, q) for q in qs], [as_rows(row, k) for k in ks]
        before = qs[-1]
        for i in range(length):
            # Only an order, no kernel: or XLA might turn several at once.
            q, k, _ = jax.lax.optimization_barrier((qs[i % 5], ks[i % 5], before))
            qs[i % 5], ks[i % 5] = one(q, k, positions)
            before = qs[i % 5]
        return qs, ks  # all of them, or XLA would leave out what nobody asks for

    return run


def check(row: dict) -> float:
    """Relative error of both arrays of one rotation against float64, on some tokens."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    positions, qs, ks = arguments(row["k"], row["n"], row["group"], row["count"])
    pairs, sample = row["k"] // 2, [0, 1, row["count"] // 3, row["count"] - 1]
    base = 500000.0 ** (-np.arange(pairs) / pairs)
    order = np.stack([np.random.default_rng(head).permutation(pairs) for head in range(row["group"])], axis=1)
    worst = 0.0
    q, k = as_rows(row, qs[0]), as_rows(row, ks[0])
    for x, y in zip((q, k), jax.jit(turn(row))(q, k, positions), strict=True):
        x, y = (np.asarray(v[0, jnp.asarray(sample)], np.float64) for v in (x, y))
        if row["kernel"] == "rope gathered":  # [token, head, 2, pair] -> [token, pair, 2, head]
            x, y = (np.moveaxis(v, 1, 3).swapaxes(1, 2) for v in (x, y))
        share = x.shape[-1] // row["group"]
        frequency = base.astype(np.float32)[order][:, np.arange(x.shape[-1]) // share]
        angle = np.asarray(sample, np.float64)[:, None, None] * frequency
        turned = (x[:, :, 0] + 1j * x[:, :, 1]) * np.exp(1j * angle)
        got = y[:, :, 0] + 1j * y[:, :, 1]
        worst = max(worst, float(np.linalg.norm(got - turned) / np.linalg.norm(turned)))
    return worst
