"""The kernels behind the GPU's product, one by one: tiles, mma, dot, dequantize."""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.pallas_cases import Case, nvidia, random_case, relative
from uniql_jax.pallas_kernels import compat
from uniql_jax.pallas_kernels.dequant_matmul import (
    dequant_matmul,
    dequantize,
    dot,
    mma,
    selfcheck,
    shares,
    tiling,
    tuned,
)
from uniql_jax.pallas_kernels.dequant_matmul.hopper import cuts
from uniql_jax.pallas_kernels.dequant_matmul.tiling import Weight

ROUNDING = 4e-3
"""Relative error: bf16's output alone rounds by up to 2e-3, and where weights are scaled in bf16 they do, too."""


def held(case: Case, layout: str) -> tuple[jnp.ndarray, Weight]:
    """The data of a case in one of the four layouts, and its static description."""
    groups, features = -(-case.width // case.group), case.dense.shape[0]
    data = case.data if layout == case.contract else tiling.tile(case.data, case.contract)
    return data, Weight(layout, features, groups, case.group)


def contract_of(layout: str) -> str:
    return tiling.CONTRACTS.get(layout, layout)


def random_x(rng: np.random.Generator, count: int, width: int) -> jnp.ndarray:
    return jnp.asarray(rng.normal(size=(count, width)), jnp.bfloat16)


def agrees(parts: jnp.ndarray, x: jnp.ndarray, case: Case) -> bool:
    want = np.asarray(x).astype(np.float64) @ case.dense.T
    got = parts.astype(jnp.float32).sum(0) if parts.ndim == 3 else parts
    assert got.shape == want.shape
    return relative(got, want) < ROUNDING


# --- tiles ----------------------------------------------------------------------------------------------------------


@examples(max_examples=5)
@given(data=st.data())
def test_tiles_and_prefixes_commute(data: st.DataObject) -> None:
    """Bit for bit: tile then untile is nothing; tile then cut is cut then tile; a cut is the first bytes."""
    contract = data.draw(st.sampled_from(["last", "first"]), "contract")
    rows, groups = data.draw(st.integers(1, 70), "rows"), data.draw(st.integers(1, 4), "groups")
    numbers = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    words = numbers.integers(-(2**31), 2**31, (rows, 16 * groups)).astype(np.int32)
    plain = words if contract == "last" else words.T
    tiles = np.asarray(tiling.tile(plain, contract))
    np.testing.assert_array_equal(tiling.tile(jnp.asarray(plain), contract), tiles)
    np.testing.assert_array_equal(tiling.untile(jnp.asarray(tiles), contract, rows), plain)
    by_row = np.asarray(tiling.by_row(jnp.asarray(tiles)))
    # The p-th word of a row of a tile, as dot.py and dequantize.py read it.
    n, group, p = rows - 1, groups - 1, data.draw(st.integers(0, 15), "position")
    major = (n // 16, group) if contract == "last" else (group, n // 16)
    assert by_row[(*major, n % 16, p)] == words[n, 16 * group + 4 * (p % 4) + p // 4]
    if contract == "last":
        count = data.draw(st.integers(1, rows), "count")
        cut, kept = plain[:count], count
    else:
        count = 128 * data.draw(st.integers(1, groups), "kept groups")
        cut, kept = plain[: count // 8], rows
    part = np.asarray(tiling.take_prefix(jnp.asarray(tiles), contract, count))
    np.testing.assert_array_equal(tiling.untile(jnp.asarray(part), contract, kept), cut)
    assert tiles.tobytes().startswith(part.tobytes())


def test_tiles_that_do_not_fit_are_refused(rng: np.random.Generator) -> None:
    case = random_case(rng, 20, 256, 128)
    tiles = tiling.tile(case.data, "last")
    options = case.options | dict(layout="rows")
    x = random_x(rng, 2, 256)
    np.testing.assert_array_equal(
        dequant_matmul(x, tiles, case.scale, **options), dequant_matmul(x, case.data, case.scale, **case.options)
    )
    for change, message in (
        (dict(layout="groups"), "tiles 'groups' do not hold"),
        (dict(group=64), "groups of 64"),
        (dict(scale=case.scale[:16]), "do not hold 16 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            dequant_matmul(**(dict(x=x, data=tiles, scale=case.scale) | options | change))
    with pytest.raises(NotImplementedError, match="whole groups of 128"):
        tiling.tile(case.data[:, :8], "last")
    with pytest.raises(ValueError, match="splits a quantization group"):
        tiling.take_prefix(tiling.tile(case.data.T, "first"), "first", 100)


# --- the kernels, interpreted ---------------------------------------------------------------------------------------

MMA = [
    # layout, features, groups, group, rows of x, settings
    ("rows", 27, 2, 128, 8, mma.Settings(along_k=1, along_n=2, zero="mma", gate=True, stream=True)),
    ("rows", 50, 3, 128, 11, mma.Settings(along_k=2, tiles=2, ordered=True)),
    ("groups", 18, 3, 128, 5, mma.Settings(along_k=1, split=2, ordered=True)),
    ("first", 36, 2, 144, 9, mma.Settings(along_k=1, ordered=True)),
]


@pytest.mark.parametrize(("layout", "features", "groups", "group", "count", "settings"), MMA, ids=str)
def test_mma(
    rng: np.random.Generator, layout: str, features: int, groups: int, group: int, count: int, settings
) -> None:
    case = random_case(rng, features, groups * group, group, contract=contract_of(layout))
    data, weight = held(case, layout)
    x = random_x(rng, count, case.width)
    parts = jax.jit(lambda x, d, s: mma.product(x, d, s, weight=weight, settings=settings))(x, data, case.scale)
    assert parts.shape == (settings.split, count, features)
    assert agrees(parts, x, case)


def test_loads_in_every_way_at_once(rng: np.random.Generator) -> None:
    case = random_case(rng, 20, 5 * 128, 128)
    data, weight = held(case, "rows")
    x = random_x(rng, 3, case.width)
    cut = mma.Settings(along_k=1, batch=2, split=2, ordered=True, stream=True, gate=True)
    found = jax.jit(lambda x, d, s: mma.product(x, d, s, weight=weight, settings=cut))(x, data, case.scale)
    assert agrees(found, x, case)


def test_shares_are_added_in_their_order() -> None:
    """In float32, where another order gives other numbers; counts are zero again."""
    numbers = jnp.asarray([[1e8], [1.0], [-1e8], [3.0]], jnp.float32)

    def kernel(x_ref, counts_in_ref, out_ref, counts_ref, parts_ref):
        share = compat.pl.program_id(1)
        refs, where = (parts_ref, counts_ref), (share, compat.pl.program_id(0))

        def finish(total: jnp.ndarray) -> None:
            out_ref[...] = total

        shares.add_up_shares(x_ref[share], jnp.ones(1, bool), refs, where, 4, finish)

    shapes = [jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)]
    call = compat.call(
        kernel, name="add_up", grid=(1, 4), out_shape=[*shapes, shares.parts_shape(4, 1, (1,))], aliases={1: 1}
    )
    total, counts, parts = call(numbers, jnp.zeros(2, jnp.int32))
    np.testing.assert_array_equal(parts[:, 0], numbers)
    np.testing.assert_array_equal(total, functools.reduce(np.add, np.asarray(numbers)))
    assert not counts.any()


def test_mma_refuses(rng: np.random.Generator) -> None:
    for weight, settings, count in (
        (Weight("rows", 16, 1, 128), mma.Settings(), 17),
        (Weight("first", 18, 1, 128), mma.Settings(), 1),
        (Weight("last", 16, 1, 112), mma.Settings(), 1),
        (Weight("rows", 16, 1, 128), mma.Settings(along_k=3), 1),
    ):
        with pytest.raises(NotImplementedError):
            mma.supported(weight, settings, count)


DOT = [
    ("first", 36, 3, 144, 19, dot.Settings(32, 16, split=2)),
    ("rows", 50, 2, 128, 33, dot.Settings(32, 16, fold=True, join=8, rows_inner=True)),
    ("groups", 21, 3, 128, 5, dot.Settings(16, 16, split=2, join=2)),
]


@pytest.mark.parametrize(("layout", "features", "groups", "group", "count", "settings"), DOT, ids=str)
def test_dot(
    rng: np.random.Generator, layout: str, features: int, groups: int, group: int, count: int, settings
) -> None:
    case = random_case(rng, features, groups * group, group, contract=contract_of(layout))
    data, weight = held(case, layout)
    x = random_x(rng, count, case.width)
    parts = jax.jit(lambda x, d, s: dot.product(x, d, s, weight=weight, settings=settings))(x, data, case.scale)
    assert parts.shape == (settings.split, count, features)
    assert agrees(parts, x, case)


@pytest.mark.parametrize("layout", ["rows", "groups"])
def test_dequantizing_is_exact(rng: np.random.Generator, layout: str) -> None:
    """Integer times scale, rounded to bf16 once."""
    case = random_case(rng, 37, 3 * 128, 128, contract=contract_of(layout))
    data, weight = held(case, layout)
    got = jax.jit(lambda d, s: dequantize.dense(d, s, weight, dequantize.Settings(2)))(data, case.scale)
    np.testing.assert_array_equal(got, jnp.asarray(case.dense, jnp.float32).astype(jnp.bfloat16))
    with pytest.raises(NotImplementedError):
        dequantize.supported(Weight("last", 37, 3, 128))


def test_the_product_takes_tiles(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A padded last group, many rows, and the reference's gradient."""
    monkeypatch.setattr(tuned, "MOST_DOT", dict.fromkeys(tuned.MOST_DOT, 16))
    monkeypatch.setattr(cuts, "choice", lambda *_: None)
    case = random_case(rng, 30, 300, 128, contract="first")
    tiles, _ = held(case, "groups")
    x, options = random_x(rng, 18, 300), case.options | dict(layout="groups")

    def product(x: jnp.ndarray, implementation: str) -> jnp.ndarray:
        return dequant_matmul(x, tiles, case.scale, implementation=implementation, **options)

    pulls = {}
    for name in ("pallas", "reference"):
        y, pulls[name] = jax.vjp(jax.jit(lambda x, name=name: product(x, name)), x)
        assert agrees(y, x, case)
    cotangent = random_x(rng, 18, 30)
    np.testing.assert_array_equal(pulls["pallas"](cotangent)[0], pulls["reference"](cotangent)[0])


# --- for GPUs -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("layout", ["last", "first", "rows", "groups"])
def test_on_the_device(rng: np.random.Generator, layout: str) -> None:
    """The compiled kernels: each passes its own check, and what runs by default is right for any number of rows."""
    kernels = ("mma", "dot", "dequantize") if layout in tiling.CONTRACTS else ("mma", "dot")
    if layout in tiling.CONTRACTS and compat.hopper():
        kernels = (*kernels, "wgmma")
    for kernel in kernels:
        jax.jit(lambda x, kernel=kernel: (selfcheck.verify(kernel, layout), x)[1]).lower(jnp.zeros(1))
    for features, width in ((1000, 4096), (9000, 1000)):
        case = random_case(rng, features, width, 128, contract=contract_of(layout))
        data, _ = held(case, layout)
        name = layout if layout in tiling.CONTRACTS else "plain"
        call = jax.jit(lambda x, d, s, case=case, name=name: dequant_matmul(x, d, s, **case.options, layout=name))
        for count in (1, 7, 16, 17, 64, 200, 300):
            x = random_x(rng, count, width)
            assert agrees(call(x, data, case.scale), x, case), (layout, features, count)


@pytest.mark.parametrize(
    ("kind", "version", "capability", "able"),
    [
        ("NVIDIA H100", "PJRT C API\ncuda 13000", "9.0", True),
        ("Tesla T4", "PJRT C API\ncuda 12090", "7.5", False),
        ("AMD Instinct MI300X", "PJRT C API\nrocm 70000", "9.4", False),
        ("NVIDIA H100", "PJRT C API\ncuda 13000", "", False),
    ],
)
def test_only_gpus_with_bf16_tensor_cores(
    monkeypatch: pytest.MonkeyPatch, kind: str, version: str, capability: str, able: bool
) -> None:
    client = types.SimpleNamespace(platform_version=version)
    device = types.SimpleNamespace(platform="gpu", device_kind=kind, client=client, compute_capability=capability)
    monkeypatch.setattr(compat.jax, "devices", lambda: [device])
    assert compat.ampere() is able


def test_tiles_of_x_fit_a_consumer_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = Weight("rows", 4096, 32, 128)
    for capability, tile_m in ((9.0, 128), (8.9, 64), (8.7, 128), (12.0, 64)):
        monkeypatch.setattr(compat, "capability", lambda capability=capability: capability)
        assert tuned.by_rule(weight, 200)[1].tile_m == tile_m


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("layout", ["rows", "groups"])
@pytest.mark.parametrize("count", [1, 16, 64, 600])
def test_tiles_lower_for_nvidia_gpus(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, layout: str, count: int
) -> None:
    pytest.importorskip("jax.experimental.pallas.triton")
    monkeypatch.setattr(compat, "interpreted", lambda: False)
    monkeypatch.setattr(compat, "capability", lambda: 8.0)
    case = random_case(rng, 100, 512, 128, contract=contract_of(layout))
    data, _ = held(case, layout)
    call = jax.jit(lambda x, d, s: dequant_matmul(x, d, s, implementation="pallas", **case.options, layout=layout))
    x = random_x(rng, count, 512)
    with nvidia():
        lowered = call.trace(x, data, case.scale).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("xla.gpu.triton") == 1
