"""Random parameters for a model that has never been trained, in the leaves that its family's checkpoints hold.

Training works on those leaves, not on ours, so that what is trained can be written as the family's own checkpoint: a
value bias stays one (we fold it into o_bias, which not every family could store).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from uniql_jax import elastic
from uniql_jax.config import ModelConfig
from uniql_jax.convert import tables
from uniql_jax.convert.leaves import folded_top, pass_factors
from uniql_jax.elastic import Leaf

STD = 0.02
A_RANGE = (1.0, 16.0)
STEP_RANGE = (1e-3, 0.1)
"""Where the decay rates and step sizes of a state space model start (Mamba 2, arXiv 2405.21060, appendix)."""

Params = dict[str, Any]
"""{"layers": [{kind: {leaf: array}}], "embed", "norm", ["head"]}, float32."""
Shape = tuple[int, ...]
Draw = Callable[[np.random.Generator, Shape], Float[np.ndarray, "..."]]


def _a_log(rng: np.random.Generator, shape: Shape) -> Float[np.ndarray, "..."]:
    return np.log(rng.uniform(*A_RANGE, shape))


def _dt_bias(rng: np.random.Generator, shape: Shape) -> Float[np.ndarray, "..."]:
    low, high = map(math.log, STEP_RANGE)
    step = np.exp(rng.uniform(low, high, shape))
    return step + np.log(-np.expm1(-step))  # softplus of this is the step


def _conv(rng: np.random.Generator, shape: Shape) -> Float[np.ndarray, "..."]:
    bound = shape[-1] ** -0.5  # a channel sees `width` inputs, its own
    return rng.uniform(-bound, bound, shape)


def _ones(_: np.random.Generator, shape: Shape) -> Float[np.ndarray, "..."]:
    return np.ones(shape)


def _zeros(_: np.random.Generator, shape: Shape) -> Float[np.ndarray, "..."]:
    return np.zeros(shape)


SPECIAL: dict[str, Draw] = {"a_log": _a_log, "dt_bias": _dt_bias, "d": _ones}


def checkpoint_leaves(config: ModelConfig, kind: str) -> dict[str, Leaf]:
    """The leaves of a block kind ("top" outside layers) that this family's checkpoints hold, raw ones included."""
    table = tables.TABLES[config.model_type]
    names = dict.fromkeys(part.leaf for row in tables.rows_of(config, table, kind) for part in row.parts)
    return {name: tables.leaf_of(kind, name) for name in names}


def leaf_rule(name: str, leaf: Leaf, blocks: int) -> Draw:
    """How a leaf starts: matrices normal, those that write to the stream smaller by sqrt(blocks) so that the sum of
    all `blocks` residual blocks keeps its size (GPT-2), norms one, biases zero, state space leaves by their own rules.

    Raises ValueError for a leaf that no rule covers.
    """
    if name in SPECIAL:
        return SPECIAL[name]
    if leaf.contract is not None:
        std = STD / math.sqrt(blocks) if leaf.contract == "first" else STD
        return lambda rng, shape: std * rng.standard_normal(shape)
    if leaf.dims[-1] == "conv":
        return _conv
    if name.endswith("norm"):
        return _ones
    if name.endswith("bias"):
        return _zeros
    raise ValueError(f"no rule says how the leaf {name!r} starts")


def initialize(config: ModelConfig, seed: int) -> Params:
    """Random float32 parameters of a model, as its checkpoints hold them (see `complete`).

    The same on every machine and JAX version. Raises ValueError for a leaf that no rule covers.
    """
    rng = np.random.default_rng(seed)
    blocks = sum(len(kinds) for kinds in config.pattern)

    def draw(kind: str) -> dict[str, Array]:
        return {
            name: jnp.asarray(leaf_rule(name, leaf, blocks)(rng, _shape(config, leaf)), jnp.float32)
            for name, leaf in checkpoint_leaves(config, kind).items()
        }

    layers = [{kind: draw(kind) for kind in kinds} for kinds in config.pattern]
    return draw("top") | {"layers": layers}


def _shape(config: ModelConfig, leaf: Leaf) -> Shape:
    """Shape of a leaf with one entry for all where a checkpoint has one."""
    return elastic.shape(config, leaf, dict.fromkeys(leaf.shared, 1))


def checkpoint_parameters(config: ModelConfig) -> int:
    """Parameters of a checkpoint of this model."""
    kinds = ["top", *(kind for kinds in config.pattern for kind in kinds)]
    leaves = (leaf for kind in kinds for leaf in checkpoint_leaves(config, kind).values())
    return sum(elastic.parameters(config, leaf) for leaf in leaves)


def complete(config: ModelConfig, params: Params) -> Params:
    """Checkpoint leaves -> the leaves that the model computes with; differentiable.

    A value bias goes into o_bias (softmax weights sum to one), RoPE frequencies are added as constants, and what heads
    share is handed to each.
    """
    layers = [
        {kind: _complete_block(config, kind, leaves, i) for kind, leaves in layer.items()}
        for i, layer in enumerate(params["layers"])
    ]
    return folded_top(config, {name: value for name, value in params.items() if name != "layers"}) | {"layers": layers}


def _complete_block(config: ModelConfig, kind: str, leaves: dict[str, Array], layer: int) -> dict[str, Array]:
    wanted, out = elastic.leaves(config, kind), dict(leaves)
    out |= {name: out[name] * factor for name, factor in pass_factors(config).items() if name in out}
    if "v_bias" in leaves:
        v_bias = jnp.repeat(leaves["v_bias"], config.query_groups, axis=1)  # [vo, head]
        folded: Float[Array, " embed"] = jnp.einsum("rn,rnh->h", v_bias, leaves["o"], precision="highest")
        out["o_bias"] = folded + leaves["o_bias"] if "o_bias" in leaves else folded
    if "inv_freq" in wanted:
        out["inv_freq"] = jnp.asarray(config.inv_freq(layer))[:, None]
    shared = {name: leaf for name, leaf in wanted.items() if leaf.shared}
    out |= {name: jnp.broadcast_to(out[name], elastic.shape(config, leaf)) for name, leaf in shared.items()}
    return {name: out[name] for name in wanted}


def matrix_mask(config: ModelConfig, params: Params) -> Params:
    """True for every matrix of `params`, False for vectors: what weight decay is for."""
    top = {name: elastic.TOP[name].contract is not None for name in params if name != "layers"}
    layers = [
        {
            kind: {name: checkpoint_leaves(config, kind)[name].contract is not None for name in leaves}
            for kind, leaves in layer.items()
        }
        for layer in params["layers"]
    ]
    return top | {"layers": layers}
