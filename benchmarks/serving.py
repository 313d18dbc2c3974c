"""The step that users run: prompts of any length, batches, long contexts, sampled tokens, caches of 8 bits.

    python -m benchmarks.serving --config llama-3.1-8b [--json FILE]        all tables, random weights of 4 bits
    python -m benchmarks.serving --config llama-3.1-8b --tables ttft,sampled
    python -m benchmarks.serving --config DIR/config.json --lengths 20,40 --contexts 64,128 --batches 1,2   a small one

Tables: `ttft` (time to the first token over prompt lengths, next to the line between the powers of two around each),
`after` (time a token after prompts of 1,024 and 1,100 tokens), `sampled` (a sampled token's time over a greedy one's),
`batches` (time a step of 1 to 64 rows, next to a dense bfloat16 model), `contexts` (time a token behind 1k, 8k and 32k
tokens, caches of 16 and 8 bits). Each is of one run; times are medians with the least and the most, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uniql_jax import console
from uniql_jax.config import ModelConfig
from uniql_jax.evaluation.bench import Bench
from uniql_jax.evaluation.random_model import random_model, read_config
from uniql_jax.evaluation.timing import Timing, environment
from uniql_jax.model.causal_lm import CausalLM

LENGTHS = (100, 600, 1100, 1500, 3000, 5000, 9000)
BATCHES = (1, 2, 4, 8, 16, 17, 32, 64)
CONTEXTS = (1024, 8192, 32768)
SAMPLED = (0.8, 0.95, 50)
"""Temperature, top_p, top_k."""
BITS = 4

Row = dict[str, Any]


def milliseconds(name: str, timing: Timing) -> Row:
    """The columns of a time."""
    return {name: timing.median * 1e3, f"{name} least": timing.low * 1e3, f"{name} most": timing.high * 1e3}


def powers_around(length: int) -> tuple[int, int]:
    """The powers of two that enclose a length."""
    low = 1 << (length.bit_length() - 1)
    return low, low if low == length else 2 * low


def ttft(model: CausalLM, args: argparse.Namespace) -> list[Row]:
    """Prompt lengths, and what a straight line between powers of two would give."""
    most = model.config.max_position - args.tokens
    ends = {end for length in args.lengths for end in powers_around(length)}
    found = {}
    for length in sorted({n for n in (*args.lengths, *ends) if n <= most}):
        found[length] = Bench(model, 1, length, args.tokens, args.repeats).ttft()
    rows = []
    for length, timing in found.items():
        low, high = powers_around(length)
        line = None
        if low in found and high in found:
            line = float(np.interp(length, (low, high), (found[low].median, found[high].median)))
        over = None if line is None else timing.median / line
        rows.append({"prompt": length} | milliseconds("ttft ms", timing) | {"over the line": over})
    return rows


def after_prompts(model: CausalLM, args: argparse.Namespace) -> list[Row]:
    """Time a token after a prompt that fills its bucket, and after one that does not."""
    lengths = [n for n in (args.contexts[0], args.contexts[0] * 1100 // 1024) if n + args.tokens <= most_of(model)]
    return [
        {"prompt": n} | milliseconds("ms a token", Bench(model, 1, n, args.tokens, args.repeats).tpot_loop())
        for n in lengths
    ]


def most_of(model: CausalLM) -> int:
    """Tokens that the model takes."""
    return model.config.max_position


def sampled(model: CausalLM, args: argparse.Namespace) -> list[Row]:
    """Greedy and sampled tokens, with each filter alone and both."""
    kinds = {"greedy": (0.0, 1.0, 0), "temperature": (0.8, 1.0, 0), "top_p, top_k": SAMPLED}
    rows: list[Row] = []
    for name, settings in kinds.items():
        bench = Bench(model, 1, args.contexts[0], args.tokens, args.repeats, sampling=settings)
        rows.append({"draw": name} | milliseconds("ms a token", bench.tpot_loop()))
        rows[-1]["over greedy"] = rows[-1]["ms a token"] / rows[0]["ms a token"]
    return rows


def batches(model: CausalLM, args: argparse.Namespace) -> list[Row]:
    """Rows of a batch: time a step, and over the next larger batch's; next to a dense model where one is asked for."""
    dense = random_model(model.config, 16) if args.dense else None
    rows: list[Row] = []
    for batch in args.batches:
        row: Row = {"batch": batch}
        for name, each in (("ms a step", model), ("dense ms a step", dense)):
            if each is not None:
                row |= milliseconds(name, Bench(each, batch, args.prompt, args.tokens, args.repeats).tpot_loop())
        if dense is not None:
            row["times dense"] = row["dense ms a step"] / row["ms a step"]
        rows.append(row)
    return rows


def contexts(model: CausalLM, args: argparse.Namespace) -> list[Row]:
    """Time a token behind long contexts, for caches of 16 and 8 bits."""
    rows: list[Row] = []
    second = args.contexts[min(1, len(args.contexts) - 1)]
    for batch, context in (*((1, context) for context in args.contexts), (args.many, second)):
        if context + args.tokens > most_of(model):
            continue
        row: Row = {"batch": batch, "context": context}
        for bits in (16, 8):
            bench = Bench(model, batch, context, args.tokens, args.repeats, cache_bits=bits)
            row |= milliseconds(f"{bits} bits ms", bench.tpot_loop()) | {f"{bits} bits cache": bench.cache_bytes}
        row["8 bits faster by"] = row["16 bits ms"] / row["8 bits ms"]
        rows.append(row)
    return rows


TABLES: dict[str, Callable[[CausalLM, argparse.Namespace], list[Row]]] = {
    "ttft": ttft,
    "after": after_prompts,
    "sampled": sampled,
    "batches": batches,
    "contexts": contexts,
}


def measure(config: ModelConfig, args: argparse.Namespace) -> dict[str, Any]:
    """All tables asked for, at every rate."""
    found: dict[str, Any] = {"model": args.config, "bits": BITS, "environment": environment()}
    for rate in args.rates:
        model = random_model(config, BITS, rate)
        for name in args.tables:
            rows = TABLES[name](model, args)
            found.setdefault(name, []).extend({"rate": rate} | row for row in rows)
            if rows:
                shown = [[row.get(column) for column in rows[0]] for row in rows]
                print(f"\n{name} at rate {rate:g}\n{console.table(shown, list(rows[0]))}", flush=True)
            if args.json:
                console.write_whole(args.json, json.dumps(found, indent=1) + "\n")
    return found


def numbers(text: str) -> tuple[int, ...]:
    """Integers, separated by commas."""
    return tuple(int(part) for part in text.split(","))


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, run, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", default="llama-3.1-8b")
    add("--rates", type=lambda text: tuple(map(float, text.split(","))), default=(0.0, 0.35))
    add("--tables", type=lambda text: tuple(text.split(",")), default=tuple(TABLES), help=", ".join(TABLES))
    add("--lengths", type=numbers, default=LENGTHS, help="of prompts, for ttft")
    add("--batches", type=numbers, default=BATCHES)
    add("--contexts", type=numbers, default=CONTEXTS, help="the first is that of single tables")
    add("--prompt", type=int, default=1024, help="tokens of each row's prompt, for batches")
    add("--many", type=int, default=16, help="rows of the second context, once more")
    add("--tokens", type=int, default=65, help="of an answer")
    add("--repeats", type=int, default=5)
    add("--dense", action=argparse.BooleanOptionalAction, default=True, help="a dense model next to batches")
    add("--json", type=Path)
    args = parser.parse_args(argv)
    if unknown := [name for name in args.tables if name not in TABLES]:
        parser.error(f"no table {unknown[0]!r}; there are {', '.join(TABLES)}")
    measure(read_config(args.config), args)


if __name__ == "__main__":
    main()
