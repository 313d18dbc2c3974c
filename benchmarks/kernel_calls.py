"""How `kernels.py` calls what a row names: its arguments, the chain of calls that is timed, and its error."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from benchmarks import kernel_rope
from benchmarks.kernel_rows import DISTINCT, NEIGHBOUR, copies_of, floor_us, is_rope


@dataclasses.dataclass
class Pool:
    """Distinct random weights of one shape, made once: flat, since a reshape to either contract is free."""

    data: list[Any]
    scale: list[Any]
    dense: list[Any]


@functools.lru_cache(maxsize=1)
def pool(k: int, n: int, group: int, copies: int) -> Pool:
    """The last shape's weights are freed when the next shape's are made."""
    import jax
    import jax.numpy as jnp

    data, scale, dense = [], [], []
    for i in range(copies):
        keys = jax.random.split(jax.random.key(i), 2)
        words = -(-n // 16) * 16 * k // 8  # whole tiles
        data.append(jax.lax.bitcast_convert_type(jax.random.bits(keys[0], (words,), jnp.uint32), jnp.int32))
        scale.append(jax.random.uniform(keys[1], (n * k // group,), jnp.bfloat16, 0.01, 0.1))
    for i in range(max(2, -(-int(DISTINCT) // (2 * n * k)))):
        dense.append(jax.random.normal(jax.random.key(100 + i), (n * k,), jnp.bfloat16))
    return Pool(data, scale, dense)


def multiply(row: dict, x: Any, data: Any, scale: Any, after: Any) -> Any:
    """One call of the row's kernel on flat weights: y [count, n] bf16."""
    import jax
    import jax.numpy as jnp

    from uniql_jax.pallas_kernels.dequant_matmul import dequant_matmul, dequantize, dot, jaxtriton, mma, pallas, plain
    from uniql_jax.pallas_kernels.dequant_matmul.hopper import cluster, wgmma
    from uniql_jax.pallas_kernels.dequant_matmul.tiling import Weight

    k, n, group, contract = row["k"], row["n"], row["group"], row["contract"]
    settings = dict(row["settings"])
    if row["kernel"] == "bf16":
        weight = data.reshape((n, k) if contract == "last" else (k, n))
        dims = (((1,), (1 if contract == "last" else 0,)), ((), ()))
        return jax.lax.dot_general(x, weight, dims, preferred_element_type=jnp.float32).astype(jnp.bfloat16)
    shapes = {"last": (n, k // 8), "first": (k // 8, n)}
    layout = settings.pop("order", contract)
    shapes |= {"rows": (-(-n // 16), k // group, 2, 32, 4), "groups": (k // group, -(-n // 16), 2, 32, 4)}
    if layout == contract and n % 16:
        data = data[: n * k // 8]
    data = data.reshape(shapes[layout])
    scale = scale.reshape((n, k // group) if layout in ("last", "rows") else (k // group, n))
    held = "plain" if layout == contract else layout
    weight = Weight(layout, n, k // group, group)
    chained = {"mma": mma, "wgmma": wgmma, "cluster": cluster}
    if row["kernel"] in chained:
        module = chained[row["kernel"]]
        parts = module.product(x, data, scale, weight=weight, settings=module.Settings(**settings), after=after)
    elif row["kernel"] == "dot":
        parts = dot.product(x, data, scale, weight=weight, settings=dot.Settings(**settings))
    elif row["kernel"] == "auto":
        run = functools.partial(dequant_matmul, bits=4, group=group, contract=contract, width=k, layout=held)
        return run(x, data, scale, implementation="pallas")
    elif row["kernel"] == "jax-triton":
        held_as = plain.Weight(bits=4, group=group, contract=contract, width=k, layout=held)
        cut = jaxtriton.Settings(**settings) if settings else None
        return jaxtriton.launch(x, data, scale, held_as, x.dtype, cut)
    elif row["kernel"] == "dequantize":
        return dequantize.product(x, data, scale, weight, dequantize.Settings(**settings))
    else:
        held_as = plain.Weight(bits=4, group=group, contract=contract, width=k, layout=held)
        return pallas.dense(x, data, scale, held_as)
    if parts.shape[0] > 1:
        parts = parts.sum(0, keepdims=True)
    return parts[0].astype(jnp.bfloat16)


def waits_by_operand(row: dict) -> bool:
    """Whether the kernel is all there is, so that an operand it does not read can chain it."""
    settings = row["settings"]
    alone = settings.get("joined") or settings.get("split", 1) == 1
    if row["kernel"] in ("cluster", "wgmma"):
        return alone and settings.get("exchange", True) and row["count"] % 8 == 0
    return row["kernel"] == "mma" and alone and not settings.get("ordered")


def chain(row: dict, length: int) -> Any:
    """The function that is timed: (x, weights, scales) -> the last product."""
    import jax
    import jax.numpy as jnp

    if row["kernel"].startswith("self-check: "):
        from uniql_jax.pallas_kernels.dequant_matmul import selfcheck

        def checked(x: Any, data: Any, scale: Any) -> Any:
            selfcheck.verify(*row["kernel"].removeprefix("self-check: ").split())
            return x

        return checked

    if row["kernel"] == "launch: pallas":
        from uniql_jax.pallas_kernels import compat

        def bump(x_ref: Any, out_ref: Any) -> None:
            out_ref[...] = x_ref[...] + 1

        one = jax.jit(
            compat.call(bump, name="bump", grid=(1,), out_shape=jax.ShapeDtypeStruct((128,), jnp.float32), warps=1)
        )
        return lambda x, data, scale: functools.reduce(lambda y, _: one(y), range(length), x)

    if row["kernel"] == "launch: xla add":

        def adds(x: Any, data: Any, scale: Any) -> Any:
            for _ in range(length):
                x = tied(x, x)
            return x

        return adds

    if row["kernel"] == "launch: mma":
        return products(NEIGHBOUR, length, row["settings"]["by"] == "operand")
    if is_rope(row):
        return kernel_rope.chain(row, length)
    return products(row, length, waits_by_operand(row))


def tied(x: Any, y: Any) -> Any:
    """x, in one kernel that neither side can absorb, and that waits for y."""
    import jax

    return jax.lax.optimization_barrier(x + 0 * y[:, :1])


def products(row: dict, length: int, by_operand: bool) -> Any:
    """The chain of a product, each call waiting for the one before."""
    import jax
    import jax.numpy as jnp

    # One trace and one lowering, whatever the length.
    one = jax.jit(functools.partial(multiply, row))

    def run(x: Any, data: Any, scale: Any) -> Any:
        y = jnp.zeros((row["count"], row["n"]), jnp.bfloat16)
        for i in range(length):
            if by_operand:
                y = one(x, data[i % len(data)], scale[i % len(data)], y)
                continue
            operands = x if i == 0 else tied(x, y), data[i % len(data)], scale[i % len(data)]
            # Or XLA would dequantize a weight once for all calls that use it.
            if row["kernel"] in ("dense", "auto", "dequantize"):
                operands = jax.lax.optimization_barrier(operands)
            # Or XLA would compute no more of y than the addition reads, of parts to add up above all.
            y = jax.lax.optimization_barrier(one(*operands, None))
        return y

    return run


def check(row: dict, y: Any, x: Any, data: Any, scale: Any) -> float:
    """Relative error of a sample of outputs against float64 of the dequantized weights."""
    import jax.numpy as jnp
    import numpy as np

    from uniql_jax.pallas_kernels.dequant_matmul import tiling
    from uniql_jax.pallas_kernels.packing import SHIFTS

    k, n, group, contract = row["k"], row["n"], row["group"], row["contract"]
    layout = row["settings"].get("order", contract)
    if layout in ("rows", "groups"):
        of_rows = -(-n // 16)
        tiles = data.reshape((of_rows, k // group, 2, 32, 4) if layout == "rows" else (k // group, of_rows, 2, 32, 4))
        data = tiling.untile(tiles, contract, n)
    else:
        data = data[: n * k // 8].reshape((n, k // 8) if contract == "last" else (k // 8, n))
    data = data if contract == "last" else data.T
    scale = scale.reshape(n, k // group) if contract == "last" else scale.reshape(k // group, n).T
    generator = np.random.default_rng(0)
    sample = np.unique(np.concatenate([np.arange(40), np.arange(n - 40, n), generator.integers(0, n, 100)]))
    words, scales = np.asarray(data[jnp.asarray(sample)]), np.asarray(scale[jnp.asarray(sample)], np.float64)
    codes = ((words[:, :, None] >> np.asarray(SHIFTS, np.int32)) & 15).reshape(len(sample), k) - 8
    want = np.asarray(x, np.float64) @ (codes * np.repeat(scales, group, axis=1)).T
    got = np.asarray(y[:, jnp.asarray(sample)], np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def arguments(row: dict) -> tuple[Any, ...]:
    """x and the weights of a row."""
    import jax
    import jax.numpy as jnp

    if row["kernel"] == "launch: pallas" or row["kernel"].startswith("self-check"):
        return jnp.zeros((128,), jnp.float32), None, None
    if row["kernel"] == "launch: xla add":
        of = dict(rows=1, width=4096) | row["settings"]
        return jnp.zeros((of["rows"], of["width"]), jnp.bfloat16), None, None
    if is_rope(row):
        return kernel_rope.arguments(row["k"], row["n"], row["group"], row["count"])
    if row["kernel"] == "launch: mma":
        row = NEIGHBOUR
    held = pool(row["k"], row["n"], row["group"], copies_of(row))
    x = jax.random.normal(jax.random.key(7), (row["count"], row["k"]), jnp.bfloat16)
    weights = held.dense if row["kernel"] == "bf16" else held.data
    return x, weights, held.scale


def length_of(row: dict) -> int:
    """Calls in a chain: about 1.5 ms, so that the host's part hides."""
    if not row["k"]:
        return 200
    if row.get("check_only"):
        return 1
    if is_rope(row):
        return 40
    compute = 2 * row["count"] * row["n"] * row["k"] / 5e8
    return int(max(6, min(120, 1500 / (1.3 * floor_us(row) + 2 + compute))))
