"""One model, the same calibration tokens and the same text for the package and for published ways to compress.

    python -m benchmarks.baselines --ckpt model.gguf --calib calib.npy --text prose=prose.npy manual=manual.npy \
        --rates .15,.25,.35 --suite tasks.npz --json benchmarks/results/baselines.json

Every row says what it is, its bytes in its published form, and perplexity over the original's; tasks with --suite. Each
baseline comes at 16 bits and then rounded to 4 by GPTQ. The record is written after every row, and no row begins after
--minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

from benchmarks.baselines import gptq, modegpt, ours, shortgpt, slicegpt, sparsegpt, svdllm, wanda
from benchmarks.baselines.dense import Calibration, Made, open_dense
from benchmarks.task_suite import Suite
from benchmarks.tasks import against, record
from benchmarks.tasks import measure as measure_tasks
from uniql_jax import console, data
from uniql_jax.convert.source import open_source
from uniql_jax.evaluation.evaluate import perplexity
from uniql_jax.evaluation.timing import environment
from uniql_jax.model.layers import KINDS
from uniql_jax.tokenizer import load_tokenizer

Rows = Callable[[Calibration, Sequence[float]], Iterator[Made]]
METHODS: Mapping[str, Rows] = {
    "MoDeGPT": modegpt.rows,
    "SVD-LLM": svdllm.rows,
    "SliceGPT": slicegpt.rows,
    "ShortGPT": shortgpt.rows,
    "SparseGPT 2:4": lambda calibration, _: sparsegpt.rows(calibration),
    "Wanda 2:4": lambda calibration, _: wanda.rows(calibration),
}
OWN = "uniql-jax"


class Comparison:
    """What is measured of every model, and the record of it."""

    def __init__(self, args: argparse.Namespace, about: Mapping[str, Any], texts: Mapping[str, np.ndarray]):
        self.args, self.about, self.texts, self.began = args, about, texts, time.time()
        suite = Suite.load(args.suite) if args.suite else None
        self.suite = suite.first(args.limit) if suite and args.limit else suite
        self.rows: list[dict[str, Any]] = []
        self.answers: Any = None

    def wants(self, name: str) -> bool:
        """Whether a row is asked for and there is time for it."""
        if not any(part in name for part in self.args.only):
            return False
        if time.time() - self.began > 60 * self.args.minutes:
            print(f"no time for {name}", flush=True)
            return False
        return True

    def add(self, name: str, bits: int, made: Any, taken: float, keep: Any = None) -> None:
        """Measure a model and write the record anew; `made` is a `Made`, or a row of `ours`."""
        on_cpu, start = jax.default_backend() == "cpu", time.time()
        model = made.model.causal_lm() if hasattr(made.model, "causal_lm") else made.model
        with (
            mock.patch.dict(KINDS, getattr(made, "kinds", {})),
            jax.default_matmul_precision("highest" if on_cpu else self.args.precision),
        ):
            batch = 4 if on_cpu else 16
            found = {k: perplexity(model, windows, batch, keep=keep) for k, windows in self.texts.items()}
            answers = measure_tasks(model, self.suite, 4096 if on_cpu else 65536, keep) if self.suite else None
        base = self.rows[0]["perplexity"] if self.rows else found
        row = {
            "name": name, "bits": bits, "prune_rate": made.rate, "removed": made.removed,
            "parameters": made.parameters, "bytes": made.bytes, "seconds": round(taken, 1),
            "perplexity": found, "ratio": {k: value / base[k] for k, value in found.items()},
            **getattr(made, "note", {}),
        }  # fmt: skip
        if answers is not None:
            self.answers = self.answers or answers
            row |= {
                "tasks": record(answers),
                "paired": against(self.rows[0]["name"] if self.rows else name, answers, self.answers),
            }
        self.rows.append(row | {"measured_in": round(time.time() - start, 1)})
        print("  ".join(map(str, self.cells(row))), f" {taken:.0f} s", flush=True)
        if self.args.json:
            whole = {**self.about, "suite": self.suite.digest if self.suite else None, "rows": self.rows}
            console.write_whole(self.args.json, json.dumps(whole, indent=1, default=float) + "\n")

    def cells(self, row: Mapping[str, Any]) -> list[Any]:
        """A row of the table."""
        means = row.get("paired", {}).get("means", {})
        shown = [f"{row['ratio'][text]:.3f}" for text in self.texts]
        shown += [f"{means[label]['ratio']:.3f}" for label in ("five", "all") if label in means]
        return [
            row["name"], row["bits"], f"{row['prune_rate']:g}", f"{row['removed']:.3f}", f"{row['bytes'] / 1e6:.1f} MB",
            *shown,
        ]  # fmt: skip

    def table(self) -> str:
        """All rows."""
        means = self.rows[-1].get("paired", {}).get("means", {}) if self.rows else {}
        header = ["", "bits", "rate", "removed", "bytes", *self.texts, *(f"{label} tasks" for label in means)]
        return console.table([self.cells(row) for row in self.rows], header)


def run(comparison: Comparison, source: Any, windows: np.ndarray, rates: Sequence[float], batch_tokens: int) -> None:
    """Every row that is asked for, the package's first."""
    model = open_dense(source)
    calibration = Calibration.of(model, windows, batch_tokens)
    everything = sum(leaf.size for leaf in jax.tree.leaves((model.layers, model.top)))
    frequencies = sum(layer["attention"]["inv_freq"].size for layer in model.layers)
    count = everything - frequencies
    comparison.add("original", 16, Made(0.0, 0.0, count, 2 * count, model), 0.0)
    with tempfile.TemporaryDirectory() as folder:
        names = [bits for bits in (16, 4) if comparison.wants(f"{OWN}, {bits} bits")]
        measured = ours.measure(source, windows, Path(folder), batch_tokens) if names else None
        for bits in names:
            assert measured is not None
            start = time.time()
            for own in ours.rows(measured, bits, [*([0.0] if bits < 16 else []), *rates]):
                comparison.add(f"{OWN}, {bits} bits", bits, own, time.time() - start, own.keep)
                start = time.time()
    for method, rows in METHODS.items():
        start = time.time()
        if not (comparison.wants(f"{method}, 16 bits") or comparison.wants(f"{method}, 4 bits")):
            continue
        for made in rows(calibration, rates):
            if comparison.wants(f"{method}, 16 bits"):
                comparison.add(f"{method}, 16 bits", 16, made, time.time() - start)
            start = time.time()
            if made.four and comparison.wants(f"{method}, 4 bits"):
                comparison.add(f"{method}, 4 bits", 4, made.four(), time.time() - start)
                start = time.time()
    for bits in (4, 3, 2):
        for rotate in (False, True):
            name = f"GPTQ, {bits} bits" + (", rotated" if rotate else "")
            if comparison.wants(name):
                start = time.time()
                comparison.add(name, bits, gptq.row(calibration, bits, rotate), time.time() - start)


def parser() -> argparse.ArgumentParser:
    """The driver's options."""
    found = argparse.ArgumentParser(
        "python -m benchmarks.baselines", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = found.add_argument
    add("--ckpt", required=True, help="the model: a folder, a .gguf, demo")
    add("--tokenizer", help="folder of tokenizer files, where texts are no .npy of token windows")
    add("--calib", nargs="+", required=True)
    add("--windows", type=int, default=128, help="calibration windows")
    add("--length", type=int, default=512, help="tokens per calibration window")
    add("--text", nargs="+", required=True, help="NAME=SPEC, to measure")
    add("--eval-tokens", type=int, default=65536)
    add("--eval-window", type=int, default=1024)
    add("--rates", default="0.15,0.25,0.35", help="prune rates, of the parameters of the layers' matrices")
    add("--suite", type=Path, help="a file of benchmarks/tasks.py prepare")
    add("--limit", type=int, help="the first items of each task alone")
    add("--only", nargs="+", default=[""], help="rows whose name contains one of these")
    add("--minutes", type=float, default=1e9)
    add("--precision", default="tensorfloat32", help="of products where tasks and text are measured, on GPUs")
    add("--json", type=Path)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, run every row, print as we go, record; the table last."""
    args = parser().parse_args(argv)
    jax.config.update("jax_default_matmul_precision", "highest")
    source = open_source(args.ckpt)
    vocab = source.config.vocab_size
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    calibration = data.token_windows(args.calib, tokenizer, args.length, args.windows, 0, vocab_size=vocab)
    texts = {}
    for item in args.text:
        name, spec = item.split("=", 1)
        found = data.evaluation_windows([spec], tokenizer, args.eval_window, args.eval_tokens, vocab_size=vocab)
        texts[name] = found.tokens
    about = {
        "environment": environment(sys.argv),
        "calibration": calibration.description,
        "tokens": {"calibration": calibration.tokens.size} | {k: v.size for k, v in texts.items()},
    }
    comparison = Comparison(args, about, texts)
    rates = [float(rate) for rate in args.rates.split(",")]
    batch_tokens = 4096 if jax.default_backend() == "cpu" else 16384
    run(comparison, source, calibration.tokens, rates, batch_tokens)
    print(comparison.table())


if __name__ == "__main__":
    main()
