"""Nested codes: both models exact prefixes of one store, and their errors against independent GPTQ at each width."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from uniql_jax.compression.math import nested
from uniql_jax.compression.math.gptq import quantize
from uniql_jax.compression.math.refine import DAMPING, damped, descend, nearest, output_error, refit_scales
from uniql_jax.weights import planes
from uniql_jax.weights.mixed import MixedArray, in_parts
from uniql_jax.weights.nested import NestedArray, from_nested_codes
from uniql_jax.weights.protocol import StoredWeight
from uniql_jax.weights.quantized import QuantizedArray, limits

GROUP = 24
SHAPES = {"last": (12, 4, 60), "first": (12, 4, 20)}
"""[sorted, inner, contracted], the last group padded, and [sorted, inner, features]."""


def drawn(rng: np.random.Generator, contract: str) -> tuple[NestedArray, np.ndarray, np.ndarray]:
    """A weight of random codes and scales, and its values at 4 and at 3 bits from the definition."""
    shape = SHAPES[contract]
    width = shape[-1] if contract == "last" else shape[0] * shape[1]
    rows = shape[0] * shape[1] if contract == "last" else shape[-1]
    codes = rng.integers(-8, 8, (rows, width))
    fine, coarse = (
        rng.standard_normal((rows, -(-width // GROUP))).astype(ml_dtypes.bfloat16).astype(np.float32) for _ in range(2)
    )
    made = from_nested_codes(
        jnp.asarray(codes), jnp.asarray(fine), jnp.asarray(coarse), group=GROUP, contract=contract, shape=shape
    )
    each = [np.repeat(scale, GROUP, axis=1)[:, :width] for scale in (fine, coarse)]
    values = codes * each[0], (np.floor(codes / 2) + 0.25).astype(np.float32) * each[1]
    four, three = ((value if contract == "last" else value.T).reshape(shape) for value in values)
    return made, four, three


@pytest.mark.parametrize("contract", ["last", "first"])
def test_every_setting_is_a_prefix_of_the_whole(rng: np.random.Generator, contract: str) -> None:
    """Values bit for bit, stored bytes prefixes of each other, and cuts of bits and of entries in any order."""
    whole, fine, coarse = drawn(rng, contract)
    assert isinstance(whole, NestedArray)
    assert whole.shape == SHAPES[contract]
    unit = 1 if contract == "last" else GROUP // SHAPES[contract][1]
    stored = whole.tensors("w")
    for count in range(unit, 13, unit):
        for full in range(0, count + 1, unit):
            cut = whole.take_prefix(count).take_bits(full)
            assert (cut.shape[0], cut.full) == (count, full)
            want = np.concatenate([fine[:full], coarse[full:count]])
            assert np.array_equal(np.asarray(cut.dense()), want)
            other = whole.take_bits(full).take_prefix(count)
            for name, part in cut.tensors("w").items():
                assert np.array_equal(part, stored[name][: len(part)])
                assert np.array_equal(part, other.tensors("w")[name])


@pytest.mark.parametrize("contract", ["last", "first"])
def test_products_are_those_of_the_values(
    rng: np.random.Generator, contract: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks, of planes alone and of words and planes."""
    whole, fine, coarse = drawn(rng, contract)
    cut, want = whole.take_bits(6), np.concatenate([fine[:6], coarse[6:]])
    flat = want.reshape(-1, want.shape[-1])
    last = contract == "last"
    x = jnp.asarray(rng.standard_normal((3, flat.shape[1 if last else 0])), jnp.float32)
    truth = np.asarray(x) @ (flat.T if last else flat)
    products: list[Any] = [planes.rows_product, planes.columns_product]
    for block in (1 << 20, 200):  # of several sizes, the last one smaller
        monkeypatch.setattr(planes, "BLOCK", block)
        for product in products:
            product.clear_cache()
        mixed = jax.tree.map(jnp.asarray, in_parts(jax.device_get(cut)))
        for weight in (cut, cut.take_bits(0).drop_prefix(6), cut.take_bits(0), whole, mixed):
            some = truth
            if weight is not cut:
                values = np.asarray(weight.dense()).reshape(-1, flat.shape[1])
                some = np.asarray(x)[:, -len(values) :] @ values if not last else np.asarray(x) @ values.T
            inputs = x if last else x[:, -math.prod(weight.shape[:-1]) :]
            found = weight.rows(inputs) if last else weight.columns(inputs)
            np.testing.assert_allclose(found, some, rtol=1e-5, atol=1e-5)


def test_lookup_of_an_embedding(rng: np.random.Generator) -> None:
    codes, scales = rng.integers(-8, 8, (10, GROUP)), jnp.asarray(rng.uniform(0.5, 2, (2, 10, 1)), jnp.float32)
    table = from_nested_codes(jnp.asarray(codes), scales[0], scales[1], group=GROUP, contract="last", shape=(10, GROUP))
    index = jnp.asarray([[0, 9, 4], [5, 5, 3]])
    for full in (0, 5, 10):
        cut = table.take_bits(full)
        assert np.array_equal(cut.lookup(index, jnp.float32), np.asarray(cut.dense())[index])


def test_bytes_are_bits(rng: np.random.Generator) -> None:
    """A last bit costs an eighth of a byte; a group's scales two bytes each."""
    codes, scales = jnp.asarray(rng.integers(-8, 8, (64, 256))), jnp.ones((64, 2))
    whole: StoredWeight = from_nested_codes(codes, scales, scales, group=128, contract="last", shape=(64, 256))
    assert isinstance(whole, NestedArray)
    assert whole.nbytes == 64 * 256 // 2 + 2 * 2 * 64 * 2
    assert whole.take_bits(16).nbytes == 64 * 256 * 3 // 8 + 16 * 256 // 8 + 2 * 2 * (64 + 16)


def test_cuts_that_split_a_group(rng: np.random.Generator) -> None:
    whole, _, _ = drawn(rng, "first")
    for cut in (lambda: whole.take_prefix(5), lambda: whole.take_bits(5), lambda: whole.take_bits(6).take_bits(12)):
        with pytest.raises(ValueError, match=r"group|all bits"):
            cut()


@pytest.fixture
def problem(rng: np.random.Generator) -> tuple[jnp.ndarray, jnp.ndarray]:
    """A weight [width, rows] and the Hessian of correlated inputs, one of them far larger than the others."""
    mixed = rng.standard_normal((600, 96)) @ (np.eye(96) + 0.1 * rng.standard_normal((96, 96)))
    mixed[:, 40] *= 30
    columns = jnp.asarray(rng.standard_normal((96, 32)), jnp.float32)
    return columns, jnp.asarray(mixed.T @ mixed / 600, jnp.float32)


def test_descent_and_refit_never_lose(problem: tuple[jnp.ndarray, jnp.ndarray]) -> None:
    """After GPTQ, and from any other start; where one input is large, GPTQ leaves much to win."""
    columns, hessian = problem
    codes, scales, _ = quantize(columns.T, hessian, bits=4, group=48)
    codes, scales = codes.T.astype(jnp.float32), scales.T.astype(jnp.float32)
    rounded = nested.candidates(columns[:48], 4)[:1], nested.candidates(columns[48:], 4)[:1]
    plain = jnp.concatenate(rounded)
    starts = [(codes, scales), (nearest(columns, jnp.repeat(plain, 48, axis=0), 4), plain)]
    for codes, scales in starts:
        costs = [float(output_error(columns, codes * jnp.repeat(scales, 48, axis=0), hessian))]
        for _ in range(2):
            scales = refit_scales(columns, codes, hessian, scales, 48)
            costs.append(float(output_error(columns, codes * jnp.repeat(scales, 48, axis=0), hessian)))
            codes = descend(columns, codes, jnp.repeat(scales, 48, axis=0), hessian, 4)
            costs.append(float(output_error(columns, codes * jnp.repeat(scales, 48, axis=0), hessian)))
        assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(costs))
        assert costs[-1] < 0.8 * costs[0]
        assert np.array_equal(scales, scales.astype(jnp.bfloat16).astype(jnp.float32))
        assert float(jnp.abs(codes).max()) <= 8


def test_damping_is_that_of_a_typical_input() -> None:
    """Neither a huge input nor ones that are always zero change it."""
    diagonal = jnp.asarray([0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 1e9])
    added = jnp.diagonal(damped(jnp.diag(diagonal))) - diagonal
    np.testing.assert_allclose(added[:7], DAMPING * 3, rtol=1e-6)
    assert not jnp.diagonal(damped(jnp.zeros((4, 4)))).any()


@pytest.mark.parametrize("case", ["zeros", "rank one", "huge", "tiny", "not finite"])
def test_descents_of_degenerate_inputs(problem: tuple[jnp.ndarray, jnp.ndarray], case: str) -> None:
    """Finite scales wherever GPTQ's are, rows of zeros stay zeros, and what is not finite is seen in the scales."""
    columns, hessian = problem
    columns = columns.at[:, 3].set(0.0)
    if case == "zeros":
        hessian = jnp.zeros_like(hessian)
    elif case == "rank one":
        hessian = jnp.outer(columns[:, 0], columns[:, 0])
    elif case == "not finite":
        hessian = hessian.at[2, 2].set(jnp.inf)
    else:
        columns = columns * {"huge": 1e30, "tiny": 1e-30}[case]
    codes, scales, _ = quantize(columns.T, hessian, bits=4, group=48, descents=2)
    assert bool(jnp.isfinite(scales.astype(jnp.float32)).all()) == (case != "not finite")
    if case != "not finite":
        assert not codes[3].any()
        each = jnp.repeat(scales.astype(jnp.float32), 48, axis=1)
        size = jnp.linalg.norm(columns / jnp.abs(columns).max())
        assert jnp.linalg.norm((codes * each).T / jnp.abs(columns).max()) < 2 * size


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_with_descents(problem: tuple[jnp.ndarray, jnp.ndarray], bits: int) -> None:
    """Less output error than without, at a width that is no multiple of the group; codes stay nearest to what was
    rounded, which tuning goes on from.
    """
    columns, hessian = problem
    found = []
    for descents in (0, 3):
        codes, scales, unrounded = quantize(
            columns.T, hessian, bits=bits, group=40, descents=descents, return_unrounded=True
        )
        each = jnp.repeat(scales.astype(jnp.float32), 40, axis=1)[:, : len(columns)]
        found.append(float(output_error(columns, (codes * each).T, hessian)))
        low, high = limits(bits)
        assert codes.min() >= low
        assert codes.max() <= high
        assert unrounded is not None
        near = jnp.clip(jnp.round(unrounded / each), low, high) == codes
    assert found[1] < 0.8 * found[0]
    assert near.mean() > 0.97  # the others gained from a code that came after theirs


def nested_errors(problem: tuple[jnp.ndarray, jnp.ndarray], share: float, sweeps: int) -> tuple[float, float]:
    columns, hessian = problem
    codes, fine, coarse = nested.quantize_nested(columns, (hessian, hessian), group=48, share=share, sweeps=sweeps)
    made = from_nested_codes(codes.T, fine.T, coarse.T, group=48, contract="last", shape=columns.T.shape)
    found = [output_error(columns, view.dense().T, hessian) for view in (made, made.take_bits(0))]
    return float(found[0]), float(found[1])


def test_share_trades_one_model_for_the_other(problem: tuple[jnp.ndarray, jnp.ndarray]) -> None:
    """At 0 it is GPTQ at 4 bits; between, both models are near independent GPTQ at their widths."""
    columns, hessian = problem
    codes, scales, _ = quantize(columns.T, hessian, bits=4, group=48)
    gptq = float(output_error(columns, (codes * jnp.repeat(scales.astype(jnp.float32), 48, axis=1)).T, hessian))
    assert nested_errors(problem, 0.0, 0)[0] == pytest.approx(gptq, rel=0.02)
    fine, coarse = zip(*(nested_errors(problem, share, 2) for share in (0.2, 0.5, 0.8)), strict=True)
    assert fine[0] < fine[1] < fine[2]
    assert coarse[0] > coarse[1] > coarse[2]
    assert fine[1] < gptq
    assert coarse[2] < 4 * gptq


def test_zeros_stay_zeros(problem: tuple[jnp.ndarray, jnp.ndarray]) -> None:
    """A row and an input of zeros, and a Hessian without rank."""
    columns, hessian = problem
    columns = columns.at[:, 3].set(0.0)
    for one in (hessian.at[7].set(0.0).at[:, 7].set(0.0), jnp.zeros_like(hessian)):
        codes, fine, coarse = nested.quantize_nested(columns, (one, one), group=48)
        assert all(bool(jnp.isfinite(scale).all()) for scale in (fine, coarse))
        value = codes * jnp.repeat(fine, 48, axis=0)
        assert not value[:, 3].any()


@pytest.mark.parametrize("contract", ["last", "first"])
def test_a_device_holds_words_and_planes(rng: np.random.Generator, contract: str) -> None:
    """The same values bit for bit, in no more bytes than the planes and scales that are needed."""
    whole = jax.device_get(drawn(rng, contract)[0])
    for full, kind in ((12, QuantizedArray), (6, MixedArray), (0, NestedArray)):
        cut = whole.take_bits(full)
        placed = in_parts(cut)
        assert isinstance(placed, kind)
        assert placed.shape == cut.shape
        np.testing.assert_array_equal(placed.dense(), cut.dense())
        assert placed.nbytes <= cut.nbytes
        for count in (3, 6, 9):
            if contract == "last" or not count * 4 % GROUP:
                np.testing.assert_array_equal(placed.take_prefix(count).dense(), cut.take_prefix(count).dense())
    with pytest.raises(ValueError, match="6 of 12"):
        whole.take_bits(6).packed()
