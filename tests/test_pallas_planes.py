"""Weights whose entries have 4 bits or 3: tiles of 3 bits, the kernels that read them, and decoding with both at once.

Truth is numpy's: integers and scales that share no code with ours.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests.pallas_cases import nvidia, relative
from tests.planes_cases import ROUNDING, draw, held, three
from tests.test_pallas_fused import EPS, close, normal
from uniql_jax import elastic
from uniql_jax.model.layers import fused as layers
from uniql_jax.pallas_kernels import blocks, compat, dispatch, selfcheck
from uniql_jax.pallas_kernels.dequant_matmul import (
    api,
    dequant_matmul,
    dequantize,
    dot,
    fused,
    mma,
    three_bit,
    three_bit_dot,
    three_bit_mma,
    three_bit_products,
    tuned,
    warp,
)
from uniql_jax.pallas_kernels.dequant_matmul.fused import Stream
from uniql_jax.pallas_kernels.dequant_matmul.hopper import common
from uniql_jax.pallas_kernels.dequant_matmul.tiling import CONTRACTS, LAYOUTS, Weight
from uniql_jax.runtime import loading
from uniql_jax.weights.mixed import MixedArray, in_parts, in_planes
from uniql_jax.weights.nested import NestedArray, from_nested_codes, from_tiles

# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contract", ["last", "first"])
def test_tiles_hold_the_leading_bits(rng: np.random.Generator, contract: str) -> None:
    """The same values bit for bit, in three bits a weight; a prefix is the first bytes, and a row can be looked up."""
    lead = (8, 3, 2) if contract == "last" else (256, 3)
    drawn = draw(rng, contract, *((48, 512) if contract == "last" else (32, 768)), lead=lead)
    planes = drawn.stored.take_bits(0)
    tiled = planes.tiled()
    assert tiled.nbytes == planes.nbytes
    np.testing.assert_array_equal(tiled.dense(), planes.dense())
    for one, other in zip(jax.tree.leaves(from_tiles(tiled)), jax.tree.leaves(planes), strict=True):
        np.testing.assert_array_equal(one, other)
    for count in (5, 8) if contract == "last" else (128, 256):
        kept = tiled.take_prefix(count)
        np.testing.assert_array_equal(kept.dense(), planes.take_prefix(count).dense())
        assert tiled.data.tobytes().startswith(kept.data.tobytes())
    if contract == "last":
        index = jnp.asarray(rng.integers(0, 48, (2, 5)))
        flat = dataclasses.replace(tiled, scale=tiled.scale.reshape(48, -1))
        np.testing.assert_array_equal(flat.lookup(index, jnp.float32), planes.dense().reshape(48, -1)[index])


def test_odd_sizes_are_filled_up(rng: np.random.Generator) -> None:
    """To whole tiles of 16 rows and two groups; what has no tile is refused."""
    for contract, rows, width in (("last", 21, 300), ("first", 21, 384)):
        drawn = draw(rng, contract, rows, width)
        tiled, planes = drawn.stored.take_bits(0).tiled(), drawn.stored.take_bits(0)
        assert tiled.data.shape == ((2, 2, 3, 32, 4))
        np.testing.assert_array_equal(tiled.dense(), planes.dense())
        mixed = in_parts(drawn.stored.take_bits(8 if contract == "last" else 256), tiles=True)
        assert isinstance(mixed, MixedArray)
        back = in_planes(dataclasses.replace(mixed, whole=mixed.whole.in_layout(LAYOUTS[contract])))
        want = in_parts(drawn.stored.take_bits(mixed.whole.shape[0]))
        assert jax.tree.structure(back) == jax.tree.structure(want)
        for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(one, other)
        with pytest.raises(ValueError, match="all bits"):
            drawn.stored.tiled()
        with pytest.raises(NotImplementedError, match="3 bits come in tiles"):
            tiled.in_layout("plain")
    other = from_nested_codes(
        jnp.zeros((4, 96), jnp.int32), jnp.ones((4, 2)), jnp.ones((4, 2)), group=48, contract="last", shape=(4, 96)
    )
    with pytest.raises(NotImplementedError, match="groups of 128"):
        jax.device_get(other).take_bits(0).tiled()


# --- the kernels, interpreted ---------------------------------------------------------------------------------------

KERNELS = [
    # contract, rows of the weight, groups, rows of x, settings
    ("last", 27, 3, 1, mma.Settings(along_k=2, batch=4, gate=True)),
    ("last", 50, 2, 5, mma.Settings(along_k=1, along_n=2, tiles=2, stream=True)),
    ("first", 18, 5, 9, mma.Settings(along_k=2, split=2, ordered=True)),
    ("first", 32, 1, 16, mma.Settings(along_k=4)),
    ("last", 50, 3, 33, dot.Settings(32, 16, split=2)),
    ("first", 21, 2, 64, dot.Settings(16, 32, rows_inner=True)),
    ("last", 37, 5, 7, dequantize.Settings(2)),
    ("first", 37, 4, 7, dequantize.Settings(4)),
]


@pytest.mark.parametrize(("contract", "rows", "groups", "count", "settings"), KERNELS, ids=str)
def test_products(rng: np.random.Generator, contract: str, rows: int, groups: int, count: int, settings: Any) -> None:
    drawn = draw(rng, contract, rows, 128 * groups)
    weight, leaf = three(drawn)
    x = normal(rng, count, 128 * groups)
    if isinstance(settings, dequantize.Settings):
        dense = three_bit_dot.dense(leaf.data, leaf.scale, weight, settings)
        np.testing.assert_array_equal(dense, drawn.coarse.astype(ml_dtypes.bfloat16))
        return
    product: Any = three_bit_mma.product if isinstance(settings, mma.Settings) else three_bit_dot.product
    parts = jax.jit(lambda x, d, s: product(x, d, s, weight=weight, settings=settings))(x, leaf.data, leaf.scale)
    assert parts.shape == (settings.split, count, rows)
    want = np.asarray(x, np.float64) @ drawn.coarse.T
    assert relative(parts.astype(jnp.float32).sum(0), want) < ROUNDING


def test_extreme_inputs_stay_finite(rng: np.random.Generator) -> None:
    """Unpacked weights are far below one, and sums are lifted: neither may underflow nor overflow."""
    drawn = draw(rng, "last", 16, 256)
    weight, leaf = three(drawn)
    call = jax.jit(functools.partial(three_bit_mma.product, weight=weight, settings=mma.Settings(along_k=1)))
    for size in (1e-20, 1e20):
        x = (normal(rng, 2, 256) * size).astype(jnp.bfloat16)
        [out] = call(x, leaf.data, leaf.scale)
        assert relative(out.astype(jnp.float32) / size, np.asarray(x, np.float64) / size @ drawn.coarse.T) < ROUNDING


@pytest.mark.parametrize("contract", ["last", "first"])
def test_every_implementation_agrees(rng: np.random.Generator, contract: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows and many, at a width that fills no group; the gradient is the reference's."""
    monkeypatch.setattr(tuned, "MOST_DOT", dict.fromkeys(tuned.MOST_DOT, 16))
    width = 300 if contract == "last" else 256
    drawn = draw(rng, contract, 30, width)
    _, leaf = three(drawn)
    options: dict[str, Any] = dict(bits=3, group=128, contract=contract, width=width, layout=leaf.layout)
    for count in (2, 18):
        x = normal(rng, count, width)
        want = np.asarray(x, np.float64) @ drawn.coarse.T
        pulls = {}
        for name in ("reference", "blocked", "pallas"):
            call = functools.partial(dequant_matmul, data=leaf.data, scale=leaf.scale, implementation=name, **options)
            call = jax.jit(call)
            y, pulls[name] = jax.vjp(call, x) if name != "blocked" else (call(x), None)
            assert relative(y, want) < ROUNDING, name
        cotangent = jnp.ones((count, 30), jnp.bfloat16)
        np.testing.assert_array_equal(pulls["pallas"](cotangent)[0], pulls["reference"](cotangent)[0])
    with pytest.raises(NotImplementedError, match="bfloat16"):
        dequant_matmul(x.astype(jnp.float32), leaf.data, leaf.scale, implementation="pallas", **options)
    with pytest.raises(ValueError, match="do not hold"):
        dequant_matmul(x, leaf.data[:1, :1], leaf.scale, **options)


# --- which form and which kernel ------------------------------------------------------------------------------------


def test_loading_falls_back_to_planes(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles only where the kernel that decodes was seen to be right."""
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    described, stored = elastic.BLOCKS["mlp"]["up"], draw(rng, "last", 32, 256).stored.take_bits(16)
    monkeypatch.setattr(dispatch, "REFUSALS", {})
    assert isinstance(loading.in_form(described, stored, jnp.bfloat16).rest, NestedArray)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(compat, "ampere", lambda: True)
    monkeypatch.setattr(three_bit_products, "verify", lambda *_: None)
    found = loading.in_form(described, stored, jnp.bfloat16)
    assert (found.whole.layout, found.rest.layout, found.rest.bits) == ("rows", "rows", 3)
    pulled = layers._stored(jax.tree.map(jnp.asarray, found))
    assert [part.nbytes for part in pulled] == [found.whole.data.nbytes, found.rest.data.nbytes]
    assert isinstance(loading.in_form(described, stored, jnp.float32).rest, NestedArray)
    embedding = loading.in_form(elastic.TOP["embed"], stored, jnp.bfloat16, tiles=False)
    assert (embedding.whole.layout, embedding.rest.bits) == ("plain", 3)

    def wrong(*_: Any) -> None:
        raise NotImplementedError("the mma kernel is off by 1")

    monkeypatch.setattr(three_bit_products, "verify", wrong)
    found = loading.in_form(described, stored, jnp.bfloat16)
    assert found.whole.layout == "rows"
    assert isinstance(found.rest, NestedArray)
    [refusal] = dispatch.REFUSALS
    assert "off by 1" in refusal.reason


def test_every_size_has_a_kernel(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper, too, whose own kernels take 4 bits alone; a table's rows are for the bits that they name."""
    for layout in CONTRACTS:
        for features, groups in ((4096, 112), (14336, 32), (23, 1)):
            weight = Weight(layout, features, groups, 128, 3)
            kernels = [tuned.choices(weight, count, "an unknown GPU")[0][0] for count in (1, 5, 16, 17, 64, 5000)]
            assert kernels == ["mma", "mma", "mma", "dot", "dot", "dequantize"]
    with pytest.raises(NotImplementedError, match="4 bits, not 3"):
        common.supported(weight)
    row = dict(order="rows", k=4096, n=14336, count=1, kernel="mma", settings={"along_k": 16})
    monkeypatch.setattr(tuned, "table", lambda kind: [row, row | dict(bits=3, settings={"along_k": 1})])
    for bits, along_k in ((4, 16), (3, 1)):
        assert tuned.choices(Weight("rows", 14336, 32, 128, bits), 1, "x")[0][1].along_k == along_k
    for kernel in (mma.supported, lambda weight, *_: dot.supported(weight)):
        with pytest.raises(NotImplementedError, match="in tiles alone"):
            kernel(Weight("last", 16, 1, 128, 3), mma.Settings(), 1)


def test_cuts_of_leaves_with_4_bits_and_3() -> None:
    """All warps find a tile, and registers that the entries of 3 bits need serve the others as well."""
    four, three = (Weight("rows", 7168, 32, 128, bits) for bits in (4, 3))
    for rest, batch in (((), 1), ((three, three), 2)):
        assert fused.read_settings([fused.Job((four, four), rest=rest)], 1).batch == batch
    for groups in (1, 2, 7, 32, 112):
        few = Weight("groups", 4096, groups, 128, 3)
        for count in (1, 8, 16):
            cut = fused.write_settings([few], count)
            assert cut.along_k * cut.split <= max(1, -(-groups // 2))
            wide = fused.read_settings([fused.Job((dataclasses.replace(few, layout="rows"),))], count)
            assert wide.along_k * wide.split <= max(1, -(-groups // 2))


@pytest.mark.parametrize(
    ("kernel", "layout"),
    [("mma", "rows"), ("dequantize", "groups"), pytest.param("dot", "rows", marks=pytest.mark.slow)],
)
def test_the_self_check_passes_here_and_can_fail(kernel: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert three_bit_products.error_of(kernel, layout) < selfcheck.BOUND
    monkeypatch.setattr(three_bit, "pairs_of", lambda words, right=three_bit.pairs_of: right(words[::-1]))
    assert three_bit_products.error_of(kernel, layout) > 10 * selfcheck.BOUND


def test_preferred_layout_wants_groups_of_128(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(compat, "ampere", lambda: True)
    monkeypatch.setattr(api, "_three_bits_run", lambda layout: True)
    options: dict[str, Any] = dict(contract="first", dtype=jnp.bfloat16)
    assert api.preferred_layout(bits=3, group=128, **options) == "groups"
    assert api.preferred_layout(bits=3, group=64, **options) == "plain"
    assert api.preferred_layout(bits=8, group=128, **options) == "plain"


# --- for GPUs -------------------------------------------------------------------------------------------------------

CUTS = [
    ("mma", "rows", 1, mma.Settings(along_k=4, gate=True, stream=True)),
    ("mma", "groups", 16, mma.Settings(along_k=2, tiles=2, split=4)),
    ("dot", "rows", 64, dot.Settings()),
    ("dot", "groups", 128, dot.Settings(tile_m=128, split=4, rows_inner=True)),
]


def lowered(kernel: str, layout: str, count: int, settings: Any) -> Any:
    """A product of 3 bits, lowered for an NVIDIA GPU."""
    product = {"mma": three_bit_mma.product, "dot": three_bit_dot.product}[kernel]
    tiles, scales = ((16, 4), (250, 7)) if layout == "rows" else ((4, 16), (7, 250))
    call = jax.jit(lambda x, d, s: product(x, d, s, weight=Weight(layout, 250, 7, 128, 3), settings=settings))
    with nvidia():
        return call.trace(
            jax.ShapeDtypeStruct((count, 7 * 128), jnp.bfloat16),
            jax.ShapeDtypeStruct((*tiles, 3, 32, 4), jnp.int32),
            jax.ShapeDtypeStruct(scales, jnp.bfloat16),
        ).lower(lowering_platforms=("cuda",))


def emulated(text: str, constraints: str, args: list[jax.Array], dtype: Any, pack: int) -> jax.Array:
    """What lines of PTX, each for one element, make of 32-bit integers."""
    registers = {f"${i}": np.asarray(arg).view(np.uint32) for i, arg in enumerate(args, 1)}
    assert constraints == ",".join(["=r", *"r" * len(args)])

    def value(name: str) -> Any:
        return registers[name] if name in registers else np.uint32(int(name, 0) & 0xFFFFFFFF)

    def halves(pair: Any) -> np.ndarray:
        both = np.stack([pair & 0xFFFF, pair >> 16]) if np.ndim(pair) else np.asarray([pair & 0xFFFF, pair >> 16])
        return both.astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float64)

    for line in text.strip("{} ").split(";"):
        operation, _, operands = line.strip().partition(" ")
        if operation in ("", ".reg"):
            continue
        target, *found = (each.strip() for each in operands.split(","))
        a, b, c, *_ = [*map(value, found), 0, 0]
        if operation == "mov.b32":
            out = a
        elif operation == "and.b32":
            out = a & b
        elif operation == "lop3.b32":
            out = {0x80: a & b & c, 0xEA: a & b | c}[int(found[3], 0)]
        else:
            assert operation == "fma.rn.bf16x2"
            numbers = halves(a) * halves(b).reshape(2, 1, 1) + halves(c).reshape(2, 1, 1)
            low, high = numbers.astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32)
            out = high << 16 | low
        registers[target] = out
    return jnp.asarray(registers["$0"].view(np.int32))


@pytest.mark.parametrize("gated", [False, True])
def test_the_instructions_unpack(rng: np.random.Generator, gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines of PTX that a GPU runs, which the interpreter never sees, one by one."""
    monkeypatch.setattr(compat, "interpreted", lambda: False)
    monkeypatch.setattr(warp, "asm", emulated)
    integers = rng.integers(0, 8, (16, 2, 32, 4))
    words = np.zeros((3, 32, 4), np.uint32)
    for p, half in np.ndindex(16, 2):
        for bit in range(3):
            word, at = (p // 5, 3 * (p % 5) + bit) if p < 15 else (2 - bit, 15)
            words[word] |= ((integers[p, half] >> bit & 1) << (at + 16 * half)).astype(np.uint32)
    mask = jnp.full((32, 4), -1, jnp.int32) if gated else None
    pairs = three_bit_mma.unpack([jnp.asarray(word.view(np.int32)) for word in words], mask)
    got = np.stack([np.asarray(pair).view(ml_dtypes.bfloat16).reshape(32, 4, 2) for pair in pairs])
    want = (np.moveaxis(integers, 1, -1) - 3.75) * 2.0**-three_bit_mma.LIFT
    np.testing.assert_array_equal(got.astype(np.float64), want)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(("kernel", "layout", "count", "settings"), CUTS, ids=str)
def test_lowers_for_nvidia_gpus(
    kernel: str, layout: str, count: int, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jax.experimental.pallas.triton")
    monkeypatch.setattr(compat, "interpreted", lambda: False)
    assert lowered(kernel, layout, count, settings).as_text().count("xla.gpu.triton") == 1


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_4_bits_and_3_are_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jax.experimental.pallas.triton")
    monkeypatch.setattr(compat, "interpreted", lambda: False)
    four, other = Weight("rows", 64, 2, 128), Weight("rows", 33, 2, 128, 3)
    shape = jax.ShapeDtypeStruct
    operands = (shape((4, 2, 2, 32, 4), jnp.int32), shape((64, 2), jnp.bfloat16))
    operands += (shape((3, 1, 3, 32, 4), jnp.int32), shape((33, 2), jnp.bfloat16))
    job = fused.Job((four, four), activation="silu", rest=(other, other))

    def call(x: Any, held: Any) -> Any:
        return fused.read(Stream(x), [job], [[held, held]], eps=EPS)[0]

    with nvidia():
        text = (
            jax.jit(call).trace(shape((1, 256), jnp.bfloat16), operands).lower(lowering_platforms=("cuda",)).as_text()
        )
    assert text.count("xla.gpu.triton") == 1


@pytest.mark.slow
def test_kernels_compile_for_every_gpu() -> None:
    """By Triton and ptxas, without a GPU: no spilled registers, and no more shared memory than a consumer GPU has."""
    for package in ("triton", "jaxlib.triton", "jax.experimental.pallas.triton"):
        pytest.importorskip(package)
    command = [sys.executable, "-W", "ignore", "-m", "tests.compiled_kernels"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-1000:]
    found = json.loads(done.stdout)
    assert {name.split()[0] for name in found} == {f"sm_{each}" for each in (80, 86, 87, 89, 90, 100)}
    for name, (registers, spilled, shared) in found.items():
        assert registers <= (128 if "dot" not in name else 255), name
        assert not spilled, name
        assert shared <= 99 * 1024, name


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 5, 9, 16])
def test_shapes_of_a_model_on_the_device(rng: np.random.Generator, share: float, count: int) -> None:
    """As the model cuts them; a border inside of a row tile."""
    for rows, border in ((14336, 7168), (4096, 2040), (1000, 504)):
        full = {0.0: 0, 0.5: border, 1.0: rows}[share]
        leaf, dense = held(draw(rng, "last", rows, 4096), full)
        x = normal(rng, count, 4096)
        [out], _ = fused.read(Stream(x), [layers.job_of([leaf])], [[layers.operands_of(leaf)]], eps=EPS)
        close(out, np.asarray(x, np.float32) @ dense.T.astype(np.float32))
    for width, border in ((14336, 7168), (4096, 1152), (9088, 4992)):
        full = {0.0: 0, 0.5: border, 1.0: width}[share]
        leaf, dense = held(draw(rng, "first", 4096, width), full)
        hidden, x = normal(rng, count, width), normal(rng, count, 4096)
        given = blocks.in_blocks(hidden) if count > 1 else hidden
        weights, operands = layers.weights_of(leaf), layers.operands_of(leaf)
        out = fused.write(given, weights, operands, Stream(x), jnp.ones(4096))
        close(out.x, np.asarray(x, np.float32) + np.asarray(hidden, np.float32) @ dense.T.astype(np.float32))
