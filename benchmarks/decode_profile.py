"""Where the time of a decode step goes: kernels by name, their number and microseconds a step, from a device trace.

    python benchmarks/decode_profile.py --config llama-3.1-8b --rate 0.25 --context 1024

A trace launches kernels one by one, so that gaps between them are not those of a real run; durations are.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import glob
import gzip
import json
import re
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from uniql_jax.config import ModelConfig
from uniql_jax.evaluation.bench import Bench
from uniql_jax.evaluation.random_model import random_model, read_config
from uniql_jax.runtime import generation as runtime

CALLS = 2


def durations(folder: str) -> dict[str, list[float]]:
    """Kernel -> microseconds of each run, from the trace in a folder; instances of a name count as one kernel."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    for path in glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True):
        with gzip.open(path) as file:
            trace = json.load(file)["traceEvents"]
        threads = {
            (event["pid"], event.get("tid")): event["args"]["name"]
            for event in trace
            if event.get("name") == "thread_name"
        }
        for event in trace:
            if event.get("ph") == "X" and "Stream" in threads.get((event["pid"], event.get("tid")), ""):
                found[re.sub(r"[._]\d+$", "", event["name"])].append(float(event["dur"]))
    return found


def shortened(config: ModelConfig, layers: int) -> ModelConfig:
    """The config with its first layers only, and a small vocabulary, so that the layers are what is timed."""
    return dataclasses.replace(config, pattern=config.pattern[:layers], vocab_size=4096)


def main() -> None:
    """Parse, run, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="llama-3.1-8b")
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--layers", type=int, help="so many layers only, and a small vocabulary")
    args = parser.parse_args()
    config = read_config(args.config)
    config = shortened(config, args.layers) if args.layers else config
    model = random_model(config, args.bits, args.rate)
    many = runtime.chunk()
    bench = Bench(model, args.batch, args.context, 1 + 2 * CALLS * many)
    token, cache = bench._start()
    for call in range(CALLS):
        _, token, cache = bench._run_step(token, cache, 1 + call * many)
    jax.block_until_ready(token)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for call in range(CALLS, 2 * CALLS):
                _, token, cache = bench._run_step(token, cache, 1 + call * many)
            jax.block_until_ready(token)
        found = durations(folder)
    steps = CALLS * many
    total = sum(map(sum, found.values())) / steps
    print(
        f"{args.config} at rate {args.rate:g}, {args.bits} bits, batch {args.batch}: {total:.0f} us of kernels a step"
    )
    for name, times in sorted(found.items(), key=lambda item: -sum(item[1]))[:24]:
        print(f"{sum(times) / steps:9.1f} us  {len(times) / steps:6.1f} x {np.median(times):7.2f} us  {name[:70]}")


if __name__ == "__main__":
    main()
