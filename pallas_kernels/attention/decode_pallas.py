"""One token per sequence against a pruned cache in one launch of decode_kernel.py: what it takes, how it is cut."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels import ahead, blocks, compat, selfcheck
from uniql_jax.pallas_kernels.ahead import Ahead
from uniql_jax.pallas_kernels.attention import decode_check
from uniql_jax.pallas_kernels.attention.caches import Caches
from uniql_jax.pallas_kernels.attention.decode_kernel import HEADS, Settings, kernel
from uniql_jax.pallas_kernels.attention.decode_reference import Place, Token
from uniql_jax.pallas_kernels.compat import pl

PROGRAMS = 264
"""Programs that fill a large GPU twice."""


def settings(batch: int, groups: int, slots: int) -> Settings:
    """By rule: enough programs to fill a GPU, none without a tile."""
    tile = 64
    return Settings(tile, max(1, min(PROGRAMS // (batch * groups), pl.cdiv(slots, tile), 32)))


def _supported(token: Token, caches: Caches) -> None:
    arrays = [x for x in (*token, caches.k, caches.v) if x is not None]
    if any(x.size == 0 for x in arrays):
        raise NotImplementedError("nothing to attend to")
    if token.q.shape[-1] // caches.k.shape[2] > HEADS:
        raise NotImplementedError(f"more than {HEADS} query heads share a key/value head")
    if max(caches.k.shape[3], caches.v.shape[3]) > 256:
        raise NotImplementedError("heads wider than 256 do not fit in registers")
    kinds = (jnp.bfloat16, jnp.float16) if not compat.interpreted() else (jnp.bfloat16, jnp.float16, jnp.float32)
    if any(x.dtype not in kinds for x in arrays if x.dtype != jnp.int8):
        raise NotImplementedError("the kernel attends in 16-bit floats")
    verify()


def verify() -> None:
    """Raise NotImplementedError when the kernel is wrong on this device."""
    selfcheck.require("decode attention", functools.partial(decode_check.error, decode))


def counters(batch: int, groups: int) -> Int[Array, "b g"]:
    """The counts that `decode` wants, zero: made once a step, and handed from layer to layer."""
    return jnp.zeros((batch, groups), jnp.int32)


def decode(
    token: Token,
    caches: Caches,
    inv_freq: Float[Array, "qk g"] | None,
    place: Place,
    *,
    scale: float,
    cut: Settings | None = None,
) -> tuple[Float[Array, "b vo n"], Caches]:
    """See decode.decode; `cut` replaces the rule's. Raises NotImplementedError for what the kernel cannot do."""
    batch, _, groups, _ = caches.k.shape
    done = counters(batch, groups)
    out, caches, _ = attend(token, caches, inv_freq, place, done, scale=scale, cut=cut)
    return out.reshape(batch, caches.v.shape[3], -1), caches


# Compiled once for all layers of equal sizes.
@functools.partial(jax.jit, static_argnames=("scale", "blocked", "cut"))
def attend(
    token: Token,
    caches: Caches,
    inv_freq: Float[Array, "qk g"] | None,
    place: Place,
    done: Int[Array, "b g"],
    *,
    scale: float,
    blocked: bool = False,
    cut: Settings | None = None,
    coming: Ahead = ahead.NOTHING,
) -> tuple[Float[Array, "..."], Caches, Int[Array, "b g"]]:
    """`decode` with its output as a product reads it, [b, vo * n] or `blocked` as blocks.py lays it out,
    and the counts to hand on. `coming` is pulled into the cache meanwhile. Raises NotImplementedError for what the
    kernel cannot do.
    """
    compat.triton()
    _supported(token, caches)
    batch, slots, groups, _ = caches.k.shape
    ranks, heads = caches.v.shape[3], token.q.shape[3]
    cut = cut or settings(batch, groups, slots)
    arrays: dict[str, Array] = dict(q=token.q, k=token.k, v=token.v, k_cache=caches.k, v_cache=caches.v, done=done)
    arrays |= dict(slot=jnp.asarray(place.slot, jnp.int32).reshape(1))
    optional = dict(q_pass=token.q_pass, k_pass=token.k_pass, inv_freq=inv_freq, start=place.start)
    optional |= dict(k_scale=caches.k_scale, v_scale=caches.v_scale)
    arrays |= {name: value for name, value in optional.items() if value is not None}
    arrays |= {f"coming {i}": array for i, array in enumerate(coming.arrays)}
    flat = blocks.shape(batch, ranks * heads, blocked)
    after = {
        "out": jax.ShapeDtypeStruct(flat, token.q.dtype),
        "k_after": jax.ShapeDtypeStruct(caches.k.shape, caches.k.dtype),
        "v_after": jax.ShapeDtypeStruct(caches.v.shape, caches.v.dtype),
        "done_after": jax.ShapeDtypeStruct(done.shape, jnp.int32),
    }
    in_place = {"k_cache": "k_after", "v_cache": "v_after", "done": "done_after"}
    for name in ("k_scale", "v_scale"):
        if name in arrays:
            after[f"{name}_after"] = jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype)
            in_place[name] = f"{name}_after"
    if cut.split > 1:
        parts, share = (batch, groups, cut.split), heads // groups
        after |= {
            "parts": jax.ShapeDtypeStruct((*parts, share, ranks), jnp.float32),
            "tops": jax.ShapeDtypeStruct((*parts, share), jnp.float32),
            "totals": jax.ShapeDtypeStruct((*parts, share), jnp.float32),
        }
    inputs, outputs = tuple(arrays), tuple(after)
    found = compat.call(
        functools.partial(kernel, inputs=inputs, outputs=outputs, cut=cut, scale=scale, pull=coming.pull),
        name="decode_attention",
        grid=(batch, groups, cut.split),
        out_shape=tuple(after.values()),
        warps=cut.warps,
        aliases={inputs.index(old): outputs.index(new) for old, new in in_place.items()},
    )(*arrays.values())
    new = dict(zip(outputs, found, strict=True))
    scales = new.get("k_scale_after"), new.get("v_scale_after")
    return new["out"], Caches(new["k_after"], new["v_after"], *scales), new["done_after"]
