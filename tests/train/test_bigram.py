"""The bigram model counts what it should, sums to one, and learns which token follows which."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tools import bigram


def test_probabilities_sum_to_one_and_follow_the_counts(rng: np.random.Generator) -> None:
    windows = rng.integers(0, 7, (20, 30)).astype(np.int32)
    model = bigram.fit(windows, vocab=9)  # two tokens never occur
    first, second = np.meshgrid(np.arange(9), np.arange(9), indexing="ij")
    table = model.probability(first, second)
    np.testing.assert_allclose(table.sum(1), 1.0, rtol=1e-12)
    assert (table > 0).all()
    stream = windows.reshape(-1)
    count = sum(a == 3 and b == 5 for a, b in itertools.pairwise(stream))
    followed = int((stream[:-1] == 3).sum())
    expected = (count + model.strength * model.unigram[5]) / (followed + model.strength)
    assert table[3, 5] == pytest.approx(expected, rel=1e-12)


def test_it_learns_what_a_unigram_model_cannot(rng: np.random.Generator) -> None:
    """A random walk on a ring of 50 tokens: the entropy of a step is known."""
    steps = rng.choice([1, 2, 3], 20_000, p=[0.6, 0.3, 0.1])
    stream = (np.cumsum(steps) % 50).astype(np.int32)
    train, held = stream[:15_000].reshape(-1, 100), stream[15_000:].reshape(-1, 100)
    entropy = -sum(p * np.log(p) for p in (0.6, 0.3, 0.1))
    loss = bigram.fit(train, 50).loss(held)
    assert entropy - 0.05 < loss < entropy + 0.05
    assert loss < np.log(50) / 2


def test_smoothing_grows_where_counts_mean_nothing(rng: np.random.Generator) -> None:
    independent = rng.integers(0, 300, (20, 100)).astype(np.int32)
    regular = np.tile(np.arange(100, dtype=np.int32), (20, 1))
    assert bigram.fit(independent, 300).strength > bigram.fit(regular, 300).strength
    with pytest.raises(ValueError, match="40 tokens"):
        bigram.fit(independent[:1, :20], 300)
