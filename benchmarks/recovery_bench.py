"""What recovery.py does for a row: trains a sorted model, finishes its weights as the pass does, and measures them."""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from benchmarks import stages, tasks
from benchmarks.quality import RATES
from benchmarks.task_suite import Suite
from uniql_jax import console, elastic
from uniql_jax.checkpoint import open_checkpoint
from uniql_jax.compiling import jit
from uniql_jax.compression.artifacts import LayerStore, flatten, layer_name
from uniql_jax.compression.contract import Gains, RecoveryData
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.config import ModelConfig
from uniql_jax.evaluation.likelihood import masks
from uniql_jax.model.causal_lm import CausalLM, embed
from uniql_jax.model.layers.context import full_context
from uniql_jax.plan import Plan
from uniql_jax.train import lora, rates, recover, stack
from uniql_jax.train.examples import Examples, joined, split
from uniql_jax.train.loop import RecoverySettings, Trainer
from uniql_jax.train.losses import head_losses
from uniql_jax.weights.protocol import dense
from uniql_jax.weights.quantized import QuantizedArray

Layers = Sequence[lora.Layer]


@dataclasses.dataclass(frozen=True)
class Row:
    """A way to recover: settings of the training that differ from the run's own (None: no training), those of the pass
    that differ from its defaults, the bits at which it is measured, for 4 bits the settings of a training that goes on
    after quantizing (None: none), and names of the texts that are trained on (None: all).
    """

    name: str
    train: dict[str, Any] | None = None
    finish: dict[str, Any] = dataclasses.field(default_factory=dict)
    bits: tuple[int, ...] = (16,)
    tune: dict[str, Any] | None = None
    texts: tuple[str, ...] | None = None


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


@functools.partial(jit, static_argnames="config")
def window_loss(config: ModelConfig, params: Any, tokens: jax.Array, keep: Any) -> jax.Array:
    """Mean next-token loss, nats, of float32 windows at masked sizes; `params` as `stacked` gives them."""
    context = full_context(jnp.ones(tokens.shape, bool), padded=False)
    x = stack.apply_runs(config, params["runs"], embed(params["top"], tokens, jnp.float32), context, keep)
    total, (_, count) = head_losses(params["top"], config.norm_eps, x, tokens, jnp.ones(tokens.shape))
    return total / count


def stacked(config: ModelConfig, layers: Layers, top: dict[str, Any]) -> Any:
    """A whole model on the device in float32, whatever its leaves are held as, layers of one kind stacked."""
    layers = _wide(list(layers))
    runs = [stack.stack(layers, run) for run in stack.runs(config)]
    return jax.tree.map(jnp.asarray, {"runs": runs, "top": _wide(top)})


def _wide(tree: Any) -> Any:
    """A pytree of leaves, whatever they are held as, in float32 on the host."""
    return jax.tree.map(
        lambda leaf: np.asarray(dense(leaf)).astype(np.float32), tree, is_leaf=lambda x: isinstance(x, QuantizedArray)
    )


class Bench:
    """One model, its texts, and what rows share: compiled trainers, trained layers, the head's Gram matrix.

    sets: what may be trained on, by name. suite: tasks that finished models answer, those of `answered` bits.
    """

    def __init__(
        self,
        model: Sorted,
        calibration: np.ndarray,
        sets: dict[str, Examples],
        texts: dict[str, np.ndarray],
        options: RecoverySettings,
        work: Path,
        suite: Suite | None = None,
    ):
        self.model, self.calibration, self.sets, self.suite = model, calibration, sets, suite
        self.texts, self.options, self.work = texts, options, work
        self.trainers: dict[RecoverySettings, Trainer] = {}
        self.trained: dict[tuple[RecoverySettings, tuple[str, ...]], tuple[Layers, dict[str, Any]]] = {}
        self.forward: stages.Measured | None = None
        self.original: dict[str, float] = {}
        self.right: tasks.Answers = {}

    def split_of(self, row: Row) -> tuple[Examples, Examples]:
        """Training and validation set of a row."""
        chosen = joined([self.sets[name] for name in row.texts or self.sets])
        return split(chosen, self.options.held_share, self.options.held_most, self.options.seed)

    def options_of(self, settings: dict[str, Any]) -> RecoverySettings:
        """The settings of a training."""
        options = dataclasses.replace(self.options, **settings)
        return dataclasses.replace(options, alpha=lora.alpha_of(options.rank))

    def layers_of(self, row: Row) -> tuple[Layers, dict[str, Any]]:
        """Trained layers of a row with LoRA merged, and what the training says of itself; each training runs once."""
        if row.train is None:
            return self.model.layers, {}
        options = self.options_of(row.train)
        if (options, row.texts or ()) not in self.trained:
            train_split, validation = self.split_of(row)
            # Which rates are drawn and validated is no part of the program: such rows share it.
            program = dataclasses.replace(options, rates="uniform", validation_rates=self.options.validation_rates)
            model, start = self.model, time.perf_counter()
            if program not in self.trainers:
                steps = options.total_steps(len(train_split))
                first = next(iter(self.trainers.values()), None)
                self.trainers[program] = (
                    first.variant(program, steps)
                    if first is not None
                    else Trainer(model.config, model.layers, model.embeddings, program, steps)
                )
            result = recover.train(
                model.config, model.layers, model.embeddings, model.plan, train_split, validation, options,
                self.work / f"row-{len(self.trained)}", lambda steps: console.progress(steps, row.name),
                self.trainers[program],
            )  # fmt: skip
            factors = jax.device_get(result.factors)
            layers = [lora.merge_layer(i, layer, factors, options.alpha) for i, layer in enumerate(model.layers)]
            self.trained[options, row.texts or ()] = (
                layers,
                {
                    "trained_numbers": lora.count(result.factors),
                    **_provenance(options, result, start),
                },
            )
        return self.trained[options, row.texts or ()]

    def finished(self, row: Row, layers: Layers, bits: int) -> tuple[Layers, dict[str, Any], dict[str, Any]]:
        """A row's layers as the pass would store them at these bits, the leaves outside them, and what tuning says of
        itself.
        """
        provenance: dict[str, Any] = {}
        tune = row.tune if bits < 16 else None
        bits = 32 if bits == 16 and row.finish else bits
        if bits >= 16 and not row.finish:
            stored = [_rounded(layer) for layer in layers]
            top = _rounded({"top": self.model.embeddings})["top"]
        else:
            settings = CompressionSettings(bits=bits, **row.finish)
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
                    data = RecoveryData(*self.split_of(row), training, training)
                    with jax.default_matmul_precision("default"):
                        found, result = stages.tuned(
                            measured, plan, teacher, found, unrounded, data, settings, folder,
                            lambda items, _: console.progress(items, f"{row.name}, tuned"),
                        )  # fmt: skip
                    provenance = _provenance(training, result, start)
                stored = [found.layer(i) for i in range(len(layers))]
                top = found.top()
        return stored, top, provenance

    def answers(self, layers: Layers, top: dict[str, Any]) -> list[dict[str, Any]]:
        """What a finished model answers to the suite at every rate, paired with the original's answers."""
        if self.suite is None:
            return []
        if not self.right:
            self.right = self._answers(self.model.layers, self.model.embeddings, 0.0)
        found = []
        for rate in RATES:
            right = self._answers(layers, top, rate)
            found.append(
                {
                    "prune_rate": rate,
                    "tasks": tasks.record(right),
                    "paired": tasks.against("original", right, self.right),
                }
            )
        return found

    def _answers(self, layers: Layers, top: dict[str, Any], rate: float) -> tasks.Answers:
        assert self.suite is not None
        params = jax.tree.map(jnp.asarray, _wide({"layers": list(layers), **top}))
        model, keep = CausalLM(self.model.config, params, dtype=jnp.float32), masks(self.model.plan, rate)
        cpu = jax.default_backend() == "cpu"
        with jax.default_matmul_precision("highest" if cpu else "tensorfloat32"):
            return tasks.measure(model, self.suite, 4096 if cpu else 65536, keep)

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


def _provenance(options: RecoverySettings, result: recover.Result | Gains, start: float) -> dict[str, Any]:
    return {
        "options": dataclasses.asdict(options),
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
