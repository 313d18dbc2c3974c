"""One token through the inside of a Mamba2 block in two kernels, the first of which reads and writes every state once,
in place; the second takes the norm, which needs the squares that all programs of the first have found.

The states are nearly all of the traffic; everything else a program needs it computes again, however many others do.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from uniql_jax.pallas_kernels import ahead, blocks, compat, selfcheck
from uniql_jax.pallas_kernels.ahead import Ahead, Pull
from uniql_jax.pallas_kernels.compat import pl
from uniql_jax.pallas_kernels.ssd import check
from uniql_jax.pallas_kernels.ssd.reference import Limits, Token, Weights, Window

ELEMENTS = 4096
"""About how many elements of the states a program holds in registers."""
NORMED = 1024
"""About how many elements a program of the norm takes."""
HEADS = 4
"""Most heads of a program by rule: they lie side by side in x, so that more of each sector it loads is used."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Heads of one group and channels that a program covers (powers of two), and its warps."""

    heads: int
    channels: int
    warps: int = 4


def settings(share: int, channels: int, states: int) -> Settings:
    """By rule, for groups of `share` heads: no head that is not there, and about ELEMENTS elements."""
    heads = HEADS
    while share % heads:
        heads //= 2
    room = max(1, ELEMENTS // (heads * pl.next_power_of_2(states)))
    return Settings(heads, min(pl.next_power_of_2(channels), room))


def _silu(x: Array) -> Array:
    return x / (1.0 + jnp.exp(-x))


def _softplus(x: Array) -> Array:
    return jnp.maximum(x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def _kernel(
    *refs: Any,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    tile: Settings,
    limits: Limits,
    pull: Pull,
) -> None:
    """refs: the arrays that `inputs` and `outputs` name; a program takes a tile of channels of a few heads of a group.

    Letters of the shapes: h head, p channel, s state.
    """
    ref = dict(zip(inputs + outputs, refs, strict=True))
    _, heads, channels, states = ref["state"].shape
    share, width = heads // ref["b"].shape[2], ref["x_kernel"].shape[2]
    row, group, of_heads, of_channels = (pl.program_id(axis) for axis in range(4))
    of_group = of_heads * tile.heads + jnp.arange(tile.heads)
    h, p = group * share + of_group, of_channels * tile.channels + jnp.arange(tile.channels)
    s = jnp.arange(pl.next_power_of_2(states))
    h_in, p_in, s_in = of_group < share, p < channels, s < states

    # First of all, so that the states are on their way while everything else is computed.
    at = (row, h[:, None, None], p[None, :, None], s[None, None, :])
    at_in = h_in[:, None, None] & p_in[None, :, None] & s_in[None, None, :]
    state = compat.load(ref["state"], at, at_in)
    grid = (ref["state"].shape[0], ref["b"].shape[2], pl.cdiv(share, tile.heads), pl.cdiv(channels, tile.channels))
    program = ((row * grid[1] + group) * grid[2] + of_heads) * grid[3] + of_channels
    pulled = [ref[name] for name in inputs if name.startswith("coming")]
    pull(pulled, program, math.prod(grid), early=True)

    def convolved(name: str, index: tuple[Any, Any], inside: Array) -> tuple[Array, list[Array]]:
        """SiLU of the convolution in the value's dtype, then float32, and its inputs, oldest first."""
        window = ref[f"{name}_window"]
        value = compat.load(ref[name], (row, *index), inside)
        kept = [compat.load(window, (row, k, *index), inside) for k in range(width - 1)]
        kept.append(value.astype(window.dtype))
        total = jnp.zeros(inside.shape, jnp.float32)
        for k in range(width):
            newest = value if k == width - 1 else kept[k].astype(value.dtype)
            weight = compat.load(ref[f"{name}_kernel"], (*index, k), inside)
            total = total + newest.astype(jnp.float32) * weight.astype(jnp.float32)
        if f"{name}_bias" in ref:
            total = total + compat.load(ref[f"{name}_bias"], index, inside).astype(jnp.float32)
        return _silu(total).astype(value.dtype).astype(jnp.float32), kept

    of_x, of_x_in = (p[None, :], h[:, None]), h_in[:, None] & p_in[None, :]  # [h, p]
    x, x_kept = convolved("x", of_x, of_x_in)
    b, b_kept = convolved("b", (s, group), s_in)
    c, c_kept = convolved("c", (s, group), s_in)

    def per_head(name: str) -> Array:
        return compat.load(ref[name], (h,), h_in).astype(jnp.float32)

    dt = compat.load(ref["dt"], (row, h), h_in).astype(jnp.float32) + per_head("dt_bias")
    dt = jnp.minimum(jnp.maximum(_softplus(dt), limits.dt_min), limits.dt_max)
    keep = jnp.exp(dt * -jnp.exp(per_head("a_log")))
    state = state * keep[:, None, None] + (x * dt[:, None])[:, :, None] * b[None, None, :]
    dtype = ref["x"].dtype
    y = jnp.sum(state * c[None, None, :], axis=2).astype(dtype).astype(jnp.float32)
    skip = (per_head("d")[:, None] * x).astype(dtype).astype(jnp.float32)
    y = (y + skip).astype(dtype).astype(jnp.float32)
    gated = y * _silu(compat.load(ref["z"], (row, *of_x), of_x_in).astype(jnp.float32))

    compat.barrier()
    compat.store(ref["state_after"], at, state, at_in)
    compat.store(ref["gated"], (row, *of_x), gated, of_x_in)
    mean = jnp.sum(gated * gated, axis=1) / limits.norm_width
    compat.store(ref["square"], (row, of_channels, group, of_group), mean, h_in)
    # Every program of a group reads the windows of B and C, so the new ones lie elsewhere; the first writes them.
    first = s_in & (of_heads == 0) & (of_channels == 0)
    for k in range(width - 1):
        compat.store(ref["x_after"], (row, k, *of_x), x_kept[k + 1], of_x_in)
        compat.store(ref["b_after"], (row, k, s, group), b_kept[k + 1], first)
        compat.store(ref["c_after"], (row, k, s, group), c_kept[k + 1], first)
    pull(pulled, program, math.prod(grid), early=False)


def _supported(arrays: dict[str, Array]) -> None:
    if any(value.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32) for value in arrays.values()):
        raise NotImplementedError("the Pallas kernel steps 16-bit and 32-bit floats")
    if arrays["state"].dtype != jnp.float32:
        raise NotImplementedError("the Pallas kernel keeps states in float32")
    if any(value.size == 0 for value in arrays.values()):
        raise NotImplementedError("nothing to step")
    verify()


def verify() -> None:
    """Raise NotImplementedError when the kernels are wrong on this device."""
    selfcheck.require("Mamba2 step", functools.partial(check.error, mixer_step))


def _norm_kernel(gated_ref: Any, square_ref: Any, weight_ref: Any, out_ref: Any, *, tile: int, eps: float) -> None:
    """One program norms a tile of channels of all heads, [p, group, head of the group]."""
    _, channels, heads = gated_ref.shape
    of_channels, groups = square_ref.shape[1], square_ref.shape[2]
    share = heads // groups
    row = pl.program_id(0)
    p = (pl.program_id(1) * tile + jnp.arange(tile))[:, None, None]
    g = jnp.arange(pl.next_power_of_2(groups))[None, :, None]
    of_group = jnp.arange(pl.next_power_of_2(share))[None, None, :]
    part = jnp.arange(pl.next_power_of_2(of_channels))[:, None, None]
    here = (g < groups) & (of_group < share)
    square = compat.load(square_ref, (row, part, g, of_group), here & (part < of_channels))
    scale = jax.lax.rsqrt(square.sum(axis=2).sum(axis=0) + eps)[None, :, None]
    head, inside = g * share + of_group, here & (p < channels)
    dtype = out_ref.dtype
    value = (compat.load(gated_ref, (row, p, head), inside) * scale).astype(dtype)
    value = value * compat.load(weight_ref, (p, head), inside).astype(dtype)
    at = jnp.where(inside, p * heads + head, channels * heads)  # what is masked lies outside
    compat.store(out_ref, blocks.index(out_ref, row, at), value, inside)


def _normed(
    gated: Float[Array, "batch hd nh"],
    square: Float[Array, "batch parts g share"],
    weight: Float[Array, "hd nh"],
    *,
    eps: float,
    dtype: Any,
    blocked: bool,
) -> Float[Array, "..."]:
    """The gated norm in one kernel, as a product reads it: [batch, hd * nh], or blocked; `square` is in parts, each
    divided by the width of the norm.
    """
    batch, channels, heads = gated.shape
    tile = min(pl.next_power_of_2(channels), max(1, NORMED // pl.next_power_of_2(heads)))
    shape = blocks.shape(batch, channels * heads, blocked)
    return compat.call(
        functools.partial(_norm_kernel, tile=tile, eps=eps),
        name="gated_norm",
        grid=(batch, pl.cdiv(channels, tile)),
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
    )(gated, square, weight)


# Compiled once for all layers of equal sizes.
@functools.partial(jax.jit, static_argnames=("limits", "blocked", "tile"))
def mix(
    token: Token,
    weights: Weights,
    windows: Window,
    limits: Limits,
    *,
    blocked: bool = False,
    tile: Settings | None = None,
    coming: Ahead = ahead.NOTHING,
) -> tuple[Float[Array, "..."], Window]:
    """`mixer_step` with its output as a product reads it, [batch, hd * nh] or `blocked` as blocks.py lays it
    out. `tile` replaces the rule's; `coming` is pulled into the cache meanwhile. Raises NotImplementedError as
    `mixer_step` does.
    """
    arrays = token._asdict() | dict(dt_bias=weights.dt_bias, a_log=weights.a_log, d=weights.d, state=windows.state)
    for name in ("x", "b", "c"):
        arrays |= {f"{name}_window": getattr(windows, name), f"{name}_kernel": getattr(weights.kernels, name)}
        bias = getattr(weights.kernels, f"{name}_bias")
        arrays |= {} if bias is None else {f"{name}_bias": bias}
    _supported(arrays | {"gate_norm": weights.gate_norm})
    arrays |= {f"coming {i}": array for i, array in enumerate(coming.arrays)}
    x, (_, states, groups) = token.x, token.b.shape
    batch, channels, heads = x.shape
    tile = tile or settings(heads // groups, channels, states)
    of_heads, of_channels = pl.cdiv(heads // groups, tile.heads), pl.cdiv(channels, tile.channels)
    after = {
        "gated": jax.ShapeDtypeStruct(x.shape, jnp.float32),
        "square": jax.ShapeDtypeStruct((batch, of_channels, groups, heads // groups), jnp.float32),
        "x_after": jax.ShapeDtypeStruct(windows.x.shape, windows.x.dtype),
        "b_after": jax.ShapeDtypeStruct(windows.b.shape, windows.b.dtype),
        "c_after": jax.ShapeDtypeStruct(windows.c.shape, windows.c.dtype),
        "state_after": jax.ShapeDtypeStruct(windows.state.shape, jnp.float32),
    }
    inputs, outputs = tuple(arrays), tuple(after)
    in_place = {"x_window": "x_after", "state": "state_after"}
    gated, square, *rest = compat.call(
        functools.partial(_kernel, inputs=inputs, outputs=outputs, tile=tile, limits=limits, pull=coming.pull),
        name="mixer_step",
        grid=(batch, groups, of_heads, of_channels),
        out_shape=tuple(after.values()),
        warps=tile.warps,
        aliases={inputs.index(old): outputs.index(new) for old, new in in_place.items()},
    )(*arrays.values())
    return _normed(gated, square, weights.gate_norm, eps=limits.eps, dtype=x.dtype, blocked=blocked), Window(*rest)


def mixer_step(
    token: Token, weights: Weights, windows: Window, limits: Limits, *, tile: Settings | None = None
) -> tuple[Float[Array, "batch hd nh"], Window]:
    """See api.mixer_step; `tile` replaces the rule's. Raises NotImplementedError for float64, empty input (a window of
    width 1, say) and states that are not float32.
    """
    hidden, windows = mix(token, weights, windows, limits, tile=tile)
    return hidden.reshape(token.x.shape), windows
