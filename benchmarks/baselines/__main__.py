"""One model, the same calibration tokens and the same text for the package and for published ways to compress.

    python -m benchmarks.baselines --ckpt model.gguf --calib calib.npy --text prose=prose.npy manual=manual.npy \
        --rates .15,.25,.35 --suite tasks.npz --json benchmarks/results/baselines.json

Every row says what it is, its bytes in its published form, and perplexity over the original's; tasks with --suite. Each
baseline comes at 16 bits and then rounded to 4 by GPTQ; --recover adds rows after the package's training. The record is
written after every row, and no row begins after --minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import texts
from benchmarks.baselines import gptq, modegpt, ours, shortgpt, sizes, slicegpt, sparsegpt, svdllm, wanda
from benchmarks.baselines.comparison import Comparison
from benchmarks.baselines.dense import Calibration, Made, open_dense
from benchmarks.baselines.recovered import Recovery, recovered
from uniql_jax import data
from uniql_jax.convert.source import open_source
from uniql_jax.evaluation.timing import environment
from uniql_jax.tokenizer import load_tokenizer
from uniql_jax.train.examples import from_windows
from uniql_jax.train.settings import LENGTH

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


def run(
    comparison: Comparison,
    source: Any,
    windows: np.ndarray,
    rates: Sequence[float],
    batch_tokens: int,
    recovery: Recovery | None = None,
) -> None:
    """Every row that is asked for, the package's first."""
    model = open_dense(source)
    calibration = Calibration.of(model, windows, batch_tokens)
    count = sizes.kept_parameters(model.config, [{}] * len(model.layers))
    comparison.add("original", 16, Made(0.0, 0.0, count, 2 * count, model), 0.0)
    own_rows(comparison, source, windows, rates, batch_tokens, recovery)
    for method, rows in METHODS.items():
        trained = f"{method}, recovered"
        if not (comparison.wants_either(method) or (recovery and comparison.wants_either(trained))):
            continue
        for made, taken in timed(rows(calibration, rates)):
            both(comparison, method, made, taken)
            if recovery and made.keeps is not None and comparison.wants_either(trained):
                better, taken = called(lambda made=made: recovered(made, calibration, recovery))
                both(comparison, trained, better, taken)
    for bits in (4, 3, 2):
        for rotate in (False, True):
            name = f"GPTQ, {bits} bits" + (", rotated" if rotate else "")
            if comparison.wants(name):
                made, taken = called(lambda b=bits, r=rotate: gptq.row(calibration, b, r))
                comparison.add(name, bits, made, taken)


def own_rows(
    comparison: Comparison,
    source: Any,
    windows: np.ndarray,
    rates: Sequence[float],
    batch_tokens: int,
    recovery: Recovery | None,
) -> None:
    """The package's rows, at 16 bits and at 4, and after one training for all rates."""
    ways: dict[str, Any] = {"": None}
    if recovery is not None:
        ways[", recovered"] = recovery.once(source.config, source.top())
    names = [(f"{OWN}{way}, {bits} bits", bits, train) for way, train in ways.items() for bits in (16, 4)]
    names = [one for one in names if comparison.wants(one[0])]
    if not names:
        return
    with tempfile.TemporaryDirectory() as folder:
        measured = ours.measure(source, windows, Path(folder), batch_tokens)
        for name, bits, train in names:
            at = [*([0.0] if bits < 16 else []), *rates]
            if comparison.wants(name):
                for own, taken in timed(ours.rows(measured, bits, at, train)):
                    comparison.add(name, bits, own, taken, own.keep)


def both(comparison: Comparison, method: str, made: Made, taken: float) -> None:
    """A baseline's row at 16 bits and, made from it, the one at 4."""
    if comparison.wants(f"{method}, 16 bits"):
        comparison.add(f"{method}, 16 bits", 16, made, taken)
    if made.four and comparison.wants(f"{method}, 4 bits"):
        four, taken = called(made.four)
        comparison.add(f"{method}, 4 bits", 4, four, taken)


def timed(items: Iterator[Any]) -> Iterator[tuple[Any, float]]:
    """Items, and the seconds that each took to come."""
    while True:
        item, taken = called(lambda: next(items, None))
        if item is None:
            return
        yield item, taken


def called(make: Callable[[], Any]) -> tuple[Any, float]:
    """What is made, and the seconds that it took, its arrays included."""
    start = time.time()
    made = make()
    jax.block_until_ready(getattr(getattr(made, "model", None), "layers", ()))
    return made, time.time() - start


def parser() -> argparse.ArgumentParser:
    """The driver's options."""
    found = argparse.ArgumentParser(
        "python -m benchmarks.baselines", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = found.add_argument
    add("--ckpt", required=True, help="the model: a folder, a .gguf, demo")
    texts.add_arguments(found)
    add("--rates", default="0.15,0.25,0.35", help="prune rates, of the parameters of the layers' matrices")
    add("--suite", type=Path, help="a file of benchmarks/tasks.py prepare")
    add("--limit", type=int, help="the first items of each task alone")
    add(
        "--recover", type=int, metavar="STEPS", help="train what can be trained for so many steps, in rows of their own"
    )
    add("--train", nargs="+", help="text to train on (default: that of --calib), in examples of 256 tokens")
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
    calibration, found = texts.read(args, tokenizer, vocab)
    measured = {name: each.tokens for name, each in found.items()}
    about = {
        "environment": environment(sys.argv),
        "calibration": calibration.description,
        "tokens": {"calibration": calibration.tokens.size} | {k: v.size for k, v in measured.items()},
    }
    comparison = Comparison(args, about, measured)
    rates = [float(rate) for rate in args.rates.split(",")]
    batch_tokens = 4096 if jax.default_backend() == "cpu" else 16384
    recovery = None
    if args.recover:
        found = data.token_windows(args.train or args.calib, tokenizer, LENGTH, None, vocab_size=vocab)
        about["training"] = found.description
        recovery = Recovery(from_windows(found.tokens, found.description), args.recover)
    run(comparison, source, calibration.tokens, rates, batch_tokens, recovery)
    print(comparison.table())


if __name__ == "__main__":
    main()
