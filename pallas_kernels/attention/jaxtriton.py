"""One token per sequence over a cache, through jax-triton: where Pallas has no Triton backend.

Several programs share the slots of a key/value head; XLA puts their parts together.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels import compat, jaxtriton, selfcheck
from uniql_jax.pallas_kernels.attention import decode_check
from uniql_jax.pallas_kernels.attention.caches import Caches
from uniql_jax.pallas_kernels.compat import pl

WIDEST = 256
"""Of a head."""


def _padded(size: int) -> int:
    """The tensor core's tile that holds so many."""
    return max(16, pl.next_power_of_2(size))


def launch(
    q: Float[Array, "b t n dk"],
    caches: Caches,
    start: Int[Array, " b"] | None,
    slot: Int[Array, ""] | int,
    *,
    scale: float | int,
) -> Float[Array, "b t n dv"]:
    """`cached_attention` without any question: t is 1."""
    from uniql_jax.pallas_kernels.attention import jaxtriton_kernels  # imports triton

    batch, _, heads, width = q.shape
    slots, groups, ranks = *caches.k.shape[1:3], caches.v.shape[3]
    tile = 64 if _padded(width) + _padded(ranks) <= 256 else 32  # two stages of keys and values fit 99 KiB
    split = max(1, min(2 * compat.cores() // (batch * groups), pl.cdiv(slots, tile), 16))
    share, eight = heads // groups, caches.k_scale is not None
    slot = jnp.asarray(slot, jnp.int32).reshape(1)
    parts = (batch, groups, split, share)
    found, top, total = jaxtriton.call(
        jaxtriton_kernels.attend,
        *(q, caches.k, caches.v, caches.k_scale if eight else q, caches.v_scale if eight else q),
        *(slot if start is None else start, slot, slots, groups, share, width, ranks),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((*parts, ranks), parts, parts)],
        grid=(batch, groups, split),
        name=f"attend_{8 if eight else 16}",
        stages=2,
        EIGHT=eight,
        STARTS=start is not None,
        SCALE=float(scale),
        WIDTH_ALIGNED=jaxtriton.alignment(width),
        RANKS_ALIGNED=jaxtriton.alignment(ranks),
        M=_padded(share),
        D=_padded(width),
        R=_padded(ranks),
        T=tile,
        SPLIT=split,
    )
    gain = jnp.exp(top - top.max(axis=2, keepdims=True))
    total = (total * gain).sum(axis=2)
    out = (found * gain[..., None]).sum(axis=2) / jnp.where(total > 0, total, 1.0)[..., None]
    return out.reshape(batch, 1, heads, ranks).astype(q.dtype)


def verify() -> None:
    """Raise NotImplementedError when the kernel is missing or wrong on this device."""
    lacking = jaxtriton.missing()
    if lacking is not None:
        raise NotImplementedError(lacking)
    error = functools.partial(decode_check.cached_error, launch)
    selfcheck.require("jax-triton attention", error, interface=True)


def cached_attention(
    q: Float[Array, "b t n dk"],
    caches: Caches,
    start: Int[Array, " b"] | None,
    slot: Int[Array, ""] | int,
    *,
    scale: float | int,
) -> Float[Array, "b t n dv"]:
    """See prefill.cached_attention. Raises NotImplementedError for several queries a row, and for float32."""
    if q.shape[1] != 1 or q.size == 0 or caches.v.size == 0:
        raise NotImplementedError(f"the kernel takes one query a row, not {q.shape[1]}")
    if max(q.shape[3], caches.v.shape[3]) > WIDEST:
        raise NotImplementedError(f"heads wider than {WIDEST} do not fit in registers")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the kernel attends in 16-bit floats, not {q.dtype}")
    verify()
    return launch(q, caches, start, slot, scale=scale)
