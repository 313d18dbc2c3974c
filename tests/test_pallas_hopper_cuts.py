"""The rule that cuts Hopper's kernels: it gives the times that were recorded, and picks what was about the fastest."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from uniql_jax.pallas_kernels.dequant_matmul import tuned
from uniql_jax.pallas_kernels.dequant_matmul.hopper import cuts
from uniql_jax.pallas_kernels.dequant_matmul.tiling import Weight

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


pytestmark = pytest.mark.usefixtures("on_hopper")


@dataclasses.dataclass
class Comparison:
    """What the record says of a rule."""

    off: list[float]
    """Of each recorded time: by what share the rule's is longer or shorter."""
    slower: list[float]
    """Of each shape and number of rows that the rule does not leave to the other kernel: its pick's over the least."""


ALIKE: dict[str, dict[str, Any]] = {
    "wgmma": dict(x_slots=4, word_slots=4, cluster=1),
    "cluster": dict(slots=8, folded=False),
}
"""Settings that a rule does not look at: cuts that differ in these alone are one to it, and the least of their times
counts."""


def recorded(kernel: str) -> dict[tuple[int, int, int], dict[Any, float]]:
    """(k, n, rows of x) -> cut -> microseconds."""
    times: dict[tuple[int, int, int], dict[Any, float]] = {}
    for row in json.loads((RESULTS / "kernels-h100.json").read_text())["rows"]:
        if row["kernel"] != kernel or "net_us" not in row or row["count"] < cuts.LEAST:
            continue
        cut = tuned.SETTINGS[kernel](**{key: value for key, value in row["settings"].items() if key != "order"})
        cut = dataclasses.replace(cut, **ALIKE[kernel])
        of_shape = times.setdefault((row["k"], row["n"], row["count"]), {})
        of_shape[cut] = min(row["net_us"], of_shape.get(cut, row["net_us"]))
    return times


def compare(kernel: str, us: Callable[..., float], pick: Callable[..., Any]) -> Comparison:
    found = Comparison([], [])
    for (k, n, count), of_shape in recorded(kernel).items():
        weight = Weight("rows", n, k // 128, 128)
        for cut, least in of_shape.items():
            with contextlib.suppress(LookupError):  # a tile that the rule leaves out
                found.off.append(us(weight, count, cut) / least - 1)
        cut = dataclasses.replace(pick(weight, count), **ALIKE[kernel])
        taken = cuts.choice(weight, count)
        if cut in of_shape and (taken is None or taken[0] == kernel):
            found.slower.append(of_shape[cut] / min(of_shape.values()))
    return found


def test_wgmma() -> None:
    found = compare("wgmma", cuts.wgmma_us, cuts.wgmma_cut)
    assert len(found.off) >= 66
    assert len(found.slower) >= 21
    assert np.mean(np.abs(found.off)) < 0.05
    assert max(np.abs(found.off)) < 0.15
    assert np.mean(found.slower) < 1.02
    assert max(found.slower) < 1.1


def test_cluster() -> None:
    found = compare("cluster", cuts.cluster_us, cuts.cluster_cut)
    assert len(found.off) >= 36
    assert len(found.slower) >= 13
    assert np.mean(np.abs(found.off)) < 0.1
    assert np.mean(found.slower) < 1.05
    assert max(found.slower) < 1.2


def test_it_chooses_the_faster_of_both() -> None:
    both = {kernel: recorded(kernel) for kernel in ALIKE}
    slower = []
    for shape in both["wgmma"].keys() & both["cluster"].keys():
        k, n, count = shape
        found = cuts.choice(Weight("rows", n, k // 128, 128), count)
        assert found is not None
        taken = both[found[0]][shape].get(dataclasses.replace(found[1], **ALIKE[found[0]]))
        if taken is not None:
            slower.append(taken / min(us for times in both.values() for us in times[shape].values()))
    assert len(slower) >= 5
    assert max(slower) < 1.1


@pytest.mark.parametrize("layout", ["rows", "groups"])
@pytest.mark.parametrize("count", [5, 8, 16, 17, 40, 64, 65, 128, 1000])
@pytest.mark.parametrize(("features", "groups"), [(64, 1), (576, 9), (4096, 32), (6144, 32), (4096, 91)])
def test_whatever_it_chooses_can_run(layout: str, count: int, features: int, groups: int) -> None:
    weight = Weight(layout, features, groups, 128)
    found = cuts.choice(weight, count)
    assert found is not None
    kernel, cut = found
    tuned.HOPPER[kernel].supported(weight, cut, count)


def test_what_it_leaves_to_others() -> None:
    for features, count in ((4096, 1), (4096, 4), (28672, 16), (128256, 32)):
        assert cuts.choice(Weight("rows", features, 32, 128), count) is None
