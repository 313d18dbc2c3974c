"""The worker of `kernels.py`: compiles rows, checks them against float64, and times them one by one."""

from __future__ import annotations

import concurrent.futures
import json
import statistics
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks import kernel_rope
from benchmarks.kernel_calls import arguments, chain, check, length_of, waits_by_operand
from benchmarks.kernel_rows import is_rope, name


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
                        row["error"] = 0.0 if row["kernel"] == "rope copy" else kernel_rope.check(row)
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
