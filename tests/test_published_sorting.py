"""The baseline that sorting is timed against does what its papers say: nothing is lost where all is kept."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import published_sorting


def _gram(rng: np.random.Generator, width: int) -> np.ndarray:
    x = rng.standard_normal((4 * width, width)) * np.geomspace(1, 0.1, width)
    return (x.T @ x / len(x)).astype(np.float32)


@pytest.mark.parametrize("hermitian", [False, True])
def test_an_mlp_that_keeps_all_stays_as_it_is(hermitian: bool, rng: np.random.Generator) -> None:
    gram, down = _gram(rng, 24), rng.standard_normal((24, 10)).astype(np.float32)
    chosen, fitted = published_sorting.nystroem_mlp(jnp.asarray(gram), jnp.asarray(down), 24, hermitian)
    assert sorted(np.asarray(chosen).tolist()) == list(range(24))
    np.testing.assert_allclose(fitted, down[np.asarray(chosen)], rtol=1e-3, atol=1e-3)


def test_a_fitted_mlp_loses_less_than_a_cut_one(rng: np.random.Generator) -> None:
    mix = rng.standard_normal((24, 24)).astype(np.float32)
    gram = mix @ _gram(rng, 24) @ mix.T
    down = rng.standard_normal((24, 10)).astype(np.float32)
    chosen, fitted = published_sorting.nystroem_mlp(jnp.asarray(gram), jnp.asarray(down), 12)

    def loss(kept: np.ndarray) -> float:
        error = down.copy()
        error[np.asarray(chosen)] -= kept
        return float(np.einsum("fh,fg,gh->", error, gram, error))

    assert loss(np.asarray(fitted)) < loss(down[np.asarray(chosen)])


def test_value_and_output_of_full_rank_have_the_same_product(rng: np.random.Generator) -> None:
    gram = jnp.asarray(_gram(rng, 16))
    value, output = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 6, 16), (2, 3, 6, 16)))
    narrow, kept = published_sorting.svd_value_output(gram, value, output, 6)
    wanted = jnp.einsum("gdh,gmdk->gmhk", value, output)
    np.testing.assert_allclose(jnp.einsum("gdh,gmdk->gmhk", narrow, kept), wanted, rtol=1e-3, atol=1e-3)


def test_pairs_are_chosen_by_the_norms_of_square_roots(rng: np.random.Generator) -> None:
    gram = _gram(rng, 8)
    root = np.asarray(published_sorting.square_root(jnp.asarray(gram)))
    np.testing.assert_allclose(root @ root, gram, rtol=1e-4, atol=1e-5)
    wanted = np.argsort(-np.diagonal(gram))[:5]  # a column's norm in the root is the root of the diagonal
    found = published_sorting.cr_pairs(jnp.asarray(gram)[None, None], jnp.asarray(gram)[None], 5)
    np.testing.assert_array_equal(found[0], wanted)
