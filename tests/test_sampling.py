"""Sampling: temperature, top-k and top-p, and the chances of what is drawn."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uniql_jax.runtime import generation as runtime
from uniql_jax.runtime import sampling

FILTERED = jax.jit(runtime.filtered_logits)


def kept_set(logits: np.ndarray, **settings: float) -> set[int]:
    found = FILTERED(
        jnp.asarray(logits)[None], 1.0, top_p=float(settings.get("top_p", 1)), top_k=settings.get("top_k", 0)
    )
    return set(np.flatnonzero(np.isfinite(np.asarray(found)[0])).tolist())


@given(seed=st.integers(0, 10**6), top_p=st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_set(seed: int, top_p: float) -> None:
    logits = np.random.default_rng(seed).standard_normal(50).astype(np.float32) * 3
    chances = np.exp(logits.astype(np.float64))
    chances /= chances.sum()
    kept = kept_set(logits, top_p=top_p)
    mass = chances[list(kept)].sum()
    least = chances[list(kept)].min()
    assert mass >= top_p - 1e-5
    assert len(kept) == 1 or mass - least < top_p + 1e-5
    assert least >= max(np.delete(chances, list(kept)), default=0)


def by_sorting(logits: np.ndarray, temperature: float, top_p: float, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """The definition, in float64 from logits over temperature on: which tokens stay, and how near to top_p each one's
    share before it is.
    """
    x = logits / np.float32(temperature)
    order = np.argsort(-x, kind="stable")
    chances = np.exp((x[order] - x.max()).astype(np.float64))
    if top_k:
        chances[top_k:] = 0
    chances /= chances.sum()
    before = np.cumsum(chances) - chances
    kept = (np.arange(len(x)) < (top_k or len(x))) & ((before < top_p) | (np.arange(len(x)) == 0) | (top_p >= 1))
    found, near = np.zeros(len(x), bool), np.zeros(len(x))
    found[order], near[order] = kept, np.abs(before - top_p)
    return found, near


@pytest.mark.parametrize("digit", [1, 8])
@pytest.mark.parametrize("kind", ["spread", "ties", "few values", "huge", "flat"])
def test_thresholds_are_what_sorting_finds(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, digit: int, kind: str
) -> None:
    """Every row has its own settings; what is equal stays by its id; only shares within rounding may differ."""
    monkeypatch.setitem(sampling.DIGIT, jax.default_backend(), digit)
    rows, size = 40, 333
    x = rng.standard_normal((rows, size)) * 4
    x = {"spread": x, "ties": np.round(x), "few values": np.sign(np.round(x / 4)), "huge": x * 1e30, "flat": 0 * x}[
        kind
    ]
    x = x.astype(np.float32) * rng.choice(np.asarray([-1, 1], np.float32), (rows, 1))  # zeros of both signs
    temperature = rng.uniform(0.3, 2, rows).astype(np.float32)
    top_p = rng.choice([1.0, 0.999, 0.9, 0.5, 0.1, 1e-6], rows).astype(np.float32)
    top_k = rng.choice([0, 1, 2, 7, 100, size - 1, size, 10**6], rows).astype(np.int32)
    found = np.asarray(jax.jit(lambda *a: runtime.filtered_logits(*a))(x, temperature, top_p, top_k))
    for i in range(rows):
        want, near = by_sorting(x[i], float(temperature[i]), float(top_p[i]), int(min(top_k[i], size)))
        differ = np.isfinite(found[i]) != want
        assert (near[differ] < 1e-6).all()
        np.testing.assert_allclose(found[i][want & ~differ], (x[i] / temperature[i])[want & ~differ], rtol=1e-6)


def test_nothing_is_sorted() -> None:
    text = str(jax.make_jaxpr(runtime.sample)(jnp.zeros((2, 50)), jax.random.key(0), 1.0, 0.9, 5))
    assert "sort" not in text
    assert "top_k" not in text


def test_each_row_may_have_its_own_key(rng: np.random.Generator) -> None:
    logits, keys = jnp.asarray(rng.standard_normal((3, 40)), jnp.float32), jax.random.split(jax.random.key(4), 3)
    temperature = jnp.asarray([0.0, 1.0, 2.0])
    together = runtime.sample(logits, keys, temperature, 0.9, 0)
    alone = [int(runtime.sample(logits[i : i + 1], keys[i], temperature[i], 0.9, 0)[0]) for i in range(3)]
    assert together.tolist() == alone
    assert alone[0] == int(jnp.argmax(logits[0]))


def test_filters_at_their_ends(rng: np.random.Generator) -> None:
    logits = rng.standard_normal(3000).astype(np.float32) * 9
    likely = np.argsort(-logits)
    assert kept_set(logits) == set(range(3000))
    assert kept_set(logits, top_p=1) == set(range(3000))
    assert kept_set(logits, top_p=1e-6) == {int(likely[0])}
    assert kept_set(logits, top_k=1) == {int(likely[0])}
    assert kept_set(logits, top_k=7) == set(likely[:7].tolist())
    assert kept_set(logits, top_k=5000) == set(range(3000))
    assert kept_set(logits, top_k=7, top_p=0.5) <= set(likely[:7].tolist())
    assert len(kept_set(np.zeros(10, np.float32), top_p=0.45)) == 5


def test_top_p_counts_what_top_k_left() -> None:
    logits = np.log(np.asarray([0.4, 0.3, 0.2, 0.1], np.float32))
    assert kept_set(logits, top_p=0.55) == {0, 1}
    assert kept_set(logits, top_k=2, top_p=0.55) == {0}


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.7, 1.0, 0), (1.8, 0.8, 0), (1.0, 1.0, 4), (1.3, 0.9, 6)]
)
def test_draws_have_the_right_chances(
    temperature: float, top_p: float, top_k: int, rng: np.random.Generator, seed: int
) -> None:
    """Chi-square of 20000 draws against chances computed in numpy: outside 1 in a million means wrong."""
    logits = rng.standard_normal(12).astype(np.float32) * 1.5
    chances = np.exp(logits.astype(np.float64) / temperature)
    if top_k:
        chances[np.argsort(-logits)[top_k:]] = 0
    chances /= chances.sum()
    order = np.argsort(-chances)
    before = np.cumsum(chances[order]) - chances[order]
    if top_p < 1:
        chances[order[before >= top_p]] = 0
    chances /= chances.sum()
    draws = 20_000
    found = runtime.sample(
        jnp.tile(jnp.asarray(logits), (draws, 1)), jax.random.key(seed), temperature, top_p=top_p, top_k=top_k
    )
    counts = np.bincount(np.asarray(found), minlength=12)
    assert (counts[chances == 0] == 0).all()
    expected = chances[chances > 0] * draws
    statistic = ((counts[chances > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert statistic < freedom + 7 * np.sqrt(2 * freedom) + 10


def test_temperature_0_is_the_likeliest(rng: np.random.Generator) -> None:
    logits = jnp.asarray(rng.standard_normal((5, 40)), jnp.float32)
    found = runtime.sample(logits, jax.random.key(0), 0.0, top_p=0.3)
    np.testing.assert_array_equal(found, np.argmax(logits, axis=-1))
    assert found.dtype == jnp.int32
