"""The rate of a step: drawn as announced, repeatable, rate 0 included."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.train import cases
from uniql_jax.train import rates, settings


@pytest.mark.parametrize("distribution", [*settings.DISTRIBUTIONS, "low-kept-first:0.3"])
def test_drawn_as_announced(distribution: str) -> None:
    expected = rates.probabilities(distribution)
    assert expected.sum() == pytest.approx(1)
    drawn = [rates.draw(distribution, 5, step) for step in range(4000)]
    assert drawn[:50] == [rates.draw(distribution, 5, step) for step in range(50)]
    assert drawn[:50] != [rates.draw(distribution, 6, step) for step in range(50)]
    for rate, p in zip(rates.RATES, expected, strict=True):
        assert drawn.count(rate) / 4000 == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / 4000))
    assert {0.0, 0.35} <= set(drawn) <= set(rates.RATES)


def test_the_most_pruned_come_first() -> None:
    falling = rates.probabilities("low-kept-first")
    np.testing.assert_allclose(falling[1:] / falling[:-1], math.exp(0.1))
    assert tuple(sorted(rates.RATES)) == rates.RATES
    sandwich = rates.probabilities("sandwich")
    np.testing.assert_allclose(sandwich / sandwich[1], [2, 1, 1, 1, 1, 1, 1, 4])
    steeper = rates.probabilities("low-kept-first:0.3")
    np.testing.assert_allclose(steeper[1:] / steeper[:-1], math.exp(0.3))
    np.testing.assert_allclose(rates.probabilities("low-kept-first:0"), rates.probabilities("uniform"))


@pytest.mark.parametrize("wrong", ["sometimes", "uniform:0.1", "low-kept-first:", "low-kept-first:-1", "often:0.2"])
def test_unknown_distributions_are_named(wrong: str) -> None:
    with pytest.raises(ValueError, match="low-kept-first:FALL"):
        rates.probabilities(wrong)


def test_one_rate_alone() -> None:
    assert {rates.draw("0.25", 0, step) for step in range(20)} == {0.25}
    assert rates.draw("0", 0, 3) == 0.0
    with pytest.raises(ValueError, match="uniform"):
        rates.draw("often", 0, 0)


def test_masks_follow_the_plan(rng: np.random.Generator) -> None:
    plan = cases.model("llama", rng).plan
    assert plan is not None
    for rate in (0.0, 0.25):
        arrays = rates.keep_arrays(plan, rate)
        found = tuple({axis: int(np.asarray(count)) for axis, count in layer.items()} for layer in arrays)
        assert found == plan.keep(rate)
