"""Weights that train as they will be stored: they begin with the stored integers, and end as what is stored."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uniql_jax import elastic
from uniql_jax.compression.math.gptq import quantize
from uniql_jax.compression.packing import pack_leaf, pack_together
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.model.layers.linear import apply_columns, apply_rows
from uniql_jax.weights.fake_quantized import FakeQuantizedArray, from_quantized, unrounded_steps
from uniql_jax.weights.quantized import QuantizedArray, limits, unpack

LAST = elastic.Leaf(("ffn", "head", "embed"), "last")
FIRST = elastic.Leaf(("vo", "head", "embed"), "first")
SHAPES = {"last": (10, 3, 88), "first": (24, 4, 20)}
CASES = list(itertools.product(("last", "first"), (4, 8)))
GROUPS = {"last": 32, "first": 48}  # 88 is no multiple of 32: a last group is short


def codes_of(weight: QuantizedArray) -> jax.Array:
    """The integers of a packed weight in its plain layout, of its logical shape."""
    axis = -1 if weight.contract == "last" else 0
    values = unpack(jnp.asarray(weight.data), weight.bits, axis)
    return values[..., : weight.width] if axis else values[: weight.width].reshape(weight.shape)


def trained(
    contract: str, bits: int, rng: np.random.Generator, rank: int = 3, size: float = 0.05
) -> FakeQuantizedArray:
    """A weight that GPTQ rounded, with factors that move many of its integers."""
    shape = SHAPES[contract]
    value = rng.standard_normal(shape).astype(np.float32)
    width = shape[-1] if contract == "last" else shape[0] * shape[1]
    x = rng.standard_normal((3 * width, width)).astype(np.float32)
    leaf = LAST if contract == "last" else FIRST
    found = pack_leaf(
        leaf,
        jnp.asarray(value),
        jnp.asarray(x.T @ x),
        CompressionSettings(bits=bits),
        GROUPS[contract],
        return_unrounded=True,
    )
    assert found.unrounded is not None
    weight = from_quantized(found.weight, found.unrounded)
    left = jnp.asarray(size * rng.standard_normal((*shape[:-1], rank)), jnp.float32)
    right = jnp.asarray(rng.standard_normal((rank, shape[-1])), jnp.float32)
    return dataclasses.replace(weight, left=left, right=right, scale=2.0)


@pytest.mark.parametrize(("contract", "bits"), CASES)
def test_it_begins_with_the_integers_of_gptq(contract: str, bits: int, rng: np.random.Generator) -> None:
    weight = dataclasses.replace(trained(contract, bits, rng), left=None, right=None)
    stored = weight.quantized()
    np.testing.assert_array_equal(np.asarray(weight.codes()), np.asarray(codes_of(stored)))
    np.testing.assert_array_equal(np.asarray(weight.value()), np.asarray(stored.dense()))
    moved = np.asarray(weight.unrounded, np.float32) - np.asarray(weight.codes())
    assert 0.1 < np.abs(moved).mean() < 0.4  # spread between integers, as what was rounded is


@pytest.mark.parametrize(("contract", "bits"), CASES)
def test_it_ends_as_what_is_stored(contract: str, bits: int, rng: np.random.Generator) -> None:
    weight = trained(contract, bits, rng)
    stored = weight.quantized()
    np.testing.assert_array_equal(np.asarray(weight.value()), np.asarray(stored.dense()))
    still = dataclasses.replace(weight, left=None, right=None)
    changed = np.asarray(weight.codes() != still.codes()).mean()
    assert changed > 0.02
    low, high = limits(bits)
    assert np.asarray(weight.codes()).min() >= low
    assert np.asarray(weight.codes()).max() <= high
    # the products that layers take are those of the stored weight
    x = jnp.asarray(rng.standard_normal((5, weight.shape[-1])), jnp.float32)
    if contract == "first":
        x = jnp.asarray(rng.standard_normal((5, *weight.shape[:-1])), jnp.float32)
    apply = apply_rows if contract == "last" else apply_columns
    np.testing.assert_allclose(apply(x, weight), apply(x, stored.dense()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("contract", ["last", "first"])
def test_gradients_pass_through_the_rounding(contract: str, rng: np.random.Generator) -> None:
    weight = trained(contract, 4, rng)
    cotangent = jnp.asarray(rng.standard_normal(weight.shape), jnp.float32)
    _, pull = jax.vjp(lambda left, right: dataclasses.replace(weight, left=left, right=right).value(),
                      weight.left, weight.right)  # fmt: skip
    low, high = limits(4)
    update = np.asarray(weight.scale * (weight.left @ weight.right))
    steps = np.repeat(np.asarray(weight.step, np.float32), weight.group, axis=-1 if contract == "last" else 0)
    steps = steps[..., : weight.shape[-1]] if contract == "last" else steps[:96].reshape(weight.shape)
    places = np.asarray(weight.unrounded, np.float32) + update / steps
    inside = (places > low - 0.5) & (places < high + 0.5)
    assert 0.5 < inside.mean() < 1.0
    through = np.where(inside, np.asarray(cotangent), 0.0) * weight.scale
    left, right = pull(cotangent)
    np.testing.assert_allclose(left, through @ np.asarray(weight.right).T, rtol=1e-4, atol=1e-4)
    flat = through.reshape(-1, through.shape[-1])
    expected = np.asarray(weight.left).reshape(-1, 3).T @ flat
    np.testing.assert_allclose(right, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("contract", ["last", "first"])
def test_a_change_of_its_own_is_in_steps(contract: str, rng: np.random.Generator) -> None:
    start = dataclasses.replace(trained(contract, 4, rng), left=None, right=None)
    low, high = limits(4)
    change = jnp.asarray(rng.integers(-2, 3, start.shape), jnp.float32)
    moved = dataclasses.replace(start, change=change)
    np.testing.assert_array_equal(moved.codes(), np.clip(np.asarray(start.codes()) + np.asarray(change), low, high))
    np.testing.assert_array_equal(np.asarray(moved.value()), np.asarray(moved.quantized().dense()))
    small = dataclasses.replace(start, change=0.001 * change)  # nothing is so close to the next integer
    np.testing.assert_array_equal(small.codes(), start.codes())
    cotangent = jnp.asarray(rng.standard_normal(start.shape), jnp.float32)
    _, pull = jax.vjp(lambda change: dataclasses.replace(start, change=change).value(), jnp.zeros(start.shape))
    (gradient,) = pull(cotangent)
    steps = np.asarray(dataclasses.replace(start, unrounded=jnp.ones(start.shape)).value())  # 1 is on every grid
    np.testing.assert_allclose(gradient, np.asarray(cotangent) * steps, rtol=1e-5, atol=1e-6)


def test_what_was_rounded_rounds_to_the_integers(rng: np.random.Generator) -> None:
    """GPTQ's integers are the nearest ones of what it rounded, errors of earlier columns included."""
    value = jnp.asarray(rng.standard_normal((12, 80)), jnp.float32)
    x = rng.standard_normal((300, 80)) @ rng.standard_normal((80, 80))
    codes, scale, rounded = quantize(value, jnp.asarray(x.T @ x, jnp.float32), bits=4, group=32, return_unrounded=True)
    wide = jnp.repeat(scale.astype(jnp.float32), 32, axis=1)[:, :80]
    np.testing.assert_array_equal(codes, np.clip(np.round(np.asarray(rounded) / np.asarray(wide)), *limits(4)))
    assert not np.allclose(rounded, value, atol=1e-3)
    places = np.asarray(unrounded_steps(rounded, codes, scale, 32), np.float32)
    np.testing.assert_array_equal(np.round(places), codes)


def test_a_group_of_zeros_stays_zero() -> None:
    codes, scale, rounded = quantize(jnp.zeros((4, 32)), None, bits=4, group=32, return_unrounded=True)
    weight = FakeQuantizedArray(
        unrounded_steps(rounded, codes, scale, 32), scale, jnp.ones((4, 1)), jnp.ones((1, 32)), group=32
    )
    assert not np.asarray(weight.value()).any()
    gradient = jax.grad(lambda left: dataclasses.replace(weight, left=left).value().sum())(weight.left)
    assert np.isfinite(gradient).all()


def test_matrices_packed_together_are_those_packed_alone(rng: np.random.Generator) -> None:
    values = {name: jnp.asarray(rng.standard_normal((6, 2, 64)), jnp.float32) for name in ("q", "k")}
    x = jnp.asarray(rng.standard_normal((200, 64)), jnp.float32)
    together = pack_together(values, x.T @ x, CompressionSettings(), 32, return_unrounded=True)
    for name, value in values.items():
        alone = pack_leaf(LAST, value, x.T @ x, CompressionSettings(), 32, return_unrounded=True)
        np.testing.assert_array_equal(together[name].weight.data, alone.weight.data)
        np.testing.assert_array_equal(together[name].unrounded, alone.unrounded)
