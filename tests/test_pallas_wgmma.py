"""Hopper's kernel: what each thread holds, simulated; lowering; and, on a GPU, numbers."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests.pallas_cases import Case, lowered_for_nvidia, nvidia, random_case, relative
from uniql_jax.pallas_kernels import compat
from uniql_jax.pallas_kernels.dequant_matmul import dequant_matmul, tiling
from uniql_jax.pallas_kernels.dequant_matmul.hopper import common, wgmma, wgmma_registers
from uniql_jax.pallas_kernels.dequant_matmul.hopper.handover import Handover
from uniql_jax.pallas_kernels.dequant_matmul.hopper.wgmma import Settings
from uniql_jax.pallas_kernels.dequant_matmul.tiling import Weight

ROUNDING = 4e-3
"""Relative error: weights are scaled in bf16, which rounds by up to 2e-3, and so is the output."""
LANES = np.arange(32)


def exchanged(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`_exchanged` for the 32 lanes of a warp, in numpy."""
    there, back, keep = (np.array(each, np.uint64)[LANES % 2] for each in wgmma_registers.ODD)
    keep = keep.astype(np.uint32)

    def rotated(word: np.ndarray, by: np.ndarray) -> np.ndarray:
        wide = word.astype(np.uint64)
        return ((wide << by | wide >> np.uint64(32) - by) & np.uint64(0xFFFFFFFF)).astype(np.uint32)

    def chosen(kept: np.ndarray, other: np.ndarray) -> np.ndarray:
        return (kept & keep) | (other & ~keep)

    def bytes_of(a: np.ndarray, b: np.ndarray, number: int) -> np.ndarray:
        both = np.stack([a, b], axis=1).view(np.uint8).reshape(32, 8)
        selectors = np.array(wgmma_registers.UPPER[number])[LANES // 2 % 2]
        picked = [both[LANES, selectors >> 4 * i & 7] for i in range(4)]
        return np.ascontiguousarray(np.stack(picked, axis=1)).view(np.uint32)[:, 0]

    other = chosen(rotated(second, back), first)[LANES ^ 1]
    first, second = chosen(first, rotated(other, there)), chosen(second, other)
    other = bytes_of(first, second, 0)[LANES ^ 2]
    return bytes_of(first, other, 1), bytes_of(second, other, 2)


def multiplied(tile: np.ndarray, x: np.ndarray, exchange: bool) -> np.ndarray:
    """A tile [2, 32, 4] of words times a group of x [count, 128], by the fragments of m16n8k16, which wgmma's are too.

    Lane 4 r + t holds, of A [16, 16], rows r and r + 8, columns 2 t, 2 t + 1 and 8 further on; B [16, n] is x as it
    lies in shared memory, 16 columns a step.
    """
    words = tile.view(np.uint32)
    total = np.zeros((16, x.shape[0]))
    for i, s in itertools.product(range(4), range(2)):
        pair = slice(i // 2 * 2, i // 2 * 2 + 2)
        held = [exchanged(*words[late, :, pair].T)[i % 2] if exchange else words[late, :, i] for late in (0, 1)]
        a = np.zeros((16, 16))
        for j, late, e in itertools.product((0, 1), (0, 1), (0, 1)):
            codes = held[late] >> np.uint32(4 * (2 * s + j) + 16 * e) & np.uint32(15)
            a[LANES // 4 + 8 * late, 2 * (LANES % 4) + e + 8 * j] = codes.astype(np.int64) - 8
        step = 2 * i + s
        total += a @ x[:, 16 * step : 16 * step + 16].T
    return total


@pytest.mark.parametrize("exchange", [True, False])
def test_registers_are_the_fragments_of_wgmma(rng: np.random.Generator, exchange: bool) -> None:
    case = random_case(rng, 16, 128, 128)
    tile = np.asarray(tiling.tile(case.data, "last"))[0, 0]
    codes = np.rint(case.dense / np.asarray(case.scale).astype(np.float64))
    x = rng.integers(-3, 4, (5, 128)).astype(np.float32)
    seen = x if exchange else np.asarray(wgmma.arrange(jnp.asarray(x)))
    np.testing.assert_array_equal(multiplied(tile, seen, exchange), codes @ x.T)


def test_unpacking_rounds_once() -> None:
    """What `weights` adds up is exact, for scales of every mantissa, sign and all exponents it promises, and zero."""
    factors = [np.uint16(of & 0xFFFF).view(ml_dtypes.bfloat16).astype(np.float64) for of in common.UNSCALED]
    bits = np.arange(2**16, dtype=np.uint16)
    numbers = bits[bits & 0x7F80 < 0x7F80].view(ml_dtypes.bfloat16)
    size = np.abs(numbers.astype(np.float64))
    scales = numbers[(size == 0) | ((size >= 2.0 ** (common.LIFT - 126)) & (size < 2.0**27))]
    even, odd, centre = (
        (scales.astype(np.float64) * factor).astype(ml_dtypes.bfloat16).astype(np.float64) for factor in factors
    )
    for code in range(16):
        want = (code - 8) * scales.astype(np.float64) * 2.0**-common.LIFT
        for place, factor in ((0, even), (4, odd)):
            raw = np.uint16(code << place).view(ml_dtypes.bfloat16).astype(np.float64)
            np.testing.assert_array_equal(raw * factor + centre, want)
            assert np.all(np.abs(want[want != 0]) >= 2.0**-126)


def test_plans_cover_every_tile() -> None:
    settings = Settings(tile_m=128, cluster=2, split=3, programs=132)
    plan = wgmma.plan_of(1000, Weight("rows", 4100, 32, 128), settings)
    assert plan == (8, 17, 11, 66, 128, None)
    assert plan.tiles == 8 * 17
    joined = wgmma.plan_of(100, Weight("rows", 6144, 32, 128), Settings(split=4, joined=True, programs=132))
    assert joined[:5] == (1, 48, 8, 30, 128)
    assert joined.handover == Handover(4, 1, 2, 1, 16, buffers=2)
    few = wgmma.plan_of(64, Weight("rows", 72, 3, 128), dataclasses.replace(settings, split=1))
    assert few.clusters == 1


@pytest.mark.parametrize("consumers", [2, 3, 4])
def test_registers_are_those_of_the_launch(consumers: int) -> None:
    """A thread cannot take what no other gave back: the warpgroup that asks would wait for ever."""
    copying, multiplying = common.registers_of(consumers)
    given = 65536 // (128 * (consumers + 1)) // 8 * 8
    assert copying % 8 == multiplying % 8 == 0
    assert copying <= given <= multiplying
    assert copying + consumers * multiplying <= (consumers + 1) * given
    assert multiplying >= 104


def test_what_is_refused(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = Weight("rows", 4096, 32, 128)
    for other, settings, message in (
        (Weight("last", 4096, 32, 128), Settings(), "only tiles"),
        (Weight("rows", 4096, 32, 64), Settings(), "only tiles"),
        (weight, Settings(tile_m=96), "a tile of 96"),
        (weight, Settings(tile_m=32), "a tile of 32"),
        (weight, Settings(tile_m=256, tall=2), "2 blocks"),
        (weight, Settings(tile_m=256, x_slots=8), "shared memory"),
        (weight, Settings(consumers=5), "5 warpgroups"),
        (weight, Settings(joined=True), "cluster of 1"),
        (weight, Settings(joined=True, split=2, cluster=2), "cluster of 2"),
        (weight, Settings(joined=True, split=2, tile_m=256), "shared memory"),
        (weight, Settings(along_k=2), "in turn"),
        (weight, Settings(joined=True, split=2, along_k=2, x_slots=6), "in turn"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            wgmma.supported(other, settings)
    wgmma.supported(weight)
    monkeypatch.setattr(compat, "capability", lambda: 10.0)
    with pytest.raises(NotImplementedError, match="Hopper"):
        wgmma.supported(weight)


LOWERED = [
    # layout, features, groups, rows of x, settings
    ("rows", 512, 4, 64, Settings(tile_m=64, programs=4)),
    ("groups", 1001, 5, 301, Settings(tile_m=256, cluster=2, programs=4)),
    ("rows", 72, 3, 100, Settings(tile_m=128, tall=2, split=2, exchange=False, programs=132)),
    ("groups", 520, 8, 5, Settings(tile_m=64, split=4, consumers=4, x_slots=8, word_slots=4, programs=132)),
    ("groups", 512, 8, 16, Settings(tile_m=64, split=2, joined=True, x_slots=8, programs=132)),
    ("rows", 1001, 9, 100, Settings(tile_m=64, split=4, joined=True, consumers=4, along_k=2, programs=8)),
    ("rows", 500, 4, 64, Settings(tile_m=64, consumers=3, x_slots=8, word_slots=6, programs=132)),
]


@pytest.mark.parametrize(("layout", "features", "groups", "count", "settings"), LOWERED, ids=str)
def test_it_lowers_for_hopper(
    on_hopper: None, layout: str, features: int, groups: int, count: int, settings: Settings
) -> None:
    lowered = lowered_for_nvidia(wgmma.product, Weight(layout, features, groups, 128), count, settings)
    parts = 1 if settings.joined else settings.split
    assert lowered.out_info.shape == (parts, count, features)
    assert lowered.out_info.dtype == (jnp.float32 if parts > 1 else jnp.bfloat16)
    assert lowered.as_text().count("mosaic_gpu_v2") == 1


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("layout", ["rows", "groups"])
@pytest.mark.parametrize(("count", "features"), [(20, 200), (256, 1000), (2048, 4096)])
def test_the_product_lowers_for_hopper(
    monkeypatch: pytest.MonkeyPatch, on_hopper: None, layout: str, count: int, features: int
) -> None:
    """The whole product, with a padded last group: alone, under vmap, and its gradient, which needs no kernel."""
    pytest.importorskip("jax.experimental.pallas.triton")
    monkeypatch.setattr(compat, "interpreted", lambda: False)
    width, groups, row_tiles = 500, 4, -(-features // 16)
    options = dict(bits=4, group=128, contract=tiling.CONTRACTS[layout], width=width, layout=layout)
    struct = jax.ShapeDtypeStruct
    data = struct((*((row_tiles, groups) if layout == "rows" else (groups, row_tiles)), 2, 32, 4), jnp.int32)
    scale = struct((features, groups) if layout == "rows" else (groups, features), jnp.bfloat16)

    def product(x: jnp.ndarray, data: jnp.ndarray, scale: jnp.ndarray) -> jnp.ndarray:
        return dequant_matmul(x, data, scale, implementation="pallas", **options)

    def loss(x: jnp.ndarray, data: jnp.ndarray, scale: jnp.ndarray) -> jnp.ndarray:
        return product(x, data, scale).astype(jnp.float32).sum()

    x, batch = struct((count, width), jnp.bfloat16), struct((3, count, width), jnp.bfloat16)
    for call, rows, shape, kernels in (
        (product, x, (count, features), 1),
        (jax.vmap(product, (0, None, None)), batch, (3, count, features), 1),
        (jax.grad(loss), x, (count, width), 0),
    ):
        with nvidia():
            lowered = jax.jit(call).trace(rows, data, scale).lower(lowering_platforms=("cuda",))
        assert lowered.out_info.shape == shape
        assert lowered.as_text().count("mosaic_gpu_v2") == kernels
        assert "triton" not in lowered.as_text()


def held(case: Case, layout: str) -> tuple[jnp.ndarray, Weight]:
    data = tiling.tile(case.data, case.contract)
    return data, Weight(layout, case.dense.shape[0], case.width // case.group, case.group)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["rows", "groups"])
@pytest.mark.parametrize(
    ("features", "groups", "settings"),
    [
        (256, 2, Settings(tile_m=64)),
        (1001, 5, Settings(tile_m=128, split=2)),
        (1001, 9, Settings(tile_m=256)),
        (1480, 9, Settings(tile_m=256, programs=3)),
        (1480, 9, Settings(tile_m=256, cluster=2)),
        (1100, 9, Settings(tile_m=256, cluster=2, programs=4)),  # a program without rows
        (1000, 5, Settings(tile_m=128, tall=2, x_slots=6)),
        (1000, 5, Settings(tile_m=64, x_slots=8, word_slots=8, split=7)),
        (72, 3, Settings(tile_m=128, exchange=False)),
        (1000, 20, Settings(tile_m=64, split=4, consumers=4, x_slots=8, word_slots=4)),
        (1001, 9, Settings(tile_m=64, split=2, joined=True)),
        (1001, 20, Settings(tile_m=128, split=4, joined=True, consumers=3, word_slots=3)),
        (1480, 21, Settings(tile_m=64, split=2, joined=True, consumers=4, along_k=2, programs=4)),  # several tiles
        (1480, 3, Settings(tile_m=64, split=4, joined=True, along_k=2, x_slots=8)),  # a share without groups
        (520, 33, Settings(tile_m=64, split=2, joined=True, consumers=4, along_k=4, x_slots=8)),
        (1000, 9, Settings(tile_m=64, consumers=3, x_slots=8, word_slots=6)),
        (520, 5, Settings(tile_m=64, consumers=4, split=2, x_slots=8, word_slots=6)),
    ],
    ids=str,
)
def test_on_the_device(rng: np.random.Generator, layout: str, features: int, groups: int, settings: Settings) -> None:
    if compat.capability() != 9.0:
        pytest.skip("not a Hopper GPU")
    case = random_case(rng, features, groups * 128, 128, contract=tiling.CONTRACTS[layout])
    data, weight = held(case, layout)
    call = jax.jit(lambda x, d, s: wgmma.product(x, d, s, weight=weight, settings=settings))
    for count in (5, 20, 64, 100, 513):
        x = jnp.asarray(rng.normal(size=(count, case.width)), jnp.bfloat16)
        parts = call(x, data, case.scale)
        assert parts.shape == (1 if settings.joined else settings.split, count, features)
        want = np.asarray(x).astype(np.float64) @ case.dense.T
        assert relative(parts.astype(jnp.float32).sum(0), want) < ROUNDING, count
