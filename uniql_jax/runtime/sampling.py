"""From logits to a token: temperature, top-k, top-p, and what they may be."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, Shaped, UInt

from uniql_jax.errors import UserError

NOT_FINITE = "the model's output is not finite; the checkpoint may be damaged"
HOTTEST = 1e30
"""Above any useful temperature, and still a float32."""
NO_TOKEN = -1
"""What `pick` returns where logits are not finite: the host refuses it, a compiled loop cannot raise."""

# Temperature, top_p, top_k: traced, so that changing them compiles nothing. None takes the likeliest token: known when
# code is traced, or every step would make a device ask the host which branch to run.
Settings = tuple[Any, Any, Any] | None


# Sorting a vocabulary takes a GPU longer than several layers do. What top-k and top-p retain is all above a threshold,
# and that is found digit by digit: each digit takes one pass over the vocabulary that compares it with all candidates.

DIGIT = {"cpu": 1, "gpu": 8}
"""Bits of a digit: fewer comparisons on a CPU, fewer launches on a GPU."""


def _search(
    bits: int, passes: Callable[[UInt[Array, "b candidates"]], Bool[Array, "b candidates"]], rows: int
) -> UInt[Array, " b"]:
    """The largest number of so many bits that passes, or 0; whatever is below one that passes must pass as well."""
    backend = jax.default_backend()
    digit = DIGIT.get(backend, 4)
    digits = -(-bits // digit)
    steps = jnp.arange(1, 1 << digit, dtype=jnp.uint32)

    def one(i: Int[Array, ""], found: UInt[Array, " b"]) -> UInt[Array, " b"]:
        shift = (digit * (digits - 1 - i)).astype(jnp.uint32)
        better = passes(found[:, None] + (steps << shift)[None])
        return found + (better.sum(axis=1, dtype=jnp.uint32) << shift)

    # A loop that a GPU runs is captured in no graph; a CPU compiles what is written out for seconds.
    return jax.lax.fori_loop(0, digits, one, jnp.zeros((rows,), jnp.uint32), unroll=backend == "gpu")


def _ordered(x: Float[Array, "b vocab"]) -> UInt[Array, "b vocab"]:
    """Integers in the order of the numbers; both zeros are one."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))


def _column(value: Any, rows: int, dtype: Any) -> Shaped[Array, "b 1"]:
    return jnp.broadcast_to(jnp.asarray(value, dtype).reshape(-1, 1), (rows, 1))


def filtered_logits(
    logits: Float[Array, "b vocab"],
    temperature: Float[Array, "..."] | float | int,
    top_p: Float[Array, "..."] | float | int = 1.0,
    top_k: Int[Array, "..."] | int = 0,
) -> Float[Array, "b vocab"]:
    """Logits over temperature, -inf where filtered out. Of equal ones those with the lower ids are the likelier ones.

    Args:
        logits: float logits of the next token.
        temperature: above 0; like the other settings of all rows or of each.
        top_p: below 1 retains the smallest set whose share of what `top_k` left reaches top_p.
        top_k: above 0 retains the k likeliest.

    Returns:
        float32, in the order of the vocabulary.
    """
    rows, size = logits.shape
    x = logits.astype(jnp.float32) / _column(temperature, rows, jnp.float32)
    top_p, top_k = _column(top_p, rows, jnp.float32), _column(top_k, rows, jnp.int32)
    top_k = jnp.where(top_k > 0, jnp.minimum(top_k, size), size)
    keys, mass = _ordered(x), jnp.exp(x - x.max(axis=1, keepdims=True))

    def total(inside: Bool[Array, "..."], of: Array | None = None) -> Shaped[Array, "..."]:
        of = None if of is None else of.reshape(rows, *(1,) * (inside.ndim - 2), size)
        return inside.sum(axis=-1, dtype=jnp.int32) if of is None else jnp.where(inside, of, 0.0).sum(axis=-1)

    def at_least(candidates: UInt[Array, "b c"]) -> Bool[Array, "b c vocab"]:
        return keys[:, None] >= candidates[:, :, None]

    def of_threshold(found: UInt[Array, " b"]) -> tuple[Array, Array, Array]:
        """The threshold, the mass above it, and that of one token at it."""
        tied = keys == found[:, None]
        return found[:, None], total(keys > found[:, None], mass)[:, None], jnp.where(tied, mass, 0.0).max(1)[:, None]

    edge, above, each = of_threshold(_search(32, lambda c: total(at_least(c)) >= top_k, rows))
    ties = top_k - total(keys > edge)[:, None]  # how many of the tokens at the threshold are among the k
    share = top_p * (above + ties * each)
    lower = _search(32, lambda c: total(at_least(c), mass) >= share, rows)
    cut, above, each = of_threshold(jnp.maximum(lower, edge[:, 0]))
    # Those at the threshold stay as long as what comes before them has less than the share.
    needed = jnp.ceil((share - above) / jnp.where(each > 0, each, 1.0))
    tied = keys == cut
    needed = jnp.clip(jnp.where(each > 0, needed, size), 1, jnp.where(cut == edge, ties, total(tied)[:, None]))
    at_one = top_p >= 1  # nothing may go, although a rounded sum can reach 1 early
    cut, needed = jnp.where(at_one, edge, cut), jnp.where(at_one, ties, needed.astype(jnp.int32))
    tied, ids = keys == cut, jnp.arange(size, dtype=jnp.uint32)
    end = _search(size.bit_length(), lambda c: total(tied[:, None] & (ids < c[:, :, None])) <= needed, rows)
    return jnp.where((keys > cut) | (tied & (ids < end[:, None])), x, -jnp.inf)


def sample(
    logits: Float[Array, "b vocab"],
    key: PRNGKeyArray | Key[Array, " b"],
    temperature: Float[Array, "..."] | float | int,
    top_p: Float[Array, "..."] | float | int = 1.0,
    top_k: Int[Array, "..."] | int = 0,
) -> Int[Array, " b"]:
    """One token per row: the likeliest at temperature 0, else drawn from `filtered_logits`.

    Args:
        logits: float logits of the next token.
        key: of the draw, or one for each row.
        temperature: 0 or more; like the other settings it may be traced, and of all rows or of each.
        top_p: see `filtered_logits`.
        top_k: see `filtered_logits`.

    Returns:
        Token ids, int32.
    """
    kept = filtered_logits(logits, jnp.maximum(temperature, 1e-6), top_p, top_k)
    # The largest of logits with Gumbel noise is a draw from their softmax.
    if key.ndim:
        noise = jax.vmap(lambda one: jax.random.gumbel(one, kept.shape[1:]))(key)
    else:
        noise = jax.random.gumbel(key, kept.shape)
    hot = _column(temperature, logits.shape[0], jnp.float32) > 0
    return jnp.argmax(jnp.where(hot, kept + noise, logits), axis=-1).astype(jnp.int32)


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
