"""What the baselines share: a dense model in memory, its calibration windows, and the statistics of its matrices'
inputs.

A matrix is seen as columns [inputs, outputs], y = x W. Matrices that read the same activations share one Gram matrix.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from benchmarks.baselines.sizes import Keep
from uniql_jax import elastic
from uniql_jax.compiling import jit
from uniql_jax.compression.math.gram import gram
from uniql_jax.compression.sorting import cosine, layer_forward
from uniql_jax.config import ModelConfig
from uniql_jax.errors import UserError
from uniql_jax.model.causal_lm import CausalLM, embed
from uniql_jax.model.layers import attention, mlp
from uniql_jax.model.layers.context import Causal, full_context
from uniql_jax.plan import Plan

KINDS = ("attention", "mlp")
Block = Mapping[str, Any]
Layer = Mapping[str, Block]
Stats = dict[str, Any]
Streams = list[Float[Array, "b t h"]]


class Dense(NamedTuple):
    """A model as float32 arrays: leaves by layer and block, and embedding, final norm and, where it is untied, head."""

    config: ModelConfig
    layers: list[Layer]
    top: Mapping[str, Array]

    def causal_lm(self) -> CausalLM:
        """The model for the package's forward pass.

        Layers that are missing become ones that write nothing, so that one compiled program serves any number.
        """
        layers = list(self.layers)
        if len(layers) < len(self.config.pattern):
            layers += [silent(self.layers[0])] * (len(self.config.pattern) - len(layers))
        return CausalLM(self.config, {"layers": layers, **self.top}, dtype=jnp.float32)


def silent(layer: Layer) -> Layer:
    """A layer that adds nothing to the stream: output matrices and their biases are zero."""
    zeroed = ("o", "o_bias", "down", "down_bias")
    return {k: {n: jnp.zeros_like(v) if n in zeroed else v for n, v in block.items()} for k, block in layer.items()}


def open_dense(source: Any) -> Dense:
    """The model of a source (`uniql_jax.convert.source.open_source`) on the device, float32.

    Raises:
        UserError: its blocks are not those that the baselines know.
    """
    config = source.config
    plain = all(kinds == KINDS for kinds in config.pattern) and config.gated_mlp and config.rope is not None
    if not plain or config.qk_norm or config.unrotated or elastic.sizes(config)["qk_pass"]:
        raise UserError(
            f"baselines take rotated attention and gated MLPs, as llama and qwen2 have, not {config.model_type}"
        )
    wide = functools.partial(jax.tree.map, lambda value: jnp.asarray(value, jnp.float32))
    return Dense(config, [wide(source.layer(i)) for i in range(len(config.pattern))], wide(source.top()))


def matrices(config: ModelConfig) -> Iterator[tuple[str, str, elastic.Leaf, str]]:
    """(kind, name, leaf, which statistic is the Gram matrix of its input) of every matrix of a layer."""
    for kind in KINDS:
        for name, leaf in elastic.leaves(config, kind).items():
            if leaf.contract:
                yield kind, name, leaf, "read" if leaf.contract == "last" else "hidden"


def columns_of(value: Float[Array, "..."], leaf: elastic.Leaf) -> Float[Array, "inputs outputs"]:
    """A leaf as y = x W has it."""
    flat = value.reshape(-1, value.shape[-1])
    return flat.T if leaf.contract == "last" else flat


def leaf_of(columns: Float[Array, "inputs outputs"], leaf: elastic.Leaf, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Inverse of `columns_of`."""
    return (columns.T if leaf.contract == "last" else columns).reshape(shape)


def changed(
    config: ModelConfig, layer: Layer, stats: Mapping[str, Stats], change: Callable[[str, str, Array, Array], Array]
) -> Layer:
    """A layer whose matrices are `change(kind, name, columns, Gram matrix of their input)`."""
    out = {kind: dict(block) for kind, block in layer.items()}
    for kind, name, leaf, which in matrices(config):
        value = layer[kind][name]
        out[kind][name] = leaf_of(change(kind, name, columns_of(value, leaf), stats[kind][which]), leaf, value.shape)
    return out


@functools.partial(jit, static_argnames=("config",))
def _statistics(config: ModelConfig, layer: Layer, x: Float[Array, "b t h"]) -> tuple[Array, dict[str, Any]]:
    context = full_context(jnp.ones(x.shape[:2], bool), padded=False)
    assert isinstance(context.visible, Causal)
    leaves = layer["attention"]
    normed = attention.read(config, leaves, x)
    q, k, v = attention.project(config, leaves, normed, context)
    hidden = attention.attend(config, q, k, v, context.visible)
    grouped = q.reshape(*q.shape[:2], config.kv_heads, config.query_groups, -1)
    of_attention = {
        "read": gram(normed, config.hidden_size),
        "hidden": gram(hidden, hidden.shape[2] * hidden.shape[3]),
        "q": jnp.einsum("btgmi,btgmj->gmij", grouped, grouped),
        "k": jnp.einsum("btgi,btgj->gij", k, k),
    }
    y = x + attention.write(leaves, hidden)
    normed = mlp.read(config, layer["mlp"], y)
    hidden = mlp.inner(config, layer["mlp"], normed, context)
    of_mlp = {"read": gram(normed, config.hidden_size), "hidden": gram(hidden, hidden.shape[-1])}
    y = y + mlp.write(layer["mlp"], hidden)
    return y, {"attention": of_attention, "mlp": of_mlp, "cosine": cosine(x, y).sum()}


def statistics(config: ModelConfig, layer: Layer, xs: Streams) -> tuple[Streams, dict[str, Any]]:
    """The streams after a layer, and means over tokens of what its matrices see.

    Per block: "read" and "hidden", Gram matrices of the inputs of its input and output matrices; "q" [g, m, d, d] and
    "k" [g, d, d], those of rotated queries and keys per head; and "cosine" between the layer's input and output.
    """
    ys, total = [], None
    for x in xs:
        y, found = _statistics(config, layer, x)
        ys.append(y)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    tokens = sum(x.shape[0] * x.shape[1] for x in xs)
    return ys, jax.tree.map(lambda value: value / tokens, total)


def forward(config: ModelConfig, layer: Layer, xs: Streams) -> Streams:
    """The streams after a layer."""
    return [layer_forward(config, KINDS, layer, x)[0] for x in xs]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A model and its calibration windows, in batches of token ids."""

    model: Dense
    batches: list[Int[Array, "b t"]]

    @classmethod
    def of(cls, model: Dense, windows: Int[np.ndarray, "count length"], batch_tokens: int) -> Calibration:
        """Windows in batches of about so many tokens."""
        each = max(1, batch_tokens // windows.shape[1])
        return cls(model, [jnp.asarray(windows[i : i + each]) for i in range(0, len(windows), each)])

    def streams(self, top: Mapping[str, Array] | None = None) -> Streams:
        """The residual streams before the first layer."""
        return [embed(top or self.model.top, batch, jnp.float32) for batch in self.batches]

    @functools.cached_property
    def stats(self) -> list[dict[str, Any]]:
        """Statistics of every layer of the original model, on the host."""
        xs, found = self.streams(), []
        for layer in self.model.layers:
            xs, means = statistics(self.model.config, layer, xs)
            found.append(jax.device_get(means))
        return found

    @property
    def influence(self) -> list[float]:
        """Block influence of every layer: 1 - mean cosine between its input and its output."""
        return [1 - float(means["cosine"]) for means in self.stats]

    def one_after_another(self, change: Callable[[Layer, Mapping[str, Stats]], Layer]) -> Dense:
        """The model with every layer changed to fit what the changed layers before it feed it."""
        config, xs, layers = self.model.config, self.streams(), []
        for layer in self.model.layers:
            layers.append(change(layer, statistics(config, layer, xs)[1]))
            xs = forward(config, layers[-1], xs)
        return self.model._replace(layers=layers)


@dataclasses.dataclass(frozen=True)
class Made:
    """What a baseline made of a model.

    rate: the prune rate that was asked for. removed: the part of the parameters of the layers' matrices that went,
    adapters counted against it. parameters, bytes: of the whole model in its published form, embedding and head
    included. model: what is evaluated, of the same logits. kinds: blocks that its forward pass needs in addition.
    four: makes the same at 4 bits. note: what else a record should say. keeps, plan: of plain dense layers, which can
    be trained on: their kept sizes, and a plan that keeps these at `rate`, or at 0 where layers are whole.
    """

    rate: float
    removed: float
    parameters: int
    bytes: int
    model: Dense
    kinds: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    four: Callable[[], Made] | None = None
    note: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keeps: Sequence[Keep] | None = None
    plan: Plan | None = None
