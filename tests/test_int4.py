"""Packed weights: exact round trips, prefixes, odd shapes."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uniql_jax import elastic
from uniql_jax.model.layers import linear
from uniql_jax.pallas_kernels import compat, dispatch, packing
from uniql_jax.pallas_kernels.dequant_matmul import tiling
from uniql_jax.pallas_kernels.packing import SHIFTS
from uniql_jax.runtime import loading
from uniql_jax.weights.protocol import dense
from uniql_jax.weights.quantized import QuantizedArray, from_codes, group_size, pack, unpack


def quantized(
    rng: np.random.Generator, shape: tuple[int, ...], bits: int, group: int, contract: str
) -> tuple[QuantizedArray, np.ndarray]:
    """A random packed weight and the dense array it stands for."""
    width = shape[-1] if contract == "last" else math.prod(shape[:-1])
    rows = math.prod(shape) // width
    low, high = (-8, 8) if bits == 4 else (-127, 128)
    codes = rng.integers(low, high, (rows, width))
    scale = np.asarray(jnp.asarray(rng.standard_normal((rows, -(-width // group))), jnp.bfloat16), np.float32)
    value = codes * np.repeat(scale, group, axis=1)[:, :width]
    packed = from_codes(
        jnp.asarray(codes, jnp.int8), jnp.asarray(scale), bits=bits, group=group, contract=contract, shape=shape
    )
    return packed, (value if contract == "last" else value.T).reshape(shape)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("shape", "group", "contract"),
    [((6, 2, 3, 40), 40, "last"), ((5, 100), 32, "last"), ((16, 9, 24), 72, "first"), ((60, 20), 16, "first")],
)
def test_dequantized_is_integer_times_scale(
    bits: int, shape: tuple[int, ...], group: int, contract: str, rng: np.random.Generator
) -> None:
    packed, want = quantized(rng, shape, bits, group, contract)
    assert packed.shape == shape
    np.testing.assert_array_equal(packed.dense(), want.astype(np.float32))
    np.testing.assert_array_equal(dense(packed), packed.dense())
    assert packed.nbytes == packed.data.nbytes + packed.scale.nbytes


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("shape", "group", "contract", "counts"),
    [
        ((7, 3, 32), 16, "last", (1, 4, 7)),
        ((32, 9, 16), 72, "first", (8, 24, 32)),
        ((56, 12), 16, "first", (16, 48, 56)),
    ],
)
def test_a_prefix_dequantizes_to_the_prefix(
    bits: int, shape: tuple[int, ...], group: int, contract: str, counts: tuple[int, ...], rng: np.random.Generator
) -> None:
    packed, _ = quantized(rng, shape, bits, group, contract)
    whole = np.asarray(packed.dense())
    for count in counts:
        part = packed.take_prefix(count)
        assert part.shape == (count, *shape[1:])
        np.testing.assert_array_equal(part.dense(), whole[:count])
        np.testing.assert_array_equal(part.data, np.asarray(packed.data)[: part.data.shape[0]])


def test_a_cut_through_a_group_is_refused(rng: np.random.Generator) -> None:
    packed, _ = quantized(rng, (32, 9, 16), 4, 72, "first")
    with pytest.raises(ValueError, match="splits a quantization group"):
        packed.take_prefix(5)


# few sizes: each is a dozen compilations
@given(
    words=st.sampled_from([1, 9]),
    rows=st.sampled_from([1, 5]),
    axis=st.sampled_from([0, 1]),
    seed=st.integers(0, 2**32 - 1),
)
def test_pack_and_unpack(words: int, rows: int, axis: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(-8, 8, (rows, 8 * words))
    codes = codes.T if axis == 0 else codes
    packed = pack(jnp.asarray(codes, jnp.int32), 4, axis)
    assert packed.dtype == jnp.int32
    assert packed.size * 8 == codes.size
    np.testing.assert_array_equal(unpack(packed, 4, axis), codes)


def test_the_kernels_read_the_same_order() -> None:
    assert tuple(packing.SHIFTS) == SHIFTS
    assert sorted(SHIFTS) == list(range(0, 32, 4))


@given(width=st.integers(1, 20000))
def test_a_group_is_a_multiple_of_eight_near_the_target(width: int) -> None:
    group = group_size(width)
    assert group % 8 == 0
    assert 8 <= group <= 256
    assert group >= 64 or group >= width


@pytest.mark.parametrize(("width", "group"), [(576, 144), (896, 128), (4096, 128), (3584, 128), (2048, 128), (48, 48)])
def test_groups_of_real_hidden_sizes(width: int, group: int) -> None:
    assert group_size(width) == group


def test_a_packed_weight_passes_through_jit(rng: np.random.Generator) -> None:
    packed, want = quantized(rng, (32, 24), 4, 16, "first")
    got = jax.jit(lambda w: w.take_prefix(16).dense())(packed)
    np.testing.assert_array_equal(got, want.astype(np.float32)[:16])


@pytest.mark.parametrize(
    ("shape", "contract", "counts"),
    [
        ((7, 3, 256), "last", (1, 4, 7)),  # cuts inside a tile of 16 rows
        ((40, 256), "last", (16, 40)),
        ((5, 2, 3, 128), "last", (2, 3)),
        ((96, 4, 20), "first", (32, 64, 96)),  # 32 ranks of 4 heads: a group
        ((384, 33), "first", (128, 384)),
    ],
)
def test_tiles_hold_the_same_weight(
    shape: tuple[int, ...], contract: str, counts: tuple[int, ...], rng: np.random.Generator
) -> None:
    """Placing before or after pruning is the same to the last bit, and pruned tiles are the first bytes of all."""
    packed, _ = quantized(rng, shape, 4, 128, contract)
    layout = tiling.LAYOUTS[contract]
    tiled = packed.in_layout(layout)
    assert tiled.shape == packed.shape
    assert tiled.nbytes == tiled.data.nbytes + tiled.scale.nbytes
    np.testing.assert_array_equal(tiled.dense(jnp.bfloat16), packed.dense(jnp.bfloat16))
    np.testing.assert_array_equal(tiled.in_layout("plain").data, packed.data)
    on_host = jax.tree.map(np.asarray, packed).in_layout(layout)
    assert isinstance(on_host.data, np.ndarray)
    np.testing.assert_array_equal(on_host.data, tiled.data)
    everything = np.asarray(tiled.data).tobytes()
    for count in counts:
        part, want = tiled.take_prefix(count), packed.take_prefix(count)
        assert part.shape == want.shape
        np.testing.assert_array_equal(part.dense(), want.dense())
        assert everything.startswith(np.asarray(part.data).tobytes())
        again = part.take_prefix(counts[0])
        np.testing.assert_array_equal(again.in_layout("plain").data, packed.take_prefix(counts[0]).data)
        np.testing.assert_array_equal(again.dense(), packed.take_prefix(counts[0]).dense())


def test_tiles_refuse_what_they_cannot_hold(rng: np.random.Generator) -> None:
    tiled = quantized(rng, (96, 4, 20), 4, 128, "first")[0].in_layout("groups")
    with pytest.raises(ValueError, match="splits a quantization group"):
        tiled.take_prefix(33)
    for packed, layout in (
        (quantized(rng, (16, 144), 4, 144, "last")[0], "rows"),
        (quantized(rng, (16, 128), 8, 128, "last")[0], "rows"),
        (quantized(rng, (16, 128), 4, 128, "last")[0], "groups"),
    ):
        with pytest.raises(NotImplementedError, match="tiles"):
            packed.in_layout(layout)


@pytest.mark.parametrize(("shape", "contract"), [((7, 3, 256), "last"), ((64, 4, 20), "first")])
def test_a_product_with_tiles_is_the_product(shape: tuple[int, ...], contract: str, rng: np.random.Generator) -> None:
    packed, _ = quantized(rng, shape, 4, 128, contract)
    apply = linear.apply_rows if contract == "last" else linear.apply_columns
    x = jnp.asarray(rng.standard_normal((2, shape[-1]) if contract == "last" else (2, *shape[:-1])), jnp.float32)
    np.testing.assert_array_equal(apply(x, packed.in_layout(tiling.LAYOUTS[contract])), apply(x, packed))


def test_placing_tiles_on_gpus_only(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    leaf, packed = elastic.BLOCKS["mlp"]["gate"], quantized(rng, (16, 128), 4, 128, "last")[0]
    assert loading.place(leaf, packed, jnp.bfloat16).layout == "plain"
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(compat, "ampere", lambda: True)
    monkeypatch.setitem(dispatch.MEASURED, ("dequant_matmul", "gpu"), "pallas")
    assert loading.place(leaf, packed, jnp.bfloat16).layout == "rows"
    assert loading.place(leaf, packed, jnp.float32).layout == "plain"
    assert loading.place(leaf, packed.take_prefix(16), jnp.bfloat16, tiles=False).layout == "plain"
    assert loading.place(leaf, quantized(rng, (16, 144), 4, 144, "last")[0], jnp.bfloat16).layout == "plain"
    placed = loading.place_top({"embed": packed, "head": packed}, jnp.bfloat16)
    assert (placed["embed"].layout, placed["head"].layout) == ("plain", "rows")
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert loading.place(leaf, packed, jnp.bfloat16).layout == "plain"
    monkeypatch.delenv(dispatch.VARIABLE)
    monkeypatch.setattr(compat, "ampere", lambda: False)
    assert loading.place(leaf, packed, jnp.bfloat16).layout == "plain"
