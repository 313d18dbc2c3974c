"""Which kernel runs a product on a GPU: the tables, the rule, and the self-check that may overrule both."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.pallas_cases import random_case
from uniql_jax.pallas_kernels import compat, dispatch
from uniql_jax.pallas_kernels.dequant_matmul import (
    api,
    dequant_matmul,
    dequantize,
    dot,
    pallas,
    reference,
    selfcheck,
    tiling,
    tuned,
)
from uniql_jax.pallas_kernels.dequant_matmul.hopper import cluster, common, cuts, wgmma
from uniql_jax.pallas_kernels.dequant_matmul.tiling import Weight

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
