"""The worker of `kernels.py`: compiles rows, checks them against float64, and times them one by one."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import statistics
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.kernel_rows import DISTINCT, NEIGHBOUR, copies_of, floor_us, is_rope, name


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
    if row["kernel"] == "mma":
        weight = Weight(layout, n, k // group, group)
        parts = mma.product(x, data, scale, weight=weight, settings=mma.Settings(**settings), after=after)
    elif row["kernel"] == "dot":
        weight = Weight(layout, n, k // group, group)
        parts = dot.product(x, data, scale, weight=weight, settings=dot.Settings(**settings))
    elif row["kernel"] == "wgmma":
        weight = Weight(layout, n, k // group, group)
        parts = wgmma.product(x, data, scale, weight=weight, settings=wgmma.Settings(**settings), after=after)
    elif row["kernel"] == "cluster":
        weight = Weight(layout, n, k // group, group)
        parts = cluster.product(x, data, scale, weight=weight, settings=cluster.Settings(**settings), after=after)
    elif row["kernel"] == "auto":
        run = functools.partial(dequant_matmul, bits=4, group=group, contract=contract, width=k, layout=held)
        return run(x, data, scale, implementation="pallas")
    elif row["kernel"] == "jax-triton":
        held_as = plain.Weight(bits=4, group=group, contract=contract, width=k, layout=held)
        cut = jaxtriton.Settings(**settings) if settings else None
        return jaxtriton.launch(x, data, scale, held_as, x.dtype, cut)
    elif row["kernel"] == "dequantize":
        weight, cut = Weight(layout, n, k // group, group), dequantize.Settings(**settings)
        return dequantize.product(x, data, scale, weight, cut)
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
        return rope_chain(row, length)
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


@functools.lru_cache(maxsize=1)
def rope_arguments(width: int, heads: int, kv_heads: int, tokens: int) -> tuple[Any, list[Any], list[Any]]:
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


def rope_chain(row: dict, length: int) -> Any:
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


def check_rope(row: dict) -> float:
    """Relative error of both arrays of one rotation against float64, on some tokens."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    positions, qs, ks = rope_arguments(row["k"], row["n"], row["group"], row["count"])
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


def clock(call: Any, args: tuple[Any, ...], repeats: int) -> float:
    """Median seconds of one execution, many in flight so that the host keeps ahead.

    About 20 ms of them: what the host needs before the first is paid once for all.
    """
    import jax

    for _ in range(3):
        jax.block_until_ready(call(*args))
    start = time.perf_counter()
    jax.block_until_ready(call(*args))
    several = max(2, min(100, int(20e-3 / (time.perf_counter() - start))))
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(several):
            out = call(*args)
        jax.block_until_ready(out)
        taken.append((time.perf_counter() - start) / several)
    return statistics.median(taken)


def copy_speed() -> float:
    """Bytes a second that an addition of one reads and writes, over 2 GiB."""
    import jax
    import jax.numpy as jnp

    big = jnp.zeros((2**29,), jnp.int32)
    return 2 * big.nbytes / clock(jax.jit(lambda x: x + 1), (big,), 5)


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
        return rope_arguments(row["k"], row["n"], row["group"], row["count"])
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


def work(tasks: list[dict], threads: int, quick: bool, say: Any) -> None:
    """Compile all rows of a shape and M on several threads, then time them one by one."""
    import jax

    shapes: dict[Any, list[dict]] = {}
    for row in tasks:
        counts = 0 if row.get("check_only") else row["count"]
        shapes.setdefault((row["k"], row["n"], row["group"], counts), []).append(row)

    def compiled(row: dict) -> Any:
        say({"start": name(row)})
        args = arguments(row)
        start = time.perf_counter()
        try:
            return jax.jit(chain(row, length_of(row))).lower(*args).compile(), time.perf_counter() - start
        except Exception as error:
            return error, 0.0

    with concurrent.futures.ThreadPoolExecutor(threads) as executor:
        for rows in shapes.values():
            arguments(rows[0])  # makes the weights, once
            # All of them before the first is timed: threads that trace would hold up the one that launches.
            calls = list(executor.map(compiled, rows))
            for row, (call, seconds) in zip(rows, calls, strict=True):
                row = row | {"compile_s": seconds}
                try:
                    if isinstance(call, Exception):
                        raise call
                    args = arguments(row)
                    y = call(*args)
                    if row["kernel"].startswith("self-check"):
                        row["error"] = 0.0  # its trace went through
                    elif is_rope(row):
                        row["error"] = 0.0 if row["kernel"] == "rope copy" else check_rope(row)
                    elif row["k"] and row["kernel"] != "bf16":
                        last = (length_of(row) - 1) % len(args[1])
                        row["error"] = check(row, y, args[0], args[1][last], args[2][last])
                    if not row.get("check_only"):
                        row["us"] = clock(call, args, 5 if quick else 9) * 1e6 / length_of(row)
                    row["adds"] = bool(row["k"]) and not waits_by_operand(row) and not is_rope(row)
                except Exception as error:
                    text = str(error).strip() or type(error).__name__
                    row["failed"] = f"{type(error).__name__}: {text.splitlines()[0][:300]}"
                    if not isinstance(error, NotImplementedError):
                        row["trace"] = "".join(traceback.format_exception(error))[-3000:]
                say({"row": row})
            del calls


def worker(path: str, threads: int, quick: bool) -> None:
    """Rows from a file of tasks, to stdout as lines of JSON."""
    lock = threading.Lock()

    def say(message: dict) -> None:
        with lock:
            print("@" + json.dumps(message), flush=True)

    import warnings

    warnings.simplefilter("ignore")
    from uniql_jax.evaluation.timing import environment

    say({"environment": environment() | {"copy_bytes_per_s": copy_speed()}})
    work(json.loads(Path(path).read_text()), threads, quick, say)
