"""What pulling weights ahead brings to a decode step of some layers of a published config, under several budgets.

    python benchmarks/decode_ahead.py --config llama-3.1-8b --rate 0.35 --layers 8

A budget is what a launch pulls for the next ones, in MiB, "e" where before its own work: READ,INNER,WRITE.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.decode_profile import shortened
from uniql_jax.evaluation.bench import Bench
from uniql_jax.evaluation.random_model import random_model, read_config
from uniql_jax.evaluation.timing import device_name, environment
from uniql_jax.model.layers import fused
from uniql_jax.pallas_kernels import ahead
from uniql_jax.pallas_kernels.ahead import Budget

BUDGETS = ("0,0,0", "1,4e,1", "2,8e,2", "4,4e,4", "4,8e,0", "0,8e,4", "4,8e,4", "4,12e,4", "8,16e,8", "4,8,4")


def budget(text: str) -> Budget:
    """A Budget from MiB, as the command line has it."""
    return Budget(int(float(text.removesuffix("e")) * 2**20), text.endswith("e"))


def main() -> None:
    """Parse, run, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="llama-3.1-8b")
    parser.add_argument("--rate", type=float, nargs="+", default=[0.35])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS))
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = shortened(read_config(args.config), args.layers)
    started, rows = time.monotonic(), []
    print(f"{device_name()}; weights are pulled ahead: {ahead.available()}", flush=True)
    for rate in args.rate:
        first = None
        bench = Bench(random_model(config, 4, rate), args.batch, args.context, 64, 7)
        for text in args.budgets:
            if time.monotonic() - started > 60 * args.minutes:
                break
            fused.READ, fused.INNER, fused.WRITE = map(budget, text.split(","))
            vars(bench).pop("loop", None)  # the prefill stays compiled
            jax.clear_caches()
            begun = time.monotonic()
            seconds = bench.tpot_loop()
            answer = np.asarray(bench.answer())
            first = answer if first is None else first
            same = float((answer == first).mean())
            per_layer = 1e6 * seconds.median / args.layers
            rows.append(
                dict(rate=rate, budgets=text, step_us=1e6 * seconds.median, per_layer_us=per_layer, same_tokens=same)
            )
            spread = f"{1e6 * seconds.low:.1f}-{1e6 * seconds.high:.1f}; {time.monotonic() - begun:.0f} s"
            said = f"{1e6 * seconds.median:8.1f} us a step, {per_layer:6.2f} a layer, {same:.0%} same tokens"
            print(f"rate {rate:<5g} {text:12s} {said}  ({spread})", flush=True)
    if args.json:
        record = environment() | dict(config=args.config, layers=args.layers, batch=args.batch, rows=rows)
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
