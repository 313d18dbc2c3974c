"""GPTQ, group scales and rotation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uniql_jax import elastic
from uniql_jax.compression.math.gptq import inverse_factor, quantize
from uniql_jax.compression.math.rotation import orthogonal, rotate_block, rotate_top
from uniql_jax.compression.math.triangular import LEAST, by_halves, whole
from uniql_jax.config import ModelConfig, Rope
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.weights.quantized import from_codes


def inputs_gram(rng: np.random.Generator, width: int, tokens: int = 400) -> np.ndarray:
    """Gram of correlated inputs."""
    x = rng.standard_normal((tokens, width)) @ (np.eye(width) + 0.7 * rng.standard_normal((width, width)))
    return x.T @ x / tokens


def output_error(weight: np.ndarray, gram: np.ndarray, bits: int, group: int, **options: bool) -> float:
    codes, scale, _ = quantize(jnp.asarray(weight), jnp.asarray(gram), bits=bits, group=group, **options)
    packed = from_codes(codes, scale, bits=bits, group=group, contract="last", shape=weight.shape)
    difference = np.asarray(packed.dense(), np.float64) - weight
    return float(np.trace(difference @ gram @ difference.T))


@pytest.mark.parametrize(("width", "group"), [(144, 144), (100, 32)])
def test_gptq_beats_rounding_and_searched_scales_beat_max_abs(width: int, group: int, rng: np.random.Generator) -> None:
    weight = rng.standard_normal((20, width)).astype(np.float32) * np.exp(rng.standard_normal((20, 1)))
    weight = weight.astype(np.float32)
    gram = inputs_gram(rng, width).astype(np.float32)
    nearest = output_error(weight, gram, 4, group, search=False, propagate=False)
    searched = output_error(weight, gram, 4, group, search=True, propagate=False)
    gptq = output_error(weight, gram, 4, group, search=True, propagate=True)
    assert searched < nearest
    assert gptq < 0.8 * searched


def test_an_identity_hessian_rounds_to_nearest(rng: np.random.Generator) -> None:
    weight = jnp.asarray(rng.standard_normal((6, 64)), jnp.float32)
    with_identity = quantize(weight, jnp.eye(64), bits=4, group=32)[:2]
    plain = quantize(weight, None, bits=4, group=32)[:2]
    np.testing.assert_array_equal(with_identity[0], plain[0])
    np.testing.assert_array_equal(np.asarray(with_identity[1], np.float32), np.asarray(plain[1], np.float32))


@pytest.mark.parametrize("bits", [4, 8])
def test_error_is_within_half_a_step(bits: int, rng: np.random.Generator) -> None:
    weight = jnp.asarray(rng.standard_normal((5, 48)), jnp.float32)
    codes, scale, _ = quantize(weight, None, bits=bits, group=16, search=False)
    step = np.repeat(np.abs(np.asarray(scale, np.float32)), 16, axis=1)
    error = np.abs(np.asarray(codes) * np.repeat(np.asarray(scale, np.float32), 16, axis=1) - np.asarray(weight))
    # The scale itself is rounded to bfloat16, so a large entry may be off by that as well. Four bits have one step more
    # on one side: an entry beyond the last step of the other side is off by up to a whole one.
    last = np.abs(np.asarray(codes)) >= (7 if bits == 4 else 127)
    slack = 2**-8 * np.abs(np.asarray(weight)) + 1e-7
    assert (error <= np.where(last, 1.0, 0.5) * step + slack).all()


def test_zero_rows_and_groups_stay_zero(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((4, 64)).astype(np.float32)
    weight[1] = 0
    weight[2, 32:] = 0
    gram = inputs_gram(rng, 64).astype(np.float32)
    codes, scale, _ = quantize(jnp.asarray(weight), jnp.asarray(gram), bits=4, group=32)
    assert np.isfinite(np.asarray(scale, np.float32)).all()
    assert (np.asarray(codes)[1] == 0).all()


@pytest.mark.parametrize("case", ["zero", "rank one", "negative"])
def test_bad_hessians_give_finite_factors(case: str, rng: np.random.Generator) -> None:
    column = rng.standard_normal((32, 1))
    hessian = {
        "zero": np.zeros((32, 32)),
        "rank one": column @ column.T,
        "negative": np.eye(32) - 1.5 * np.outer(column, column) / float((column**2).sum()),
    }[case]
    factor = np.asarray(inverse_factor(jnp.asarray(hessian, jnp.float32)))
    assert np.isfinite(factor).all()
    assert (np.diagonal(factor) > 0).all()


def test_inverse_factor_is_the_cholesky_factor_of_the_inverse(rng: np.random.Generator) -> None:
    hessian = inputs_gram(rng, 24)
    factor = np.asarray(inverse_factor(jnp.asarray(hessian, jnp.float32), 0.01), np.float64)
    damped = hessian + 0.01 * np.trace(hessian) / 24 * np.eye(24)
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(24), atol=2e-3)
    np.testing.assert_array_equal(factor, np.triu(factor))


@pytest.mark.parametrize("size", [3, 9, 24, 70])
def test_an_inverse_by_halves_is_that_of_the_solvers(rng: np.random.Generator, size: int) -> None:
    hessian = inputs_gram(rng, size) + 0.01 * np.eye(size)
    found = np.asarray(by_halves(jnp.asarray(hessian, jnp.float32), 8), np.float64)
    np.testing.assert_allclose(found @ hessian @ found.T, np.eye(size), atol=1e-3)
    np.testing.assert_array_equal(found, np.tril(found))
    np.testing.assert_allclose(found, np.asarray(whole(jnp.asarray(hessian, jnp.float32))), rtol=1e-3, atol=1e-4)
    negative = jnp.asarray(hessian, jnp.float32).at[size - 1, size - 1].set(-1.0)
    assert not np.isfinite(np.asarray(by_halves(negative, 8))).all()


@pytest.mark.gpu
def test_an_inverse_by_halves_on_the_device(rng: np.random.Generator) -> None:
    size = 2 * LEAST + 100
    seen = rng.standard_normal((2 * size, size))  # more than columns: float32 is then good for five digits
    hessian = seen.T @ seen / len(seen)
    found = np.asarray(jax.jit(by_halves)(jnp.asarray(hessian, jnp.float32)), np.float64)
    want = np.linalg.inv(np.linalg.cholesky(hessian))
    assert np.linalg.norm(found - want) < 1e-4 * np.linalg.norm(want)


@pytest.mark.parametrize("size", [576, 896, 60, 64, 7])
def test_orthogonal_is_orthogonal(size: int, seed: int) -> None:
    q = orthogonal(size, seed)
    np.testing.assert_allclose(q.T @ q, np.eye(size), atol=1e-12)


def _tiny(tied: bool, rng: np.random.Generator) -> CausalLM:
    config = ModelConfig(
        "llama", 50, 24, (("attention", "mlp"),) * 2, 4, 2, 8, Rope(10000.0, 8), 40, 1e-5, tie_embeddings=tied,
        qkv_bias=True, mlp_bias=True,
    )  # fmt: skip

    def leaf(name: str, spec: elastic.Leaf) -> jnp.ndarray:
        if name == "inv_freq":
            return jnp.asarray(np.repeat(config.rope.inv_freq()[:, None], 2, axis=1))  # type: ignore[union-attr]
        offset = 1.0 if name == "norm" else 0.0
        return jnp.asarray(offset + 0.3 * rng.standard_normal(elastic.shape(config, spec)), jnp.float32)

    layers = [
        {kind: {n: leaf(n, s) for n, s in elastic.leaves(config, kind).items()} for kind in ("attention", "mlp")}
        for _ in range(2)
    ]
    top = {n: leaf(n, elastic.TOP[n]) for n in ("embed", "norm", *(() if tied else ("head",)))}
    return CausalLM(config, top | {"layers": layers})


@pytest.mark.parametrize("tied", [True, False])
def test_rotation_changes_nothing(tied: bool, rng: np.random.Generator) -> None:
    model = _tiny(tied, rng)
    q = jnp.asarray(orthogonal(24, 3), jnp.float32)
    layers = [{kind: rotate_block(kind, block, q) for kind, block in layer.items()} for layer in model.params["layers"]]
    top = rotate_top({k: v for k, v in model.params.items() if k != "layers"}, q)
    assert ("head" in top) != tied
    rotated = CausalLM(model.config, top | {"layers": layers})
    tokens = jnp.asarray(rng.integers(0, 50, (2, 11)), jnp.int32)
    forward = jax.jit(lambda model: model(tokens))
    want, got = np.asarray(forward(model)), np.asarray(forward(rotated))
    assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)


def test_rotation_helps_where_single_coordinates_stick_out(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((32, 64)).astype(np.float32)
    weight[:, 5] *= 20  # one outlier sets the scale of its whole group
    gram = np.eye(64, dtype=np.float32)
    q = orthogonal(64, 0).astype(np.float32)
    plain = output_error(weight, gram, 4, 64, propagate=False)
    turned = output_error(weight @ q, gram, 4, 64, propagate=False)
    assert turned < 0.5 * plain
