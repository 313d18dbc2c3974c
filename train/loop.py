"""The training step of masked recovery: one compiled program for every prune rate, on any number of devices.

A step draws nothing itself: rate, rows and dropout follow from (seed, step), so that a resumed run repeats them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from uniql_jax import elastic
from uniql_jax.compiling import jit
from uniql_jax.config import ModelConfig
from uniql_jax.model.causal_lm import embed
from uniql_jax.model.layers.context import full_context
from uniql_jax.train import lora, stack
from uniql_jax.train.examples import Examples
from uniql_jax.train.lazy import optimizer
from uniql_jax.train.lora import Factors
from uniql_jax.train.losses import head_losses
from uniql_jax.train.placement import data_mesh, gathered, layer_sharding, sharding, shared
from uniql_jax.train.settings import TEACHERS, RecoverySettings, resolved
from uniql_jax.train.settings import on_device as on_device
from uniql_jax.weights.fake_quantized import FakeQuantizedArray

Batch = Mapping[str, Array]
"""tokens int32, valid and learn bool, each [microbatches, rows, length]."""


class Trainer:
    """The frozen model, placed once, and the compiled functions that work on LoRA factors.

    `layers` and `top` are dense leaves; matrices are held in `options.compute`, vectors in float32, layers of one kind
    stacked. Batches are split over the mesh along their rows; large arrays (weights, factors, optimizer) are shared out
    over it, and a device gathers a layer's when it computes with it. Matrices may be FakeQuantizedArrays instead, which
    train as they will be stored. `teacher`: layers and top to distill from, where that is not the unpruned model
    itself.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: Sequence[lora.Layer],
        top: Mapping[str, Any],
        options: RecoverySettings,
        steps: int,
        mesh: Mesh | None = None,
        teacher: tuple[Sequence[lora.Layer], Mapping[str, Any]] | None = None,
    ):
        self.config = config
        self.mesh = data_mesh(options.batch // options.accumulate) if mesh is None else mesh
        self.dtype = jnp.dtype(options.compute)
        self.frozen = self._place_model(layers, top)
        if teacher is not None:
            self.frozen["teacher"] = self._place_model(*teacher)
        self._compile(options, steps)

    def _place_model(self, layers: Sequence[lora.Layer], top: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "top": self.spread({name: self._cast(elastic.TOP[name], value) for name, value in top.items()}),
            "runs": [
                stack.stack(layers, run, functools.partial(self._place_layer, count=run.count))
                for run in stack.runs(self.config)
            ],
        }

    def _compile(self, options: RecoverySettings, steps: int) -> None:
        if options.teacher not in TEACHERS:
            raise ValueError(f"a teacher is one of {', '.join(TEACHERS)}, not {options.teacher!r}")
        options = resolved(options, self.config)
        self.options, self.rows = options, options.batch // options.accumulate
        self.optimizer = optimizer(options, steps)
        places = jax.tree.map(lambda value: value.sharding, self._planned())
        loss = NamedSharding(self.mesh, PartitionSpec())
        self._step = jit(self._train, donate_argnums=(0, 1), out_shardings=(*places, loss))
        self._evaluate = jit(self._losses)

    def variant(self, options: RecoverySettings, steps: int) -> Trainer:
        """The same frozen model, not copied, to be trained with other settings (but the same dtype and mesh)."""
        if jnp.dtype(options.compute) != self.dtype:
            raise ValueError(f"the frozen model is held in {self.dtype}, not {options.compute}")
        other = copy.copy(self)
        other.frozen = {name: value for name, value in self.frozen.items() if name != "adapted"}
        other._compile(options, steps)
        return other

    def start_from(self, factors: Factors) -> None:
        """Begin with these factors, single ones, and take the unpruned model that they make for the original."""
        self.frozen["adapted"] = self.spread(stack.stack_factors(self.config, factors))

    def _cast(self, leaf: elastic.Leaf, value: Any) -> np.ndarray | Array | FakeQuantizedArray:
        if isinstance(value, FakeQuantizedArray):
            return value
        dtype = self.dtype if leaf.contract else np.float32
        # what a device holds already need not pass through the host
        return value.astype(dtype) if isinstance(value, jax.Array) else np.asarray(value).astype(dtype)

    def _place_layer(self, layer: lora.Layer, count: int) -> Any:
        """One of `count` layers that will be stacked, where the stack will lie."""
        cast = {
            kind: {name: self._cast(elastic.BLOCKS[kind][name], value) for name, value in block.items()}
            for kind, block in layer.items()
        }
        return jax.tree.map(lambda value: jax.device_put(value, layer_sharding(self.mesh, value.shape, count)), cast)

    def spread(self, tree: Any) -> Any:
        """Every array where `sharding` says."""
        return jax.tree.map(lambda value: jax.device_put(value, sharding(self.mesh, value.shape)), tree)

    def place(self, examples: Examples, rows: Int[np.ndarray, " rows"], parts: int) -> dict[str, Array]:
        """Rows of the examples as a batch [parts, rows / parts, length], split over the mesh.

        Every host passes the same rows, and puts only what its own devices work on.
        """
        sharding = NamedSharding(self.mesh, PartitionSpec(None, "data", None))
        out = {}
        for name in ("tokens", "valid", "learn"):
            value = getattr(examples, name)[rows].reshape(parts, len(rows) // parts, -1)
            out[name] = jax.make_array_from_callback(value.shape, sharding, lambda index, v=value: v[index])
        return out

    def init(self) -> tuple[Factors, Any]:
        """Factors and optimizer state to start from; here and below factors are those of `stack.stack_factors`."""
        factors = self.fresh()
        if "adapted" in self.frozen:
            factors = jax.tree.map(jnp.copy, self.frozen["adapted"])  # a step consumes what it starts from
        return factors, self.spread(self.optimizer.init(factors))

    def fresh(self) -> Factors:
        """Factors that change nothing."""
        return self.spread(self._fresh())

    def _fresh(self) -> Factors:
        tables = [name for name, value in self.frozen["top"].items() if isinstance(value, FakeQuantizedArray)]
        single = lora.init_factors(self.config, self.options.rank, self.options.seed, tables)
        return stack.stack_factors(self.config, single)

    def _planned(self) -> tuple[Any, Any]:
        """Factors and optimizer state as shapes, and where they lie."""

        def made() -> tuple[Any, Any]:
            factors = self._fresh()
            return factors, self.optimizer.init(factors)

        return jax.tree.map(
            lambda value: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding(self.mesh, value.shape)),
            jax.eval_shape(made),
        )

    # ------------------------------------------------------------------------------------------ traced

    def with_tables(self, factors: Factors | None, frozen: Mapping[str, Any]) -> dict[str, Any]:
        """The frozen model with embedding and head dense, float32 where they train as they will be stored."""
        top = gathered(dict(frozen["top"]))
        for name, value in top.items():
            if isinstance(value, FakeQuantizedArray):
                own = gathered((factors or {})[f"top.{name}"])
                moved = lora.with_factors(value, elastic.TOP[name], own, self.options.alpha)
                top[name] = cast(FakeQuantizedArray, moved).value()
        return {**frozen, "top": top}

    def hidden(
        self,
        factors: Factors | None,
        frozen: Mapping[str, Any],
        tokens: Int[Array, "b t"],
        valid: Bool[Array, "b t"],
        keep: tuple[elastic.Keep, ...] | None,
        key: Key[Array, "..."] | None = None,
    ) -> Float[Array, "b t h"]:
        """The stream after the last layer at masked sizes; the frozen model's own without factors. Dropout where there
        is a key, or one for each row. `frozen` is what `with_tables` gives.
        """
        options, layers = self.options, frozen["runs"]
        if factors is not None:
            pairs = zip(layers, stack.runs(self.config), strict=True)
            layers = [stack.attach(one, run, factors, options.alpha, options.dropout, key) for one, run in pairs]
        # Padding is on the right: no real token sees it, and attention needs no mask for it.
        context = full_context(valid, padded=False)
        x = embed(frozen["top"], tokens, self.dtype)
        return stack.apply_runs(self.config, layers, x, context, keep, options.remat)

    def loss_sum(
        self,
        factors: Factors,
        frozen: Mapping[str, Any],
        batch: Batch,
        keep: tuple[elastic.Keep, ...],
        key: Key[Array, "..."] | None,
    ) -> tuple[Float[Array, ""], tuple[Float[Array, ""], Float[Array, ""]]]:
        """(what is minimised, (cross entropy, tokens that count)), all summed over one part of a batch."""
        tokens, valid = batch["tokens"], batch["valid"]
        frozen = self.with_tables(factors, frozen)
        x = self.hidden(factors, frozen, tokens, valid, keep, key)
        share, given = self.options.distill, frozen.get("teacher")
        if given:
            given = {**given, "top": gathered(given["top"])}
        grown = self.options.teacher == "rate 0"
        model, own = given or frozen, None if given else factors if grown else frozen.get("adapted")
        teacher = teacher_top = None
        if share:
            teacher = jax.lax.stop_gradient(self.hidden(own, model, tokens, valid, None))
            teacher_top = jax.lax.stop_gradient(model["top"])
        learn = batch["learn"].astype(jnp.float32)
        return head_losses(
            frozen["top"], self.config.norm_eps, x, tokens, learn, teacher, share, teacher_top=teacher_top
        )

    def gradients(
        self,
        factors: Factors,
        frozen: Mapping[str, Any],
        batch: Batch,
        keep: tuple[elastic.Keep, ...],
        step: Int[Array, ""],
    ) -> tuple[Factors, Float[Array, ""]]:
        """Gradient of what is minimised, per token that counts, and the mean cross entropy of the batch."""
        drop, loss = self.options.dropout > 0, shared(self.mesh, self.loss_sum)
        key = jax.random.fold_in(jax.random.key(self.options.seed), step)

        def part(one: Batch, number: Int[Array, ""]) -> tuple[Any, Array, Array]:
            own = jax.random.fold_in(key, number) if drop else None
            gradients, (entropy, count) = jax.grad(loss, has_aux=True)(factors, frozen, one, keep, own)
            return gradients, entropy, count

        def add(carry: Any, inputs: tuple[Batch, Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, part(*inputs)), None

        # Sums, divided once by all tokens that count: parts with few answers weigh no more than they should.
        parts = batch["tokens"].shape[0]
        if parts == 1:  # no sum, which would be as large as what is trained
            gradients, entropy, count = part({name: value[0] for name, value in batch.items()}, jnp.int32(0))
        else:
            zero = (jax.tree.map(jnp.zeros_like, factors), jnp.float32(0), jnp.float32(0))
            (gradients, entropy, count), _ = jax.lax.scan(add, zero, (batch, jnp.arange(parts)))
        return jax.tree.map(lambda g: g / count, gradients), entropy / count

    def _train(
        self,
        factors: Factors,
        state: Any,
        frozen: Mapping[str, Any],
        batch: Batch,
        keep: tuple[elastic.Keep, ...],
        step: Int[Array, ""],
    ) -> tuple[Factors, Any, Float[Array, ""]]:
        gradients, loss = self.gradients(factors, frozen, batch, keep, step)
        updates, state = self.optimizer.update(gradients, state, factors)
        return cast(Factors, optax.apply_updates(factors, updates)), state, loss

    def _losses(
        self, factors: Factors, frozen: Mapping[str, Any], batch: Batch, keep: tuple[elastic.Keep, ...]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        def losses(
            factors: Factors, frozen: Mapping[str, Any], one: Batch, keep: tuple[elastic.Keep, ...], _: None
        ) -> tuple[Float[Array, ""], Float[Array, ""]]:
            frozen = self.with_tables(factors, frozen)
            x = self.hidden(factors, frozen, one["tokens"], one["valid"], keep)
            weights = one["learn"].astype(jnp.float32)
            return head_losses(frozen["top"], self.config.norm_eps, x, one["tokens"], weights)[1]

        def part(carry: Any, one: Batch) -> tuple[Any, None]:
            found = shared(self.mesh, losses)(factors, frozen, one, keep, None)
            return jax.tree.map(jnp.add, carry, found), None

        return jax.lax.scan(part, (jnp.float32(0), jnp.float32(0)), batch)[0]

    # ------------------------------------------------------------------------------------------ called

    def step(
        self, factors: Factors, state: Any, batch: Batch, keep: tuple[elastic.Keep, ...], step: int
    ) -> tuple[Factors, Any, Float[Array, ""]]:
        """One update; factors and state are consumed. Returns the new ones and the mean cross entropy, nats."""
        return self._step(factors, state, self.frozen, batch, keep, jnp.int32(step))

    def lower(self, batch: Batch, keep: tuple[elastic.Keep, ...]) -> jax.stages.Lowered:
        """The step's program for such a batch, traced and not yet compiled; to measure, or to compile beforehand."""
        factors, state = self._planned()
        return self._step.lower(factors, state, self.frozen, batch, keep, jnp.int32(0))

    def evaluate(self, factors: Factors, batches: Sequence[Batch], keep: tuple[elastic.Keep, ...]) -> float:
        """Mean cross entropy over batches at these sizes, nats; nothing is dropped."""
        sums = [self._evaluate(factors, self.frozen, batch, keep) for batch in batches]
        total, count = (float(np.sum(jax.device_get([pair[i] for pair in sums]))) for i in (0, 1))
        return total / count

    def evaluation_batches(self, examples: Examples) -> list[dict[str, Array]]:
        """All rows in batches of one shape; the last one is filled with rows of which nothing counts."""
        count = -(-len(examples) // self.rows) * self.rows
        filled = examples.filled(count)
        return [self.place(filled, np.arange(i, i + self.rows), 1) for i in range(0, count, self.rows)]
