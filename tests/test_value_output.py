"""V/O decomposition of damaged and badly scaled weights, against float64: same product, finite, best ranks first."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uniql_jax.compression.finite import first_nonfinite
from uniql_jax.compression.math.gptq import quantize
from uniql_jax.compression.math.value_output import decompose, rank_loss, sort_value_output
from uniql_jax.compression.settings import VALUE_OUTPUTS

SHAPES = [(8, 4, 4, 40), (16, 2, 6, 24), (12, 1, 1, 12)]
"""Head size, key/value heads, query heads, hidden size; in the last a head is as wide as the stream."""
Weights = tuple[np.ndarray, np.ndarray]  # V [d, g, h], O [d, n, h], float32


def _weights(shape: tuple[int, int, int, int], rng: np.random.Generator) -> Weights:
    d, groups, heads, hidden = shape
    v, o = rng.standard_normal((d, groups, hidden)), rng.standard_normal((d, heads, hidden))
    return v.astype(np.float32), o.astype(np.float32)


def _heads_of(o: np.ndarray, groups: int, group: int = 0) -> slice:
    shared = o.shape[1] // groups
    return slice(group * shared, (group + 1) * shared)


def _one_dead_channel(v: np.ndarray, o: np.ndarray, rng: np.random.Generator) -> None:
    o[3, _heads_of(o, v.shape[1])] = 0


def _half_dead(v: np.ndarray, o: np.ndarray, rng: np.random.Generator) -> None:
    o[rng.permutation(len(o))[: len(o) // 2], _heads_of(o, v.shape[1])] = 0


def _head_dead(v: np.ndarray, o: np.ndarray, rng: np.random.Generator) -> None:
    o[:, _heads_of(o, v.shape[1], v.shape[1] - 1)] = 0


def _query_head_dead(v: np.ndarray, o: np.ndarray, rng: np.random.Generator) -> None:
    o[:, 0] = 0


def _all_dead(v: np.ndarray, o: np.ndarray, rng: np.random.Generator) -> None:
    o[:] = 0


def _identical_heads(v: np.ndarray, o: np.ndarray, rng: np.random.Generator) -> None:
    v[:], o[:] = v[:, :1], o[:, :1]


def _duplicated_columns(v: np.ndarray, o: np.ndarray, rng: np.random.Generator) -> None:
    o[1], o[4:7] = o[0], -2 * o[2]


def _low_rank(v: np.ndarray, o: np.ndarray, rng: np.random.Generator) -> None:
    mixed = rng.standard_normal((len(o), 3)) @ rng.standard_normal((3, o[0].size))
    o[:] = mixed.reshape(o.shape)


def _dead_values(v: np.ndarray, o: np.ndarray, rng: np.random.Generator) -> None:
    v[2], v[5:] = 0, 0


def _dependent_values(v: np.ndarray, o: np.ndarray, rng: np.random.Generator) -> None:
    v[1], v[2] = 1e-6 * v[0], v[3] + v[4]


def _both(v: np.ndarray, o: np.ndarray, rng: np.random.Generator) -> None:
    v[:3], o[2:6] = 0, 0


def _values_all_dead(v: np.ndarray, o: np.ndarray, rng: np.random.Generator) -> None:
    v[:] = 0


def _spread(v: np.ndarray, o: np.ndarray, rng: np.random.Generator) -> None:
    u, _, w = np.linalg.svd(o.reshape(len(o), -1).astype(np.float64), full_matrices=False)
    o[:] = (u * np.logspace(0, -5.5, len(o)) @ w).reshape(o.shape)


def _scaled_channels(v: np.ndarray, o: np.ndarray, rng: np.random.Generator) -> None:
    scales = np.logspace(-9, 9, len(o))[rng.permutation(len(o)), None, None]
    v *= scales
    o /= scales


def _tiny(v: np.ndarray, o: np.ndarray, rng: np.random.Generator) -> None:
    o *= 1e-30
    o[0] = 0


def _intact(v: np.ndarray, o: np.ndarray, rng: np.random.Generator) -> None:
    pass


DAMAGE: dict[str, Callable[[np.ndarray, np.ndarray, np.random.Generator], None]] = {
    function.__name__.strip("_"): function
    for function in (
        _intact, _one_dead_channel, _half_dead, _head_dead, _query_head_dead, _all_dead, _identical_heads,
        _duplicated_columns, _low_rank, _dead_values, _dependent_values, _both, _values_all_dead, _spread,
        _scaled_channels, _tiny,
    )
}  # fmt: skip


def _grams(v: np.ndarray, tokens: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Gram of V's outputs per key/value head, and of its inputs, from a few tokens."""
    x = rng.standard_normal((tokens, v.shape[-1])).astype(np.float32)
    values = np.einsum("th,dgh->tgd", x, v)
    return np.einsum("tgi,tgj->gij", values, values) / tokens, x.T @ x / tokens


def _metric(kind: str, hidden: int, rng: np.random.Generator) -> jax.Array | None:
    """None, zero, or the Gram of a loss gradient of one or many tokens."""
    if kind == "none":
        return None
    slopes = 1e-4 * rng.standard_normal((1 if kind == "rank one" else 3 * hidden, hidden))
    return jnp.asarray((0.0 if kind == "zero" else 1.0) * (slopes.T @ slopes), jnp.float32)


def _products(v: np.ndarray, o: np.ndarray) -> np.ndarray:
    """W_V W_O of every query head, float64 [n, h, h]."""
    shared = o.shape[1] // v.shape[1]
    return np.einsum("dnh,dnk->nhk", np.repeat(v, shared, axis=1).astype(np.float64), o.astype(np.float64))


def _sizes(v: np.ndarray, o: np.ndarray) -> np.ndarray:
    """What rounding of a head's product is measured by: the sum over channels of |v| |o|, [n]."""
    norms = np.linalg.norm(np.repeat(v, o.shape[1] // v.shape[1], axis=1).astype(np.float64), axis=-1)
    return np.sum(norms * np.linalg.norm(o.astype(np.float64).reshape(len(o), v.shape[1], -1), axis=-1).repeat(
        o.shape[1] // v.shape[1], axis=1), axis=0)  # fmt: skip


def _product_rank(v: np.ndarray, o: np.ndarray, group: int) -> int:
    """Numerical rank of V^T O over the query heads of a group."""
    flat = o[:, _heads_of(o, v.shape[1], group)].reshape(len(o), -1).astype(np.float64)
    if not (flat.any() and v[:, group].any()):
        return 0
    values = np.linalg.svd(v[:, group].astype(np.float64).T @ flat, compute_uv=False)
    return int(np.sum(values > 1e-6 * values[0]))


@pytest.mark.parametrize("metric", ["none", "zero", "rank one", "full"])
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product_is_kept(
    shape: tuple[int, int, int, int], damage: str, metric: str, rng: np.random.Generator
) -> None:
    v, o = _weights(shape, rng)
    DAMAGE[damage](v, o, rng)
    tokens = 3 if metric == "rank one" else 200
    gram_out, gram_x = _grams(v, tokens, rng)
    method = "joint" if metric == "none" else "attention_output"
    found = sort_value_output(
        jnp.asarray(v), jnp.asarray(o), jnp.asarray(gram_out), jnp.asarray(gram_x), method,
        metric=_metric(metric, shape[-1], rng),
    )  # fmt: skip
    assert first_nonfinite(found) is None
    _, new_v, new_o = map(np.asarray, found)
    error = np.linalg.norm(_products(new_v, new_o) - _products(v, o), axis=(1, 2))
    assert (error <= 4e-6 * _sizes(v, o)).all()
    # A rank has content in V and O, or zeros in both and stands last; the rows of a group's O have one norm.
    norms = np.linalg.norm(new_o.reshape(shape[0], shape[1], -1), axis=-1)
    assert ((norms == 0) | (np.abs(norms - 1) < 1e-4)).all()
    assert ((norms == 0) == ~found[0].any(-1).T).all()
    assert (np.diff((norms > 0).astype(int), axis=0) <= 0).all()
    if damage not in ("spread", "scaled_channels"):
        ranks = [_product_rank(v, o, g) for g in range(shape[1])]
        np.testing.assert_array_equal((norms > 0).sum(0), ranks)
    for bits in (4, 8):
        for matrix in (new_v.reshape(-1, shape[-1]), new_o.reshape(-1, shape[-1]).T):
            codes, scale, _ = quantize(jnp.asarray(matrix), None, bits=bits, group=16)
            assert first_nonfinite(scale) is None
            assert not np.asarray(codes)[~matrix.any(1)].any()


def _best_errors(o: np.ndarray, gram: np.ndarray, metric: np.ndarray) -> np.ndarray:
    """Weighed squared error of the best 0 ... d ranks for one key/value head, by SVD in float64."""

    def root(matrix: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(matrix.astype(np.float64))
        return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T

    sizes = np.sqrt(np.diagonal(gram).astype(np.float64))  # an eigendecomposition sees no more than 16 digits
    left = root(gram / sizes / sizes[:, None]) * sizes
    whole = np.concatenate([left @ o[:, n] @ root(metric) for n in range(o.shape[1])], axis=1)
    values = np.linalg.svd(whole, compute_uv=False) ** 2
    return np.append(np.cumsum(values[::-1])[::-1], 0.0)


@pytest.mark.parametrize("damage", ["intact", "one_dead_channel", "low_rank", "scaled_channels"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_choice_of_ranks_loses_less(shape: tuple[int, int, int, int], damage: str, rng: np.random.Generator) -> None:
    v, o = _weights(shape, rng)
    DAMAGE[damage](v, o, rng)
    gram_out, _ = _grams(v, 200, rng)
    metric = _metric("full", shape[-1], rng)
    assert metric is not None
    floored = np.asarray(metric, np.float64)
    floored += 1e-4 * np.trace(floored) / len(floored) * np.eye(len(floored))
    change, new_o = map(np.asarray, decompose(jnp.asarray(o), jnp.asarray(gram_out), metric))
    for group in range(shape[1]):
        heads = _heads_of(o, shape[1], group)
        best = _best_errors(o[:, heads], gram_out[group], floored)
        for rank in range(shape[0] + 1):
            missed = o[:, heads] - np.einsum("rd,rmh->dmh", change[group, :rank], new_o[:rank, heads], dtype=np.float64)
            lost = np.einsum("de,dmh,emk,hk->", gram_out[group], missed, missed, floored, optimize=True)
            assert lost <= best[rank] * (1 + 1e-4) + 1e-10 * best[0]


def test_what_gram_does_not_see_is_kept_behind_what_it_sees(rng: np.random.Generator) -> None:
    v, o = _weights((8, 1, 2, 24), rng)
    o[2:5] *= 100  # never attended: dear by its weight alone
    gram_out, _ = _grams(v, 100, rng)
    gram_out[:, 2:5], gram_out[:, :, 2:5] = 0, 0
    change, new_o = decompose(jnp.asarray(o), jnp.asarray(gram_out), None, jnp.asarray(v))
    new_v = np.einsum("grd,dgh->rgh", change, v)
    losses = np.asarray(rank_loss(change, new_o, jnp.asarray(gram_out), jnp.eye(24)))
    assert losses[4] > 1e-3 * losses[0]
    assert (losses[5:] < 1e-5 * losses[0]).all()
    error = np.linalg.norm(_products(new_v, np.asarray(new_o)) - _products(v, o), axis=(1, 2))
    assert (error <= 4e-6 * _sizes(v, o)).all()
    assert np.asarray(new_o).any(axis=(1, 2)).all()
    # With nothing to go by, O alone decides.
    change, new_o = decompose(jnp.asarray(o), jnp.zeros((1, 8, 8)))
    carried = np.linalg.norm(np.asarray(change)[0], axis=1)
    assert (np.diff(carried) <= 1e-5 * carried[0]).all()


@pytest.mark.parametrize("method", VALUE_OUTPUTS)
def test_every_method_is_finite_without_content(method: str, rng: np.random.Generator) -> None:
    for v, o in (_weights((8, 2, 4, 24), rng), (np.zeros((8, 2, 24), np.float32), np.zeros((8, 4, 24), np.float32))):
        for gram in (np.zeros((2, 8, 8), np.float32), np.full((2, 8, 8), 1e18, np.float32)):
            found = sort_value_output(
                jnp.asarray(v),
                jnp.asarray(o),
                jnp.asarray(gram),
                jnp.zeros((24, 24)),
                method,
                metric=jnp.zeros((24, 24)),
            )
            assert first_nonfinite(found) is None
            error = np.linalg.norm(_products(*map(np.asarray, found[1:])) - _products(v, o), axis=(1, 2))
            assert (error <= 4e-6 * _sizes(v, o)).all()


@pytest.mark.parametrize("name", ["o", "gram", "metric", "v"])
def test_inputs_that_are_not_finite_are_refused(name: str, rng: np.random.Generator) -> None:
    v, o = _weights((8, 2, 4, 24), rng)
    inputs = {"o": o, "gram": np.ones((2, 8, 8), np.float32), "metric": np.eye(24, dtype=np.float32), "v": v}
    inputs[name].flat[5] = np.nan
    with pytest.raises(ValueError, match=f"{name} holds values that are not finite"):
        decompose(**{key: jnp.asarray(value) for key, value in inputs.items()})
