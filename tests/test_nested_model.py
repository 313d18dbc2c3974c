"""Models of nested weights: every setting of a joint plan is the same function however it is reached."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.nested_settings import take_setting
from uniql_jax import elastic
from uniql_jax.joint_plan import TOP, JointPlan, Kept, Piece, make_joint_plan
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.plan import grouping, make_plan
from uniql_jax.runtime.generation import generate_tokens
from uniql_jax.weights.nested import NestedArray, from_nested_codes

Made = tuple[CausalLM, CausalLM, CausalLM]


def nested_leaf(rng: np.random.Generator, leaf: elastic.Leaf, shape: tuple[int, ...], group: int) -> NestedArray:
    """A leaf of random codes."""
    last = leaf.contract == "last"
    width = shape[-1] if last else int(np.prod(shape[:-1]))
    rows = int(np.prod(shape)) // width
    codes = jnp.asarray(rng.integers(-8, 8, (rows, width)))
    fine, coarse = (jnp.asarray(rng.uniform(0.02, 0.04, (rows, -(-width // group))) * k) for k in (1, 2))
    return from_nested_codes(codes, fine, coarse, group=group, contract=str(leaf.contract), shape=shape)


@pytest.fixture
def made(rng: np.random.Generator) -> Made:
    """A tiny model with nested weights, and the dense ones of its 4 and of its 3 bits."""
    base = tiny.model(rng)
    config, sizes = base.config, grouping(base.config)["groups"]

    def leaf(described: elastic.Leaf, value: Any) -> Any:
        if not described.contract:
            return value
        group = sizes["embed"] if described.contract == "last" else sizes[described.dims[0]]
        return nested_leaf(rng, described, value.shape, group)

    params = {
        "layers": [
            {kind: {n: leaf(elastic.BLOCKS[kind][n], v) for n, v in block.items()} for kind, block in layer.items()}
            for layer in base.params["layers"]
        ],
        "embed": leaf(elastic.TOP["embed"], base.params["embed"]),
        "norm": base.params["norm"],
    }

    def dense(bits: int) -> Any:
        def one(value: Any) -> Any:
            if not isinstance(value, NestedArray):
                return value
            return (value if bits == 4 else value.take_bits(0)).dense()

        return jax.tree.map(one, params, is_leaf=lambda value: isinstance(value, NestedArray))

    return tuple(CausalLM(config, tree) for tree in (params, dense(4), dense(3)))  # type: ignore[return-value]


def joint(rng: np.random.Generator, model: CausalLM) -> JointPlan:
    """A plan of random losses over the units of the plan of rates."""
    plan = make_plan(model.config, None)
    pieces = [
        Piece(i, axis, plan.sizes[axis], plan.units[axis], 1.0, 3.0, 0.85)
        for i, costs in enumerate(plan.costs)
        for axis in costs
    ]
    pieces.append(Piece(TOP, "embed", tiny.VOCAB, tiny.VOCAB, 0.1, 0.3, 0.0))

    def curve(size: int) -> np.ndarray:
        return np.concatenate([rng.exponential(size=size)[::-1].cumsum()[::-1], [0.0]])

    bits = [curve(piece.size) for piece in pieces]
    return make_joint_plan(pieces, bits, [*(4 * curve(piece.size) for piece in pieces[:-1]), None])


def mixed(four: CausalLM, three: CausalLM, setting: dict[tuple[int, str], Kept]) -> CausalLM:
    """The setting from the dense weights: rows of one and of the other, the rest cut off."""

    def leaf(a: Any, b: Any, kept: Kept | None, contract: str | None) -> Any:
        if kept is None or not contract:
            return a if kept is None else a[: kept.entries]
        return jnp.concatenate([a[: kept.full], b[kept.full : kept.entries]])

    layers = [
        {
            kind: {
                name: leaf(
                    value,
                    three.params["layers"][i][kind][name],
                    setting.get((i, elastic.BLOCKS[kind][name].axis or "")),
                    elastic.BLOCKS[kind][name].contract,
                )
                for name, value in block.items()
            }
            for kind, block in layer.items()
        }
        for i, layer in enumerate(four.params["layers"])
    ]
    embed = leaf(four.params["embed"], three.params["embed"], setting[TOP, "embed"], "last")
    return CausalLM(four.config, {"layers": layers, "embed": embed, "norm": four.params["norm"]})


def test_settings_are_the_dense_weights_and_nest(made: Made, rng: np.random.Generator) -> None:
    """Logits of the mixture, whole or from a larger setting, whose leaves are the same bytes."""
    model, four, three = made
    plan, tokens = joint(rng, model), jnp.asarray(rng.integers(0, tiny.VOCAB, (2, 12)))
    counts = [0, len(plan.steps) // 3, 2 * len(plan.steps) // 3, len(plan.steps)]
    before = model
    for count in counts:
        setting = plan.kept(count)
        at_once, stepwise = take_setting(model, setting), take_setting(before, setting)
        for one, other in zip(jax.tree.leaves(at_once.params), jax.tree.leaves(stepwise.params), strict=True):
            assert np.array_equal(one, other)
        want = mixed(four, three, setting)(tokens)
        np.testing.assert_allclose(at_once(tokens), want, rtol=1e-4, atol=1e-4)
        before = stepwise
    held = [sum(leaf.nbytes for leaf in jax.tree.leaves(take_setting(model, plan.kept(n)).params)) for n in counts]
    assert held == sorted(held, reverse=True)
    assert held[-1] < 0.6 * held[0]


def test_a_nested_model_writes(made: Made, rng: np.random.Generator) -> None:
    """Greedy text of a setting, through caches, is that of its dense weights."""
    model, four, three = made
    setting = joint(rng, model).kept(10)
    tokens = rng.integers(0, tiny.VOCAB, (2, 9))
    found = generate_tokens(take_setting(model, setting), tokens, max_new_tokens=8, eos_ids=())
    assert np.array_equal(found, generate_tokens(mixed(four, three, setting), tokens, max_new_tokens=8, eos_ids=()))
