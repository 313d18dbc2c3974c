"""Causal attention by cuDNN's fused kernels: on NVIDIA GPUs, no score ever leaves the chip.

cuDNN knows padding only at the end of a sequence. So padded sequences are packed to the front, which keeps the order of
their tokens and thus who sees whom, and unpacked afterwards.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from uniql_jax.pallas_kernels import compat

MULTIPLE = 8
"""Head widths that cuDNN takes: multiples of this, up to `widest()`."""
SHORTEST = 64
"""Fewer tokens are left to the reference: cuDNN's tiles would stay half empty, and their scores are few."""


def widest() -> int:
    """Widest head: 256 on data-centre GPUs since Hopper, else 128."""
    return 256 if 9.0 <= compat.capability() < 12.0 else 128


def supported(q: Array, k: Array, v: Array) -> None:
    """Raise NotImplementedError for what cuDNN does not do, or not better."""
    if not compat.ampere():
        raise NotImplementedError("cuDNN's fused attention needs an NVIDIA GPU of compute capability 8.0 or newer")
    if q.dtype not in (jnp.bfloat16, jnp.float16) or not q.dtype == k.dtype == v.dtype:
        raise NotImplementedError(f"cuDNN's fused attention is for 16-bit floats, not {q.dtype}, {k.dtype}, {v.dtype}")
    if max(q.shape[3], v.shape[3]) > widest():
        raise NotImplementedError(f"heads {q.shape[3]} and {v.shape[3]} wide: cuDNN takes up to {widest()} here")
    if q.shape[1] < SHORTEST or q.size == 0 or v.size == 0:
        raise NotImplementedError(f"cuDNN's fused attention is used from {SHORTEST} tokens up")


@jax.custom_vjp
def _permute(
    x: Float[Array, "b t n d"], order: Int[Array, "b t"], inverse: Int[Array, "b t"]
) -> Float[Array, "b t n d"]:
    """x[b, order[b, t]]; `inverse` undoes `order`. Its gradient is a gather too, where jnp's is a scatter."""
    return jnp.take_along_axis(x, order[:, :, None, None], axis=1, mode="promise_in_bounds")


def _permute_forward(x: Array, order: Array, inverse: Array) -> tuple[Array, tuple[Array, Array]]:
    return _permute(x, order, inverse), (order, inverse)


def _permute_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, None, None]:
    order, inverse = saved
    return _permute(cotangent, inverse, order), None, None


_permute.defvjp(_permute_forward, _permute_backward)


def causal_attention(
    q: Float[Array, "b t n dk"],
    k: Float[Array, "b t g dk"],
    v: Float[Array, "b t g dv"],
    valid: Bool[Array, "b t"] | None = None,
    *,
    scale: float | int,
) -> Float[Array, "b t n dv"]:
    """See prefill.causal_attention. Raises NotImplementedError as `supported` says.

    Pruned heads are widened with zeros, which changes no score and no value.
    """
    supported(q, k, v)
    width = -(-max(q.shape[3], v.shape[3]) // MULTIPLE) * MULTIPLE

    def widen(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[3])))

    def attend(q: Array, k: Array, v: Array, lengths: Array | None = None) -> Array:
        out = jax.nn.dot_product_attention(
            widen(q),
            widen(k),
            widen(v),
            scale=float(scale),
            is_causal=True,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            implementation="cudnn",
        )
        return out[..., : v.shape[3]]

    if valid is None:
        return attend(q, k, v)
    real = valid[:, :, None, None]
    order = jnp.argsort(~valid, axis=1, stable=True).astype(jnp.int32)
    inverse = jnp.argsort(order, axis=1).astype(jnp.int32)
    # A length of 0 is no case that cuDNN is known for; what it gives beyond a length, forward or back, is not used.
    lengths = jnp.maximum(valid.sum(axis=1, dtype=jnp.int32), 1)
    q, k, v = (_permute(jnp.where(real, x, 0), order, inverse) for x in (q, k, v))
    return jnp.where(real, _permute(attend(q, k, v, lengths), inverse, order), 0)
