"""The kernels behind the GPU's product, one by one: tiles, mma, dot, dequantize, their table and their self-check."""

from __future__ import annotations

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.pallas_cases import Case, nvidia, random_case, relative
from uniql_jax.pallas_kernels import compat, dispatch
from uniql_jax.pallas_kernels.dequant_matmul import (
    api,
    dequant_matmul,
    dequantize,
    dot,
    mma,
    pallas,
    reference,
    selfcheck,
    shares,
    tiling,
    tuned,
)
from uniql_jax.pallas_kernels.dequant_matmul.hopper import cluster, common, cuts, wgmma
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


# --- which kernel runs ----------------------------------------------------------------------------------------------

H100 = "NVIDIA H100 80GB HBM3"


def test_every_shipped_table_says_where_it_is_from_and_can_run(on_hopper: None) -> None:
    paths = sorted(tuned.FOLDER.glob("*.json"))
    assert paths
    for path in paths:
        table = json.loads(path.read_text())
        assert {"gpu", "versions", "date", "command"} <= set(table)
        assert "/" not in table["gpu"] + table["date"]
        assert path == tuned.FOLDER / f"{tuned.slug(table['gpu'])}.json"
        firsts = set()
        for row in table["rows"]:
            weight = Weight(row["order"], row["n"], row["k"] // 128, 128)
            # Nearest to itself, and nothing declines; a second row of a shape stands behind the first.
            own = row["kernel"], tuned.SETTINGS[row["kernel"]](**row["settings"])
            found = tuned.choices(weight, row["count"], table["gpu"])
            first = (weight, row["count"]) not in firsts
            assert own in found[:1] if first else own in found[1:]
            firsts.add((weight, row["count"]))
            assert row["us"] > 0


def _chosen(weight: Weight, count: int, gpu: str) -> tuned.Choice:
    """The first choice."""
    return tuned.choices(weight, count, gpu)[0]


@pytest.mark.parametrize("layout", ["last", "first", "rows", "groups"])
@pytest.mark.parametrize("gpu", [H100, "an unknown GPU"])
@pytest.mark.parametrize("capability", [8.0, 9.0])
def test_every_size_has_a_kernel(layout: str, gpu: str, capability: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruned sizes too; few rows never meet a dense weight, and many always do where there is no wgmma."""
    monkeypatch.setattr(compat, "capability", lambda: capability)
    hopper = capability == 9.0 and layout in tiling.CONTRACTS and compat.mosaic_gpu is not None
    for features, groups in ((4096, 32), (128256, 32), (9001 if layout != "first" else 9000, 73), (64, 1)):
        weight = Weight(layout, features, groups, 128)
        for count in (1, 2, 8, 9, 16):
            few = ("mma", "dot", "cluster") if hopper and count > 1 else ("mma", "dot")
            assert _chosen(weight, count, gpu)[0] in few
        for count in (17, 64):
            some = ("wgmma", "cluster") if features <= 8192 else ("dot", "wgmma", "cluster")
            assert _chosen(weight, count, gpu)[0] in (some if hopper else ("dot",))
        for count in (100, 256):
            assert _chosen(weight, count, gpu)[0] in (("wgmma",) if hopper else ("dot", "dense", "dequantize"))
        for count in (257, 2048, 10**5):
            others = ("dense", "dequantize", "dot") if gpu == H100 else ("dense", "dequantize")
            assert _chosen(weight, count, gpu)[0] in (("wgmma",) if hopper else others)


def test_wgmma_is_for_tiles_of_hopper_alone(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = Weight("groups", 4096, 32, 128)
    for gpu in (H100, "an unknown GPU"):
        assert _chosen(weight, 2048, gpu)[0] == "wgmma"
        # Behind it stands what was best without it.
        behind = [kernel for kernel, _ in tuned.choices(weight, 2048, gpu)[1:]]
        assert set(behind) == {"dequantize"}
        for other in (Weight("first", 4096, 32, 128), Weight("last", 4096, 32, 128), Weight("groups", 4096, 32, 64)):
            assert _chosen(other, 2048, gpu)[0] in ("dense", "dequantize")
    # A CPU, older and newer GPUs, a JAX without Mosaic GPU.
    for capability in (0.0, 8.0, 8.9, 10.0, 12.0):
        monkeypatch.setattr(compat, "capability", lambda capability=capability: capability)
        assert _chosen(weight, 2048, H100) == ("dequantize", dequantize.Settings(groups=4, warps=4))
    monkeypatch.setattr(compat, "capability", lambda: 9.0)
    monkeypatch.setattr(common, "plgpu", None)
    assert _chosen(weight, 2048, H100)[0] == "dequantize"


def test_few_rows_share_the_contraction_of_narrow_weights_alone(on_hopper: None) -> None:
    """On a Hopper GPU of which no table says anything."""
    for features, groups in ((28672, 32), (128256, 32)):
        weight = Weight("rows", features, groups, 128)
        kernels = [_chosen(weight, count, "an unknown GPU")[0] for count in (1, 8, 16, 32, 33)]
        assert kernels == ["mma", "mma", "mma", "dot", "wgmma"]
    for features, groups in ((4096, 112), (4096, 32), (6144, 32), (4096, 91), (3968, 32)):
        weight = Weight("groups", features, groups, 128)
        kernels = [_chosen(weight, count, "an unknown GPU")[0] for count in (1, 4, 5, 16, 65, 256)]
        assert kernels == ["mma", "mma", "cluster", "cluster", "wgmma", "wgmma"]
        assert [_chosen(weight, count, H100)[0] for count in (1, 4, 5, 16)] == ["mma", "mma", "cluster", "cluster"]
        assert _chosen(weight, 64, "an unknown GPU")[0] in ("cluster", "wgmma")


def test_a_measured_cut_serves_the_same_programs_only(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    here = dict(order="groups", k=4096, n=4096, count=2048, kernel="wgmma")
    [row] = [row for row in tuned.table(tuned.slug(H100)) if here.items() <= row.items()]
    measured = wgmma.Settings(**row["settings"])
    assert measured != cuts.wgmma_cut(Weight("groups", 4096, 32, 128), 2048)
    for features, count, same in ((4096, 2048, True), (4090, 1800, True), (4096, 300, False), (3000, 2048, False)):
        weight = Weight("groups", features, 32, 128)
        cut = measured if same else cuts.wgmma_cut(weight, count)
        assert _chosen(weight, count, H100) == ("wgmma", cut)
    # Sixteen tiles of the weight would leave most of the GPU alone.
    assert cuts.wgmma_cut(Weight("groups", 2048, 32, 128), 64).split > 1
    assert cuts.wgmma_cut(Weight("groups", 2048, 1, 128), 64).split == 1
    # Pruned rows need other clusters, as do pruned contractions; fewer rows of x do not.
    own = cluster.Settings(folded=True)
    here = dict(order="groups", k=14336, n=4096, count=16, kernel="cluster", settings=dataclasses.asdict(own))
    monkeypatch.setattr(tuned, "table", lambda kind: [here])
    for features, groups, count, same in ((4096, 112, 16, True), (4096, 112, 11, True), (4096, 73, 16, False)):
        weight = Weight("groups", features, groups, 128)
        cut = own if same else cuts.cluster_cut(weight, count)
        assert cuts.cluster_cut(weight, count) != own
        assert _chosen(weight, count, H100) == ("cluster", cut)


def test_another_shapes_kernel_comes_after_hoppers_rule(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    row = dict(order="rows", k=4096, n=6144, count=32, kernel="dot", settings={})
    monkeypatch.setattr(tuned, "table", lambda kind: [row])
    assert _chosen(Weight("rows", 6144, 32, 128), 32, "x") == ("dot", dot.Settings())
    pruned = tuned.choices(Weight("rows", 4096, 32, 128), 32, "x")
    assert [kernel for kernel, _ in pruned[:2]] == ["cluster", "dot"]
    # The rule has no say: many outputs, another order.
    assert _chosen(Weight("rows", 9000, 32, 128), 32, "x") == ("dot", dot.Settings())
    monkeypatch.setattr(tuned, "table", lambda kind: [row | dict(order="last")])
    assert _chosen(Weight("last", 4096, 32, 128), 32, "x") == ("dot", dot.Settings())


def test_the_nearest_row_serves_until_it_is_too_far(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(k: int, n: int, count: int, warps: int) -> dict:
        return dict(order="last", k=k, n=n, count=count, kernel="dot", settings={"warps": warps})

    monkeypatch.setattr(
        tuned, "table", lambda kind: [row(4096, 4096, 8, 1), row(4096, 28672, 8, 2), row(4096, 64, 32, 4)]
    )
    assert _chosen(Weight("last", 18648, 32, 128), 3, "x") == ("dot", dot.Settings(warps=2))
    assert _chosen(Weight("last", 3000, 30, 128), 8, "x") == ("dot", dot.Settings(warps=1))
    # Another layout, more rows of x than any row's, another size altogether: the rule.
    for weight, count in (
        (Weight("first", 4096, 32, 128), 8),
        (Weight("last", 64, 32, 128), 33),
        (Weight("last", 4096, 2, 128), 8),
    ):
        assert _chosen(weight, count, "x") == tuned.by_rule(weight, count)
    # What the nearest row's kernel cannot do goes to the rule, and to dot where the rule's cannot either.
    monkeypatch.setattr(tuned, "table", lambda kind: [row(4096, 4096, 8, 1) | {"kernel": "mma", "settings": {}}])
    assert _chosen(Weight("last", 4096, 32, 112), 8, "x")[0] == "dot"


def test_a_kernel_that_is_wrong_here_is_not_used(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: set[str] = set()

    def verify(kernel: str, layout: str) -> None:
        if kernel in wrong:
            raise NotImplementedError(kernel)

    monkeypatch.setattr(selfcheck, "verify", verify)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(tuned, "table", lambda kind: [])
    weight = pallas.Weight(bits=4, group=128, contract="last", width=256, layout="rows")
    x, scale = jnp.zeros((4, 256), jnp.bfloat16), jnp.zeros((32, 2), jnp.bfloat16)
    for kernel in ("mma", "dot"):
        chosen = pallas._choose(x, scale, weight)
        assert chosen is not None
        assert chosen[1][0] == kernel
        wrong.add(kernel)
    with pytest.raises(NotImplementedError, match="no kernel for 4 rows"):
        pallas._choose(x, scale, weight)
    monkeypatch.setattr(compat, "capability", lambda: 9.0)
    wrong.clear()
    for kernel in ("wgmma", "dequantize") if compat.mosaic_gpu is not None else ():
        chosen = pallas._choose(jnp.zeros((300, 256), jnp.bfloat16), scale, weight)
        assert chosen is not None
        assert chosen[1][0] == kernel
        wrong.add(kernel)


@pytest.mark.usefixtures("checked")
def test_a_jax_that_wgmma_does_not_know_costs_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mosaic GPU's dialects are no public interface; but a mistake in another kernel is seen."""

    def changed(*_: object, **__: object) -> jnp.ndarray:
        raise AttributeError("no such operation")

    for module in (wgmma, dot):
        monkeypatch.setattr(module, "product", changed)
    with pytest.warns(RuntimeWarning, match="no such operation"), pytest.raises(NotImplementedError):
        selfcheck.verify("wgmma", "rows")
    with pytest.raises(AttributeError):
        selfcheck.verify("dot", "rows")


@pytest.mark.usefixtures("checked")
def test_the_self_check_runs_inside_a_trace_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes numbers while its caller is being traced; what it found out is not found out again."""
    calls = []

    def product(x, data, scale, weight):
        calls.append(weight.layout)
        if weight.layout == "last":
            raise jax.errors.JaxRuntimeError("out of shared memory\nand more")
        factor = 1.0 if weight.layout == "rows" else 1.1
        plain = tiling.untile(data, tiling.CONTRACTS[weight.layout], weight.features)
        contract = tiling.CONTRACTS[weight.layout]
        options = dict(bits=4, group=128, contract=contract, width=weight.groups * 128)
        return (reference.dequant_matmul(x, plain, scale, **options) * factor).astype(x.dtype)

    monkeypatch.setattr(selfcheck.dequantize, "product", product)

    def traced(x: jnp.ndarray) -> jnp.ndarray:
        selfcheck.verify("dequantize", "rows")
        with pytest.raises(NotImplementedError, match=r"off by 0\.1"):
            selfcheck.verify("dequantize", "groups")
        return x

    with pytest.warns(RuntimeWarning, match="slower ones are used"):
        jax.jit(traced).lower(jnp.zeros(2))
    with pytest.warns(RuntimeWarning, match="shared memory"), pytest.raises(NotImplementedError):
        selfcheck.verify("dequantize", "last")
    jax.jit(traced).lower(jnp.zeros(3))
    assert calls == ["rows", "groups", "last"]


def test_the_gpus_default_is_what_was_measured(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 rows times 4 bits take the kernels; other dtypes and 8 bits go in blocks unless asked."""
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    ran: list[str] = []
    for name in api.IMPLEMENTATIONS:
        monkeypatch.setitem(api.IMPLEMENTATIONS, name, lambda x, *_, name=name, **__: (ran.append(name), x)[1])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(compat, "capability", lambda: 8.0)

    def run(dtype: str, bits: int = 4, group: int = 128) -> str:
        case = random_case(rng, 128, 128, group, bits=bits)
        dequant_matmul(jnp.zeros((1, 128), dtype), case.data, case.scale, **case.options)
        return ran[-1]

    assert run("bfloat16") == "pallas"
    assert run("float32") == run("bfloat16", bits=8) == run("bfloat16", group=32) == "blocked"
    monkeypatch.setenv(dispatch.VARIABLE, "pallas")
    assert run("float32") == "pallas"
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert run("bfloat16") == "reference"
    assert dispatch.default("rope") == "reference"


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
