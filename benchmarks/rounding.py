"""What 4 bits cost without pruning, by how they are rounded, next to llama.cpp's files of the same model; 3 bits, and
nested codes that hold both. Perplexity and zero-shot tasks, bytes counted; writes a JSON record.

    python benchmarks/rounding.py --ckpt model.gguf --calib calib.npy --text prose=prose.npy manual=manual.npy \
        --suite tasks.npz --ggml ggml.so --minutes 7 --json rounding.json

Every row rounds the same sorted layers one after the other, fitted to what the rounded ones before feed them. Rows run
in the order of their importance; the record is written after each, and none begins after `--minutes`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import texts
from benchmarks.rounding_math import Method
from benchmarks.rounding_model import Row, build, sorted_model
from benchmarks.task_suite import Suite
from benchmarks.tasks import against, record
from benchmarks.tasks import measure as measure_tasks
from uniql_jax import console
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.convert.source import open_source
from uniql_jax.evaluation.evaluate import perplexity
from uniql_jax.evaluation.timing import environment
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.tokenizer import load_tokenizer

BEST = Method(scale="loss", sweeps=2)


def rows() -> list[Row]:
    """The comparison, the most important first."""
    change = dataclasses.replace
    eight, active = Method(bits=8), Method(order="active", damped="own")
    return [
        Row("gptq (the package's)", tasks=True),
        Row("scales by loss, 2 descents", BEST, tasks=True),
        Row("active order, own damping, 2 descents", change(active, sweeps=2), tasks=True),
        Row("llama.cpp Q4_K_M", mix="Q4_K_M", tasks=True),
        Row("llama.cpp Q3_K_M", mix="Q3_K_M", tasks=True),
        Row("scales by loss, 2 descents, fitted to the original", BEST, compensate=True, tasks=True),
        Row("3 bits, gptq", Method(bits=3), tasks=True),
        *(Row(f"nested {share}, 4 descents", Method(share=share, sweeps=4)) for share in (0.5, 0.4, 0.6)),
        Row("3 bits, scales by loss, 2 descents", change(BEST, bits=3)),
        Row("scales by loss", Method(scale="loss")),
        Row("2 descents", Method(sweeps=2)),
        Row("gptq, embedding and head 8 bits", top=eight),
        Row("loss, descents, embedding and head 8 bits", BEST, top=eight),
        Row("gptq, groups of 64", Method(group=64)),
        Row("gptq, groups of 32", Method(group=32)),
        Row("loss, descents, groups of 64", change(BEST, group=64)),
        Row("loss, descents, groups of 32", change(BEST, group=32)),
        Row("gptq, fitted to the original", compensate=True),
        Row("own damping", Method(damped="own")),
        Row("active order, own damping", active),
        Row("active order, own damping, 4 descents", change(active, sweeps=4)),
        Row("damping 0.001", Method(damping=0.001)),
        Row("damping 0.1", Method(damping=0.1)),
        Row("max-abs scales", Method(scale="max")),
        Row("nested 0.5", Method(share=0.5)),
        Row("not rotated, gptq", rotate=False),
        Row("not rotated, loss, descents", BEST, rotate=False),
        Row("6 descents", change(BEST, sweeps=6)),
        Row("llama.cpp Q4_0", mix="Q4_0"),
    ]


def main() -> None:
    """Parse, run every row, print as we go, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="the model; a .gguf for rows of llama.cpp")
    texts.add_arguments(parser)
    parser.add_argument("--suite", type=Path, help="a file of benchmarks/tasks.py prepare")
    parser.add_argument("--limit", type=int, help="the first items of each task alone")
    parser.add_argument("--tasks-everywhere", action="store_true", help="measure tasks in every row")
    parser.add_argument("--ggml", help="shared library with ggml_quantize_chunk, for rows of llama.cpp")
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name contains one of these")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--precision", default="tensorfloat32", help="of products where tasks and text are measured")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    began = time.time()
    on_cpu = jax.default_backend() == "cpu"
    jax.config.update("jax_default_matmul_precision", "highest")
    opened = open_source(args.ckpt)
    vocab, settings = opened.config.vocab_size, CompressionSettings()
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    calibration, found_texts = texts.read(args, tokenizer, vocab)
    suite = Suite.load(args.suite) if args.suite else None
    suite = suite.first(args.limit) if suite and args.limit else suite
    measured: list[dict[str, Any]] = []
    first: dict[str, Any] = {}

    def measure(name: str, model: CausalLM, size: int, taken: float, with_tasks: bool, extra: Any = None) -> None:
        with jax.default_matmul_precision("highest" if on_cpu else args.precision):
            one: dict[str, Any] = {"name": name, "bytes": size, "seconds": round(taken, 1)}
            batch = 4 if on_cpu else 16
            one["perplexity"] = {k: perplexity(model, each.tokens, batch) for k, each in found_texts.items()}
            if suite and (with_tasks or args.tasks_everywhere):
                found = measure_tasks(model, suite, 4096 if on_cpu else 65536)
                first.setdefault("answers", found)
                one["tasks"] = record(found)
                if measured:
                    one["paired"] = against(measured[0]["name"], found, first["answers"])
        base = measured[0]["perplexity"] if measured else one["perplexity"]
        one["ratio"] = {k: value / base[k] for k, value in one["perplexity"].items()}
        measured.append(one | ({"output_errors": extra} if extra else {}))
        ratios = "  ".join(f"{k} {value:.4f}" for k, value in one["ratio"].items())
        means = one.get("paired", {}).get("means", {})
        shown = "  ".join(
            f"{k} tasks {m['ratio']:.4f} ± {(m['ratio_high'] - m['ratio']):.4f}" for k, m in means.items()
        )
        print(f"{name:52s} {size / 1e6:7.2f} MB  {ratios}  {shown}  {taken:.1f}s", flush=True)
        if args.json:
            whole = {"environment": environment(), "calibration": calibration.description, "rows": measured}
            whole |= {"suite": suite.digest} if suite else {}
            console.write_whole(args.json, json.dumps(whole, indent=1) + "\n")

    layers: Iterable[Any] = (jax.tree.map(jnp.asarray, opened.layer(i)) for i in range(len(opened.config.pattern)))
    params = {"layers": list(layers), **jax.tree.map(jnp.asarray, opened.top())}
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    measure("original", CausalLM(opened.config, params, dtype=jnp.float32), 2 * count, 0.0, True)
    del params
    start = time.time()
    model = sorted_model(args.ckpt, calibration.tokens, settings, 4096 if on_cpu else 16384)
    print(f"sorted in {time.time() - start:.1f}s, {time.time() - began:.0f}s since the start", flush=True)
    ggml = args.ggml and importlib.util.find_spec("gguf")
    for row in rows():
        if not any(part in row.name for part in args.only) or (row.mix and not ggml):
            continue
        if time.time() - began > 60 * args.minutes:
            print(f"no time for {row.name}")
            continue
        start = time.time()
        if row.mix:
            from benchmarks.llamacpp import requantized

            try:
                found, size = requantized(args.ckpt, args.ggml, row.mix)
            except OSError as error:
                print(f"no {row.name}: {error}")
                continue
            measure(row.name, found, size, time.time() - start, row.tasks)
            continue
        views, errors = build(model, row, settings)
        taken = time.time() - start
        means = {name: [round(float(np.mean(values)), 6), round(max(values), 6)] for name, values in errors.items()}
        for view in views:
            whole = CausalLM(model.config, {"layers": view.layers, **view.top}, dtype=jnp.float32)
            measure(f"{row.name} {view.label}".strip(), whole, view.bytes, taken, row.tasks, means)


if __name__ == "__main__":
    main()
