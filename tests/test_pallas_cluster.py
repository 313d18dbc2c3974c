"""The kernel whose clusters share a contraction: what a thread holds, simulated; lowering; and, on a GPU, numbers."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.pallas_cases import lowered_for_nvidia, random_case, relative
from uniql_jax.pallas_kernels import compat
from uniql_jax.pallas_kernels.dequant_matmul import tiling
from uniql_jax.pallas_kernels.dequant_matmul.hopper import cluster, common
from uniql_jax.pallas_kernels.dequant_matmul.hopper.cluster import Settings
from uniql_jax.pallas_kernels.dequant_matmul.hopper.handover import Handover
from uniql_jax.pallas_kernels.dequant_matmul.tiling import Weight

ROUNDING = 4e-3
"""Relative error: the output is rounded to bf16, and so are folded weights."""
LANES = np.arange(32)


def test_a_warp_multiplies_words_as_they_lie(rng: np.random.Generator) -> None:
    """m16n8k16: lane 4 r + t holds rows r and r + 8 of A and row r of x, columns 2 t, 2 t + 1 and 8 further on."""
    case = random_case(rng, 16, 128, 128)
    words = np.asarray(tiling.tile(case.data, "last"))[0, 0].view(np.uint32)
    codes = np.rint(case.dense / np.asarray(case.scale).astype(np.float64))
    x = rng.integers(-3, 4, (8, 128)).astype(np.float64)
    # As TMA lays out a column of x, eights of rows by lines of 32: [line, row, 32]; a thread reads 8 at 8 * lane.
    lines = x.reshape(8, 4, 32).swapaxes(0, 1).reshape(4, 32, 8)
    total = np.zeros((16, 8))
    for i, half in itertools.product(range(4), (0, 1)):
        a, b = np.zeros((16, 16)), np.zeros((16, 8))
        for late_k, e in itertools.product((0, 1), (0, 1)):
            column, pair = 2 * (LANES % 4) + e + 8 * late_k, 2 * half + late_k
            for late in (0, 1):
                code = words[late, :, i] >> np.uint32(4 * pair + 16 * e) & np.uint32(15)
                a[LANES // 4 + 8 * late, column] = code.astype(np.int64) - 8
            b[column, LANES // 4] = lines[i, LANES, 2 * pair + e]
        total += a @ b
    np.testing.assert_array_equal(total, codes @ x.T)


@pytest.mark.parametrize("over", [Handover(2, 4, 1, 1, 2, 1), Handover(4, 2, 2, 3, 1, 2), Handover(8, 1, 4, 1, 8, 1)])
def test_each_result_is_found_where_its_parts_were_sent(over: Handover) -> None:
    """`_sent` puts what lane, element e of a 16-row tile's column holds at 4 * lane + e; `_added_up` reads it there."""
    sent = {}
    for unit in range(over.cluster * over.units):
        owner, slot = unit % over.cluster, unit // over.cluster
        for column, lane, e in itertools.product(range(over.columns), range(32), range(4)):
            row, m = 16 * unit + lane // 4 + 8 * (e // 2), 8 * column + 2 * (lane % 4) + e % 2
            sent[owner, (slot * over.columns + column) * 128 + 4 * lane + e] = row, m
    read = {}
    for owner, number in itertools.product(range(over.cluster), range(over.units * over.columns * 128)):
        late, row, m, column = number >> 3 & 1, number & 7, number >> 4 & 7, number >> 7
        held = column * 128 + row * 16 + (m >> 1 & 3) * 4 + late * 2 + (m & 1)
        unit, column = divmod(column, over.columns)
        read[owner, held] = 16 * (owner + unit * over.cluster) + 8 * late + row, 8 * column + m
    assert read == sent
    assert len(read) * 4 * over.sources == over.cluster * over.bytes
    assert sorted(read.values()) == list(
        itertools.product(range(64 * over.tall * over.along_n), range(8 * over.columns))
    )


def test_plans(on_hopper: None) -> None:
    weight = Weight("groups", 4096, 112, 128)
    plan = cluster.plan_of(16, weight, Settings(programs=132))
    assert (plan.tiles, plan.rows, plan.per_share, plan.clusters, plan.columns) == (64, 64, 56, 64, 2)
    assert plan.handover == Handover(2, 4, 1, 1, 2, buffers=1)
    wide = cluster.plan_of(5, Weight("rows", 28672, 32, 128), Settings(cluster=4, tall=3, programs=132))
    assert (wide.tiles, wide.clusters, wide.columns, wide.handover.buffers) == (150, 30, 1, 2)


def test_clusters_of_more_than_two_do_not_fit_everywhere() -> None:
    assert [common.fitting(132, size) for size in (2, 4, 8)] == [66, 30, 15]


def test_what_is_refused(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = Weight("rows", 4096, 32, 128)
    for other, settings, count, message in (
        (Weight("last", 4096, 32, 128), Settings(), 8, "only tiles"),
        (Weight("rows", 4096, 32, 64), Settings(), 8, "only tiles"),
        (weight, Settings(), 0, "rows of x"),
        (weight, Settings(), 65, "rows of x"),
        (weight, Settings(cluster=3), 8, "cannot share"),
        (weight, Settings(cluster=8), 8, "cannot share"),  # four sixteens of rows
        (weight, Settings(along_k=1), 8, "warpgroups"),
        (weight, Settings(slots=6), 8, "6 slots"),
        (weight, Settings(slots=36), 8, "36 slots"),
        (weight, Settings(slots=16), 64, "shared memory"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            cluster.supported(other, settings, count)
    cluster.supported(weight, Settings(), 64)
    monkeypatch.setattr(compat, "capability", lambda: 10.0)
    with pytest.raises(NotImplementedError, match="Hopper"):
        cluster.supported(weight, Settings(), 8)


LOWERED = [
    # layout, features, groups, rows of x, settings
    ("groups", 4096, 112, 8, Settings(programs=132)),
    ("rows", 1001, 5, 13, Settings(cluster=4, tall=2, along_k=2, along_n=2, slots=4, programs=8)),
    ("rows", 500, 3, 64, Settings(along_k=2, slots=6, folded=True, programs=4)),
    ("groups", 72, 9, 1, Settings(cluster=8, tall=2, programs=132)),
]


@pytest.mark.parametrize(("layout", "features", "groups", "count", "settings"), LOWERED, ids=str)
def test_it_lowers_for_hopper(
    on_hopper: None, layout: str, features: int, groups: int, count: int, settings: Settings
) -> None:
    lowered = lowered_for_nvidia(cluster.product, Weight(layout, features, groups, 128), count, settings)
    assert lowered.out_info.shape == (1, count, features)
    assert lowered.out_info.dtype == jnp.bfloat16
    assert lowered.as_text().count("mosaic_gpu_v2") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["rows", "groups"])
@pytest.mark.parametrize(
    ("features", "groups", "settings"),
    [
        (128, 4, Settings()),
        (1001, 5, Settings(cluster=4, tall=2, slots=4)),
        (1001, 21, Settings(slots=12)),
        (1480, 9, Settings(cluster=4, tall=2, slots=4, programs=8)),  # several tiles a cluster
        (1480, 9, Settings(along_k=2, slots=4, folded=True, programs=4)),
        (1000, 20, Settings(cluster=8, tall=2)),
        (1000, 20, Settings(cluster=4, along_k=2, along_n=2, slots=4)),
        (1001, 7, Settings(cluster=8, along_k=1, along_n=4, slots=4, folded=True)),
        (72, 3, Settings(tall=3)),
        (2000, 112, Settings(along_k=2, slots=6)),
    ],
    ids=str,
)
def test_on_the_device(rng: np.random.Generator, layout: str, features: int, groups: int, settings: Settings) -> None:
    if compat.capability() != 9.0:
        pytest.skip("not a Hopper GPU")
    case = random_case(rng, features, groups * 128, 128, contract=tiling.CONTRACTS[layout])
    data, weight = tiling.tile(case.data, case.contract), Weight(layout, features, groups, 128)
    call = jax.jit(lambda x, d, s: cluster.product(x, d, s, weight=weight, settings=settings))
    for count in (5, 16, 24):
        x = jnp.asarray(rng.normal(size=(count, case.width)), jnp.bfloat16)
        want = np.asarray(x).astype(np.float64) @ case.dense.T
        for _ in range(3):  # what a program left to the next one must not matter
            got = call(x, data, case.scale)
            assert got.shape == (1, count, features)
            assert relative(got[0].astype(jnp.float32), want) < ROUNDING, count
