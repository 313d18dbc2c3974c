"""Memory budgets of `Elastic`, and the peaks that sessions reach under them.

    python -m benchmarks.session_budgets --ckpt DIR [--budgets 20] [--context 512] [--json FILE]

Budgets are spread from what prune rate 0.35 needs to what 0 needs. The peak is that of a session whose rows are all
full: bytes of all live arrays, each piece of memory once, and at every step what the compiler says that its program
takes in addition. The interpreter and its libraries are not part of it.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import uniql_jax
from uniql_jax import console
from uniql_jax.evaluation.timing import environment
from uniql_jax.runtime.batching import Batch
from uniql_jax.runtime.requests import Settings
from uniql_jax.runtime.steps import work_space


def held() -> int:
    """Bytes of all live arrays, each piece of memory once."""
    gc.collect()
    found: dict[int, int] = {}
    for array in jax.live_arrays():
        where = array.unsafe_buffer_pointer()
        found[where] = max(found.get(where, 0), int(array.nbytes))
    return sum(found.values())


def measured_peak(session: Any, before: int, new: int = 16) -> int:
    """The most bytes that a session takes while all its rows fill their context, with `new` tokens made in each."""
    peak, run = 0, Batch._run

    def measured(batch: Batch, program: Any, *rest: Any) -> Any:
        nonlocal peak
        peak = max(peak, held() - before + work_space(program))
        return run(batch, program, *rest)

    prompt = np.arange(3, 3 + session.shape.context - new)
    with unittest.mock.patch.object(Batch, "_run", measured):
        requests = [session.submit(prompt, Settings(new)) for _ in range(session.shape.rows)]
        while session.step():
            peak = max(peak, held() - before)
    assert all(request.made == new for request in requests)
    return peak


def budgets(ckpt: Path, count: int, **shape: int) -> Iterator[dict[str, Any]]:
    """Rows of the table: a budget, the rate that was taken for it, and the peak under it."""
    needs = [uniql_jax.Elastic(ckpt, rate=rate, **shape).need.total for rate in (0.35, 0.0)]
    for budget in np.linspace(*needs, count).astype(int).tolist():
        before = held()
        session = uniql_jax.Elastic(ckpt, memory_budget=budget, **shape)
        peak = measured_peak(session, before)
        yield {"budget": budget, "rate": session.rate, "peak": peak, "share": round(peak / budget, 4)}
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
