"""A bigram model of token windows: what a language model must beat to know more than which token follows which."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

STRENGTHS = tuple(float(10 ** (i / 2)) for i in range(-2, 11))
TUNING_SHARE = 0.05


@dataclasses.dataclass(frozen=True)
class Bigram:
    """p(b | a) = (count(a, b) + strength * p(b)) / (count(a) + strength), p(b) an add-one unigram model."""

    unigram: Float[np.ndarray, " vocab"]
    pairs: Int[np.ndarray, " kinds"]  # a * vocab + b of every pair seen, sorted
    counts: Int[np.ndarray, " kinds"]
    firsts: Int[np.ndarray, " vocab"]  # how often each token was followed by one
    strength: float

    def probability(self, first: Int[np.ndarray, "..."], second: Int[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """p(second | first), float64, elementwise."""
        code = first.astype(np.int64) * len(self.unigram) + second
        place = np.minimum(np.searchsorted(self.pairs, code), len(self.pairs) - 1)
        count = np.where(self.pairs[place] == code, self.counts[place], 0)
        return (count + self.strength * self.unigram[second]) / (self.firsts[first] + self.strength)

    def loss(self, windows: Int[np.ndarray, "n t"]) -> float:
        """Mean -log p of every token but each window's first, nats."""
        return float(-np.log(self.probability(windows[:, :-1], windows[:, 1:])).mean())


def _count(stream: Int[np.ndarray, " tokens"], vocab: int, strength: float) -> Bigram:
    unigram = np.bincount(stream, minlength=vocab) + 1.0
    pairs, counts = np.unique(stream[:-1].astype(np.int64) * vocab + stream[1:], return_counts=True)
    firsts = np.bincount(stream[:-1], minlength=vocab)
    return Bigram(unigram / unigram.sum(), pairs, counts, firsts, strength)


def fit(windows: Int[np.ndarray, "n t"], vocab: int) -> Bigram:
    """The bigram model of token windows laid end to end; its strength is the best of STRENGTHS on the last 5 %.

    Raises ValueError for fewer than 40 tokens.
    """
    stream = windows.reshape(-1)
    cut = int(stream.size * (1 - TUNING_SHARE))
    if stream.size - cut < 2:
        raise ValueError("a bigram model needs at least 40 tokens")
    part = _count(stream[:cut], vocab, 1.0)
    tuning = stream[None, cut:]
    best = min(STRENGTHS, key=lambda strength: dataclasses.replace(part, strength=strength).loss(tuning))
    return _count(stream, vocab, best)
