"""Two models on the same items: how much one differs from the other, and whether that may be chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped
from scipy.stats import binomtest

Z95 = 1.959964
"""Standard errors from the mean to either end of a 95 % interval."""


def compare(values: Shaped[np.ndarray, " _"], reference: Shaped[np.ndarray, " _"]) -> dict[str, Any]:
    """The mean difference of paired results, its 95 % interval, and McNemar's exact test.

    Pairing removes what makes an item hard for both models, so the interval is far narrower than that of two separate
    standard errors.

    Args:
        values: a number for every item, such as 1 for a right answer and 0 for a wrong one.
        reference: the same of the other model, item by item.

    Returns:
        {"difference": mean of values - reference, "low", "high": normal approximation, "better", "worse": items whose
        number rose or fell, "p_value": two-sided exact probability of so uneven a split of these if either were as
        likely (for right or wrong answers this is McNemar's exact test, otherwise the sign test)}.

    Raises:
        ValueError: not the same number of items, or none.
    """
    values, reference = np.asarray(values, np.float64), np.asarray(reference, np.float64)
    if values.shape != reference.shape or values.ndim != 1 or not len(values):
        raise ValueError(f"paired results of {values.shape} and {reference.shape} items")
    change = values - reference
    mean, count = float(change.mean()), len(change)
    error = float(change.std(ddof=1)) / math.sqrt(count) if count > 1 else math.inf
    better, worse = int((change > 0).sum()), int((change < 0).sum())
    p_value = float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
    found = {"difference": mean, "better": better, "worse": worse, "p_value": p_value}
    return found | ({"low": mean - Z95 * error, "high": mean + Z95 * error} if count > 1 else {})


def mean_of_tasks(
    values: Sequence[Shaped[np.ndarray, " _"]], reference: Sequence[Shaped[np.ndarray, " _"]]
) -> dict[str, float]:
    """The mean over tasks and its ratio to the reference's, with 95 % intervals from paired items.

    The ratio's interval is that of its linear approximation (the delta method): a task's items vary, tasks are fixed.

    Args:
        values: per task, a number for every item.
        reference: the same of the other model.

    Returns:
        {"mean", "reference", "ratio", "ratio_low", "ratio_high"}.
    """
    count = len(values)
    mean = sum(float(np.mean(one)) for one in values) / count
    base = sum(float(np.mean(one)) for one in reference) / count
    ratio = mean / base if base else math.nan
    spread = 0.0
    for one, other in zip(values, reference, strict=True):
        residual = np.asarray(one, np.float64) - ratio * np.asarray(other, np.float64)
        spread += float(residual.var(ddof=1)) / len(residual)
    error = Z95 * math.sqrt(spread) / (count * base) if base else math.nan
    return {
        "mean": mean, "reference": base, "ratio": ratio, "ratio_low": ratio - error, "ratio_high": ratio + error,
    }  # fmt: skip
