"""Rotary embedding of q and k in one kernel that computes sine and cosine itself, so that no table is read or kept.

One pair of one token is a run of memory: its first elements of all heads, then its second ones. A program turns some
hundred such runs, one after another, so that all it moves is contiguous. The backward of a rotation is the rotation by
minus the angle: the same kernel with its direction turned.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels import compat, selfcheck
from uniql_jax.pallas_kernels.compat import pl
from uniql_jax.pallas_kernels.rope import reference


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the work is cut, and how sine and cosine are had."""

    elements: int = 2048
    """First elements of pairs in the larger array that a program turns, and as many second ones; a power of two."""
    warps: int = 4
    shared: bool = False
    """Sine and cosine are taken once for the heads that share a frequency, else for each: more arithmetic, but a load
    may then reach over the heads of several key/value heads."""
    fast: bool = True
    """On a GPU, sine and cosine of the angle less whole turns by the hardware's approximation, off by about 1e-6, else
    by CUDA's library."""


PER_TURN, TURN = np.float32(1 / (2 * math.pi)), np.float32(2 * math.pi)
REST = np.float32(2 * math.pi - float(TURN))


def fast_sine_and_cosine(angle: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Sine and cosine of float32 radians on an NVIDIA GPU, off by about 1e-6, up to a million radians.

    Two fused multiply-adds take whole turns off: 2 pi to 24 bits, and what it lacks. PTX's sin.approx and cos.approx
    are off by at most 2**-20.5 from -pi to pi (PTX ISA, sin and cos).
    """

    def asm(text: str, x: Array) -> Array:
        [out] = compat.triton().elementwise_inline_asm(
            text, args=[x], constraints="=f,f", pack=1, result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)]
        )
        return out

    per_turn, minus_turn, minus_rest = (f"0f{int(x.view(np.uint32)):08X}" for x in (PER_TURN, -TURN, -REST))
    lines = [
        "{ .reg .f32 n, r;",
        f"mul.rn.f32 n, $1, {per_turn};",
        "cvt.rni.f32.f32 n, n;",
        f"fma.rn.f32 r, n, {minus_turn}, $1;",
        f"fma.rn.f32 $0, n, {minus_rest}, r; }}",
    ]
    within = asm(" ".join(lines), angle)
    return asm("sin.approx.f32 $0, $1;", within), asm("cos.approx.f32 $0, $1;", within)


def _load(ref: Any, index: tuple[Any, ...], mask: Array | None) -> Array:
    """Without a mask, Triton may load 16 bytes at a time whatever it can prove of one."""
    return ref[index] if mask is None else compat.load(ref, index, mask)


def _store(ref: Any, index: tuple[Any, ...], value: Array, mask: Array | None) -> None:
    if mask is None:
        compat.triton().store(ref.at[index], value.astype(ref.dtype))
    else:
        compat.store(ref, index, value, mask)


def _axes(heads: int, kv_heads: int, shared: bool) -> tuple[int, ...]:
    """Sizes of a tile's axes for the heads: key/value heads and what shares each, or the heads themselves.

    These in two axes where their number is no power of two, so that only the outer one needs a mask.
    """
    inner = heads & -heads
    if shared:
        return kv_heads, heads // kv_heads
    return (heads,) if inner == heads else (heads // inner, inner)


def _padded(axes: tuple[int, ...]) -> int:
    return math.prod(pl.next_power_of_2(size) for size in axes)


def _both(*masks: Array | None) -> Array | None:
    """The masks that there are, together."""
    held = [mask for mask in masks if mask is not None]
    return functools.reduce(lambda a, b: a & b, held) if held else None


def _kernel(*refs: Any, arrays: int, direction: int, tile: int, settings: Settings) -> None:
    """refs: positions [tokens], inv_freq [pairs, kv_heads], the arrays [tokens * pairs, 2 * heads], their outputs."""
    positions_ref, inv_freq_ref = refs[:2]
    pairs, kv_heads = inv_freq_ref.shape
    runs = positions_ref.shape[0] * pairs
    run = pl.program_id(0) * tile + jnp.arange(tile)
    inside = run < runs if runs % tile else None
    token, pair = jax.lax.div(run, pairs), jax.lax.rem(run, pairs)
    held = []
    # All that is to be turned is on its way before the first number is waited for.
    for x_ref in refs[2 : 2 + arrays]:
        heads = x_ref.shape[1] // 2
        axes = _axes(heads, kv_heads, settings.shared)
        outer = (slice(None), *(None,) * len(axes))
        numbers, masks = [], [None if inside is None else inside[outer]]  # the runs first, then the axes
        for i, size in enumerate(axes):
            spread = tuple(slice(None) if j == i + 1 else None for j in range(len(axes) + 1))
            number = jnp.arange(pl.next_power_of_2(size))[spread]
            numbers.append(number)
            masks.append(number < size if pl.next_power_of_2(size) > size else None)
        head = numbers[0] if len(axes) == 1 else numbers[0] * axes[1] + numbers[1]
        kv = numbers[0] if settings.shared else jax.lax.div(head, heads // kv_heads)
        of_kv, mask = _both(*(masks[:2] if settings.shared else masks)), _both(*masks)
        first = _load(x_ref, (run[outer], head), mask)
        second = _load(x_ref, (run[outer], heads + head), mask)
        held.append((outer, head, kv, of_kv, mask, first, second))
    position = _load(positions_ref, (token,), inside).astype(jnp.float32)
    for out_ref, (outer, head, kv, of_kv, mask, first, second) in zip(refs[2 + arrays :], held, strict=True):
        heads = out_ref.shape[1] // 2
        frequency = _load(inv_freq_ref, (pair[outer], kv), of_kv).astype(jnp.float32)
        angle = position[outer] * frequency
        fast = settings.fast and not compat.interpreted()
        sin, cos = fast_sine_and_cosine(angle) if fast else (jnp.sin(angle), jnp.cos(angle))
        sin = direction * sin
        first, second = first.astype(jnp.float32), second.astype(jnp.float32)
        _store(out_ref, (run[outer], head), first * cos - second * sin, mask)
        _store(out_ref, (run[outer], heads + head), second * cos + first * sin, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _turn(
    arrays: tuple[Array, ...], positions: Array, inv_freq: Array, direction: int, settings: Settings
) -> tuple[Float[Array, "batch length pairs 2 heads"], ...]:
    batch, length, pairs, _, _ = arrays[0].shape
    runs = batch * length * pairs
    widest = max(_padded(_axes(x.shape[4], inv_freq.shape[1], settings.shared)) for x in arrays)
    tile = min(max(1, settings.elements // widest), pl.next_power_of_2(runs))
    flat = [x.reshape(runs, 2 * x.shape[4]) for x in arrays]
    turned = compat.call(
        functools.partial(_kernel, arrays=len(arrays), direction=direction, tile=tile, settings=settings),
        name="rope" if direction == 1 else "rope_backward",
        grid=(pl.cdiv(runs, tile),),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat),
        warps=settings.warps,
    )(positions.reshape(-1), inv_freq, *flat)
    return tuple(y.reshape(x.shape) for x, y in zip(arrays, turned, strict=True))


def _forward(
    arrays: Any, positions: Array, inv_freq: Array, direction: int, settings: Settings
) -> tuple[Any, tuple[Array, Array]]:
    return _turn(arrays, positions, inv_freq, direction, settings), (positions, inv_freq)


def _backward(
    direction: int, settings: Settings, saved: tuple[Array, Array], cotangents: Any
) -> tuple[Any, None, None]:
    return _turn(cotangents, *saved, -direction, settings), None, None


_turn.defvjp(_forward, _backward)


def default_settings(*arrays: Array) -> Settings:
    """What runs unless the caller says otherwise; float32 gets sines as exact as itself."""
    return Settings(fast=all(x.dtype.itemsize == 2 for x in arrays))


def _supported(*arrays: Array) -> None:
    if any(x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32) for x in arrays):
        raise NotImplementedError("the Pallas kernel turns 16-bit and 32-bit floats")
    if any(x.size == 0 for x in arrays):
        raise NotImplementedError("nothing to turn")
    if any(x.size >= 2**31 for x in arrays):
        raise NotImplementedError("places of elements are counted in 32 bits")
    verify()


def verify() -> None:
    """Raise NotImplementedError when the kernel is wrong on this device."""
    selfcheck.require("rope", _error)


def _error() -> float:
    """For `selfcheck`: queries and keys of one and of several tokens, far along."""
    rng, found = np.random.default_rng(0), []
    inv_freq = rng.uniform(0.01, 1.0, (5, 3)).astype(np.float32)
    for count in (1, *selfcheck.ROWS[-2:]):
        q, k = (jnp.asarray(rng.standard_normal((count, 1, 5, 2, heads)), jnp.bfloat16) for heads in (6, 3))
        args = q, k, jnp.asarray(rng.integers(0, 10**5, (count, 1)), jnp.int32), jnp.asarray(inv_freq)
        found.append(
            selfcheck.relative(
                jax.jit(lambda *args: rope_qk(*args))(*args), selfcheck.expected(reference.rope_qk, *args)
            )
        )
    return max(found)


def rope(
    x: Float[Array, "batch length pairs 2 heads"],
    positions: Int[Array, "batch length"],
    inv_freq: Float[Array, "pairs kv_heads"],
    settings: Settings | None = None,
) -> Float[Array, "batch length pairs 2 heads"]:
    """See api.rope. Raises NotImplementedError for float64, empty input and 2**31 elements or more."""
    _supported(x)
    turned: Any = _turn((x,), positions, inv_freq, 1, settings or default_settings(x))
    return turned[0]


def rope_qk(
    q: Float[Array, "batch length pairs 2 heads"],
    k: Float[Array, "batch length pairs 2 kv_heads"],
    positions: Int[Array, "batch length"],
    inv_freq: Float[Array, "pairs kv_heads"],
    settings: Settings | None = None,
) -> tuple[Float[Array, "batch length pairs 2 heads"], Float[Array, "batch length pairs 2 kv_heads"]]:
    """See api.rope_qk. Raises NotImplementedError as `rope`."""
    _supported(q, k)
    turned: Any = _turn((q, k), positions, inv_freq, 1, settings or default_settings(q, k))
    return turned
