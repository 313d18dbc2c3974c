"""Memory budgets of `Elastic`, and the peaks that sessions reach under them.

    python -m benchmarks.session_budgets --ckpt DIR [--budgets 20] [--context 512] [--json FILE]

Budgets are spread from what prune rate 0.35 needs to what 0 needs. The peak is that of a session whose rows are all
full: bytes of all live arrays, each piece of memory once, and at every step what the compiler says that its program
takes in addition; while weights are loaded, a leaf as it was read. The interpreter and its libraries are not part.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import sys
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from uniql_jax import Elastic, console
from uniql_jax.evaluation.timing import environment
from uniql_jax.runtime import loading, resizing
from uniql_jax.runtime.batching import Batch
from uniql_jax.runtime.programs import tree_bytes, work_space
from uniql_jax.runtime.requests import Settings


def held() -> int:
    """Bytes of all live arrays, each piece of memory once."""
    found: dict[int, int] = {}
    for array in jax.live_arrays():
        where = array.unsafe_buffer_pointer()
        found[where] = max(found.get(where, 0), int(array.nbytes))
    return sum(found.values())


def measured_peak(make: Callable[[], Elastic], new: int = 8) -> tuple[Elastic, int]:
    """A session, and the most bytes while it loads and while all its rows fill their context, by `new` tokens each."""
    gc.collect()  # sessions before this one
    peak, before, run, read, place = 0, held(), Batch._run, Batch._read, loading.place

    def at_least(extra: int) -> None:
        nonlocal peak
        peak = max(peak, held() - before + extra)

    def placed(leaf: Any, value: Any, *args: Any, **named: Any) -> Any:
        """Where a CPU computes, a leaf lies in memory twice for a moment: as it was read, and as JAX has it."""
        found = place(leaf, value, *args, **named)
        at_least(tree_bytes(value) if resizing.on_host() else 0)
        return found

    def measured(batch: Batch, program: Any, *rest: Any) -> Any:
        at_least(work_space(program))
        return run(batch, program, *rest)

    def measured_reading(batch: Batch, program: Any, *rest: Any) -> Any:
        at_least(work_space(program))
        return read(batch, program, *rest)

    patch = unittest.mock.patch.object
    with patch(Batch, "_run", measured), patch(Batch, "_read", measured_reading), patch(loading, "place", placed):
        session = make()
        prompt = np.arange(3, 3 + session.shape.context - new)
        requests = [session.submit(prompt, Settings(new)) for _ in range(session.shape.rows)]
        while session.step():
            at_least(0)
    assert all(request.made == new for request in requests)
    return session, peak


def budgets(ckpt: Path, count: int, **shape: int) -> Iterator[dict[str, Any]]:
    """Rows of the table: a budget, the rate that was taken for it, and the peak under it."""
    needs = [Elastic(ckpt, rate=rate, **shape).need.total for rate in (0.35, 0.0)]
    for budget in np.linspace(*needs, count).astype(int).tolist():
        session, peak = measured_peak(functools.partial(Elastic, ckpt, memory_budget=budget, **shape))
        yield {
            "budget": budget,
            "rate": session.rate,
            "need": session.need.total,
            "peak": peak,
            "share": round(peak / budget, 4),
        }
        del session  # before the next one is loaded


def main() -> None:
    """Measure and print; write what --json names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, required=True, help="elastic checkpoint")
    parser.add_argument("--budgets", type=int, default=20, help="how many")
    parser.add_argument("--context", type=int, default=512, help="of each session")
    parser.add_argument("--batch", type=int, default=1, help="of each session")
    parser.add_argument("--json", help="write everything here")
    args = parser.parse_args()
    found: dict[str, Any] = {"environment": environment(["benchmarks.session_budgets", *sys.argv[1:]])}
    found |= {"model": args.ckpt.name, "context": args.context, "batch": args.batch, "budgets": []}
    for row in budgets(args.ckpt, args.budgets, context=args.context, batch=args.batch):
        sizes = [console.format_bytes(row[key]) for key in ("budget", "peak")]
        print(f"{sizes[0]} prune rate {row['rate']:g}, peak {sizes[1]}, {row['share']:.1%} of the budget", flush=True)
        found["budgets"].append(row)
        if args.json:
            console.write_whole(args.json, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
