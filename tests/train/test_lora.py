"""LoRA on top of elastic weights: what is trained under masks is what a slice of the merged model computes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import reference
from tests.train import cases
from uniql_jax import elastic
from uniql_jax.model.causal_lm import CausalLM, hidden_states, logits, prune
from uniql_jax.model.layers.linear import apply_columns, apply_rows
from uniql_jax.train import lora, rates
from uniql_jax.weights.delta import DeltaArray
from uniql_jax.weights.lora import LoraArray

ALPHA = 16.0


def _with_layers(model: CausalLM, layers: Any) -> CausalLM:
    return CausalLM(model.config, dict(model.params) | {"layers": layers}, model.plan)


@jax.jit
def _masked(model: CausalLM, tokens: jax.Array, keep: tuple[elastic.Keep, ...]) -> jax.Array:
    return logits(model, hidden_states(model, tokens, keep=keep))


@jax.jit
def _call(model: CausalLM, tokens: jax.Array) -> jax.Array:
    return model(tokens)


@pytest.mark.parametrize(("family", "rank"), [*((name, 4) for name in cases.FAMILIES), ("llama", 0), ("bamba", 0)])
def test_masked_training_is_the_sliced_merged_model(family: str, rank: int, rng: np.random.Generator) -> None:
    model = cases.model(family, rng)
    assert model.plan is not None
    factors = cases.factors(model.config, rng, rank)
    tokens = cases.tokens(rng)
    attached = _with_layers(model, lora.attach(model.params["layers"], factors, ALPHA))
    layers = [lora.merge_layer(i, layer, factors, ALPHA) for i, layer in enumerate(model.params["layers"])]
    merged = _with_layers(model, jax.tree.map(jnp.asarray, layers))
    plain = np.asarray(_call(model, tokens))
    compiled = _masked._cache_size()
    for rate in rates.RATES if family == "llama" else (0.0, 0.35):
        masked = np.asarray(_masked(attached, tokens, rates.keep_arrays(model.plan, rate)))
        deployed = np.asarray(_call(prune(merged, rate), tokens))
        assert reference.relative_error(masked, deployed) < 2e-5
        assert reference.relative_error(masked, plain) > 1e-2  # the factors are felt
    assert _masked._cache_size() == compiled + 1  # one program serves all rates
    # and the pair may be sliced before it is merged
    sliced = np.asarray(_call(prune(attached, 0.35), tokens))
    assert reference.relative_error(sliced, deployed) < 2e-5
    assert prune(attached, 0.35).keep == prune(merged, 0.35).keep != attached.keep


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_every_matrix_of_every_block_gets_factors(family: str, rng: np.random.Generator) -> None:
    model = cases.model(family, rng)
    factors = lora.init_factors(model.config, 4, 0)
    names = {
        f"{i}.{kind}.{name}"
        for i, layer in enumerate(model.params["layers"])
        for kind, block in layer.items()
        for name in block
        if elastic.BLOCKS[kind][name].contract
    }
    assert set(factors) == names
    assert lora.count(factors) == sum(f["left"].size + f["right"].size for f in factors.values())
    for i, layer in enumerate(model.params["layers"]):  # a start that changes nothing, yet can learn
        for kind, block in lora.merge_layer(i, layer, factors, ALPHA).items():
            for name, value in block.items():
                np.testing.assert_array_equal(value, layer[kind][name])
    for pair in factors.values():
        assert np.any(np.asarray(pair["left"])) != np.any(np.asarray(pair["right"]))


def test_merged_is_base_plus_update(rng: np.random.Generator) -> None:
    base, left, right = (rng.normal(size=s).astype(np.float32) for s in ((6, 2, 10), (6, 2, 3), (3, 10)))
    weight = LoraArray(jnp.asarray(base), jnp.asarray(left), jnp.asarray(right), scale=2.0)
    expected = base + 2.0 * np.einsum("abr,rh->abh", left.astype(np.float64), right)
    np.testing.assert_allclose(weight.dense(), expected, atol=1e-5)
    assert np.abs(np.asarray(weight.dense()) - base).max() > 0.5
    half = weight.take_prefix(3)
    assert half.shape == (3, 2, 10)
    np.testing.assert_allclose(half.dense(), expected[:3], atol=1e-5)
    x, y = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 10), (4, 6, 2)))
    np.testing.assert_allclose(apply_rows(x, weight), np.einsum("abh,th->tab", expected, x), atol=1e-4)
    np.testing.assert_allclose(apply_columns(y, weight), np.einsum("abh,tab->th", expected, y), atol=1e-4)


def test_at_rank_0_every_weight_is_trained(rng: np.random.Generator) -> None:
    config = cases.model("llama", rng).config
    factors = lora.init_factors(config, 0, 0)
    shapes = {name: elastic.shape(config, leaf) for name, leaf in lora.targets(config)}
    assert {name: pair["change"].shape for name, pair in factors.items()} == shapes
    assert not any(np.any(np.asarray(pair["change"])) for pair in factors.values())
    base, change = (jnp.asarray(rng.normal(size=(6, 2, 10)), jnp.float32) for _ in range(2))
    weight = DeltaArray(base, change, scale=0.5)
    expected = np.asarray(base) + 0.5 * np.asarray(change)
    np.testing.assert_allclose(weight.dense(), expected, rtol=1e-6)
    np.testing.assert_allclose(weight.take_prefix(3).dense(), expected[:3], rtol=1e-6)
    x, y = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 10), (4, 6, 2)))
    np.testing.assert_allclose(apply_rows(x, weight), np.einsum("abh,th->tab", expected, x), atol=1e-4)
    np.testing.assert_allclose(apply_columns(y, weight), np.einsum("abh,tab->th", expected, y), atol=1e-4)
    # a step of one in `change` is about the size of a weight, whatever the matrix
    narrow, wide = (elastic.Leaf(("ffn", "embed"), contract) for contract in ("last", "first"))
    assert lora.usual_size(narrow, (30, 16)) == 1 / 4
    assert lora.usual_size(wide, (16, 30)) == 1 / 4


def test_merging_bfloat16_weights_is_done_in_float32(rng: np.random.Generator) -> None:
    base = jnp.asarray(rng.normal(size=(8, 16)), jnp.bfloat16)
    left, right = (jnp.asarray(rng.normal(size=s) * 1e-3, jnp.float32) for s in ((8, 2), (2, 16)))
    merged = LoraArray(base, left, right).dense()
    assert merged.dtype == jnp.float32
    update = np.asarray(left, np.float64) @ np.asarray(right, np.float64)
    np.testing.assert_allclose(merged, np.asarray(base, np.float64) + update, rtol=1e-6, atol=1e-9)


def test_dropout_spares_the_mean_and_the_frozen_path(rng: np.random.Generator) -> None:
    base = jnp.zeros((3, 5))
    left, right = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 2), (2, 5)))
    weight = LoraArray(base, left, right, jax.random.key(0), dropout=0.25)
    x = jnp.ones((4000, 5))
    dropped = np.asarray(weight.dropped(x))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert (dropped == 0).mean() == pytest.approx(0.25, abs=0.02)
    sure = dataclasses.replace(weight, key=None)
    np.testing.assert_allclose(apply_rows(x, weight).mean(0), apply_rows(x, sure)[0], atol=0.1)
    np.testing.assert_array_equal(apply_rows(x, weight), apply_rows(x, weight))
    other = dataclasses.replace(weight, key=jax.random.key(1))
    assert not np.array_equal(other.dropped(x), dropped)
    layers = [{"mlp": {"up": jnp.zeros((3, 5)), "gate": jnp.zeros((3, 5))}}]
    pair = {"left": left, "right": right}
    both = {"0.mlp.up": pair, "0.mlp.gate": pair}
    (layer,) = lora.attach(layers, both, ALPHA, 0.25, jax.random.key(0))
    assert not np.array_equal(layer["mlp"]["up"].dropped(x), layer["mlp"]["gate"].dropped(x))
    assert layer["mlp"]["up"].scale == ALPHA / 2


def test_alpha_is_the_papers_at_its_rank() -> None:
    assert lora.alpha_of(8) == 16.0
    assert lora.alpha_of(32) / 32 == pytest.approx(lora.alpha_of(8) / 8 / 2)  # four times the rank, half the scale


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_what_no_step_saw_stays_as_it_was(family: str, rng: np.random.Generator) -> None:
    """From the first factors on, the shared factor may move as it will: the elastic one says what changes."""
    model = cases.model(family, rng)
    moved = {
        name: pair | {"right": pair["right"] + jnp.asarray(rng.standard_normal(pair["right"].shape), jnp.float32)}
        for name, pair in lora.init_factors(model.config, 4, 0).items()
    }
    for i, layer in enumerate(model.params["layers"]):
        merged = lora.merge_layer(i, layer, moved, 16.0)
        jax.tree.map(np.testing.assert_array_equal, merged, jax.tree.map(np.asarray, layer))
