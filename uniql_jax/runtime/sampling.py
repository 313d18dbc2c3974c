"""From logits to a token: temperature, top-k, top-p, and what they may be."""

from __future__ import annotations

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from uniql_jax.errors import UserError

NOT_FINITE = "the model's output is not finite; the checkpoint may be damaged"
HOTTEST = 1e30
"""Above any useful temperature, and still a float32."""
NO_TOKEN = -1
"""What `pick` returns where logits are not finite: the host refuses it, a compiled loop cannot raise."""

# Temperature, top_p, top_k: traced, so that changing them compiles nothing. None takes the likeliest token: known when
# code is traced, or every step would make a device ask the host which branch to run.
Settings = tuple[Any, Any, Any] | None


def filtered_logits(
    logits: Float[Array, "b vocab"],
    temperature: Float[Array, ""] | float | int,
    top_p: Float[Array, ""] | float | int = 1.0,
    top_k: Int[Array, ""] | int = 0,
) -> tuple[Float[Array, "b vocab"], Int[Array, "b vocab"]]:
    """Logits over temperature in falling order, -inf where filtered out, and the token each belongs to.

    Args:
        logits: float logits of the next token.
        temperature: above 0.
        top_p: below 1 retains the smallest set whose share of what `top_k` left reaches top_p.
        top_k: above 0 retains the k likeliest.

    Returns:
        The filtered logits and, int32, the token of each.
    """
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1) / temperature
    rank = jnp.arange(logits.shape[-1])
    ranked = jnp.where((top_k <= 0) | (rank < top_k), ranked, -jnp.inf)
    chances = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(chances, axis=-1) - chances
    # the likeliest always stays; at 1 nothing may go, although a rounded sum can reach 1 early
    ranked = jnp.where((before < top_p) | (rank == 0) | (top_p >= 1), ranked, -jnp.inf)
    return ranked, order


def sample(
    logits: Float[Array, "b vocab"],
    key: PRNGKeyArray,
    temperature: Float[Array, ""] | float | int,
    top_p: Float[Array, ""] | float | int = 1.0,
    top_k: Int[Array, ""] | int = 0,
) -> Int[Array, " b"]:
    """One token per row: the likeliest at temperature 0, else drawn from `filtered_logits`.

    Args:
        logits: float logits of the next token.
        key: of the draw.
        temperature: 0 or more; like the other settings it may be traced.
        top_p: see `filtered_logits`.
        top_k: see `filtered_logits`.

    Returns:
        Token ids, int32.
    """

    def draw() -> Int[Array, " b"]:
        ranked, order = filtered_logits(logits, jnp.maximum(temperature, 1e-6), top_p, top_k)
        pick = jax.random.categorical(key, ranked, axis=-1)
        return jnp.take_along_axis(order, pick[:, None], axis=-1)[:, 0].astype(jnp.int32)

    return jax.lax.cond(jnp.asarray(temperature) > 0, draw, lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32))


def pick(
    logits: Float[Array, "b vocab"], key: PRNGKeyArray, step: Int[Array, ""] | int, settings: Settings
) -> Int[Array, " b"]:
    """The token that `settings` choose at a step, or NO_TOKEN where the logits hold NaN or infinity."""
    if settings is None:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        token = sample(logits, jax.random.fold_in(key, step), *settings)
    return jnp.where(jnp.isfinite(logits.max(axis=-1)), token, NO_TOKEN)


def settings_of(temperature: float | int, top_p: float | int, top_k: int, vocab_size: int) -> Settings:
    """Checked settings as the compiled steps take them."""
    if temperature == 0:
        return None
    return np.float32(temperature), np.float32(top_p), np.int32(min(top_k, vocab_size))


def check_sampling(temperature: float | int, top_p: float | int, top_k: int, max_new_tokens: int) -> None:
    """Raises UserError for settings that cannot be used."""
    if not _is(temperature, numbers.Real) or not 0 <= temperature < HOTTEST:
        raise UserError(f"temperature must be a finite number of 0 or more, not {temperature}")
    if not _is(top_p, numbers.Real) or not 0 < top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1, not {top_p}")
    if not _is(top_k, numbers.Integral) or top_k < 0:
        raise UserError(f"top_k must be an integer of 0 (off) or more, not {top_k}")
    if not _is(max_new_tokens, numbers.Integral) or max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be an integer of at least 1, not {max_new_tokens}")


def check_cache_bits(bits: int) -> None:
    """Raises UserError for a cache of neither 8 nor 16 bits."""
    if not _is(bits, numbers.Integral) or bits not in (8, 16):
        raise UserError(f"cache_bits must be 8 or 16, not {bits}")


def check_seed(seed: int) -> int:
    """The seed, or a UserError when it is no integer from 0 to 2**32 - 1 (JAX keeps no more bits of it)."""
    if not _is(seed, numbers.Integral) or not 0 <= seed < 2**32:
        raise UserError(f"seed must be an integer from 0 to {2**32 - 1}, not {seed}")
    return int(seed)


def _is(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
