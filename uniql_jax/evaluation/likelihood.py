"""How likely a model finds text, token by token, with logits that never exist all at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from uniql_jax import elastic
from uniql_jax.compiling import jit
from uniql_jax.errors import UserError
from uniql_jax.model.causal_lm import CausalLM, hidden_states, logits
from uniql_jax.plan import Plan
from uniql_jax.runtime.sampling import NOT_FINITE

LOGITS = 2**25
"""Logits held at a time: 128 MB in float32, about three times that while they are reduced."""
LEAST = 32
"""Tokens of the shortest shape that is compiled for continuations; longer ones double."""
BROKEN = NOT_FINITE
Pair = tuple[Sequence[int], Sequence[int]]
Masks = tuple[elastic.Keep, ...]
"""Kept sizes, one mapping a layer: the same result as a model loaded at them."""


def rows_at_once(vocabulary: int, count: int) -> int:
    """Positions whose logits are made at a time, of `count`."""
    return max(1, min(count, LOGITS // vocabulary))


def masks(plan: Plan, rate: float) -> Masks:
    """The kept sizes at a prune rate, as numbers that a compiled program takes: one program for all rates."""
    return tuple({axis: jnp.int32(count) for axis, count in kept.items()} for kept in plan.keep(rate))


@functools.partial(jit, static_argnames="rows")
def token_nll(
    model: CausalLM, tokens: Int[Array, "b t"], rows: int, keep: Masks | None = None
) -> tuple[Float[Array, "b t-1"], Bool[Array, "b t-1"]]:
    """-log p(token | tokens before it in its row), nats, float32, of all tokens but the first, and whether none is
    likelier; `rows` positions at a time, at the sizes of `keep`.
    """
    hidden = hidden_states(model, tokens, keep=keep)[:, :-1]
    batch, length, width = hidden.shape
    count = batch * length
    spare = -count % rows
    hidden = jnp.pad(hidden.reshape(count, width), ((0, spare), (0, 0)))
    targets = jnp.pad(tokens[:, 1:].reshape(count), (0, spare))

    def part(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        x, target = chunk
        scores = logits(model, x)
        found = jnp.take_along_axis(scores, target[:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(scores, axis=-1) - found, found >= scores.max(axis=-1)

    nll, first = jax.lax.map(part, (hidden.reshape(-1, rows, width), targets.reshape(-1, rows)))
    return tuple(value.reshape(-1)[:count].reshape(batch, length) for value in (nll, first))


def continuations(
    model: CausalLM,
    pairs: Sequence[Pair],
    window: int,
    batch_tokens: int = 4096,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = list,
    keep: Masks | None = None,
) -> list[tuple[float, bool]]:
    """(log p of the continuation after its context, nats; whether every token of it is the likeliest) of every pair of
    token ids. Both have one token at least; of more tokens than `window` the last ones are seen.

    Rows are padded behind, where nothing looks, to few lengths, about `batch_tokens` a batch: few programs. Raises
    UserError for a pair without context or continuation, and when the model's output is not finite.
    """
    if not all(len(context) and len(continuation) for context, continuation in pairs):
        raise UserError("a text to be rated needs at least one token of context and one of continuation")
    whole = [([*context, *continuation])[-window:] for context, continuation in pairs]
    counts = [min(len(continuation), len(row) - 1) for (_, continuation), row in zip(pairs, whole, strict=True)]
    shapes: dict[int, list[int]] = {}
    for i, row in enumerate(whole):
        length = LEAST
        while length < len(row):
            length *= 2
        shapes.setdefault(min(length, max(window, 2)), []).append(i)
    batches = []
    for length, members in sorted(shapes.items(), reverse=True):  # the one that needs most memory first
        size = min(max(1, batch_tokens // length), len(members))
        batches += [(length, size, members[i : i + size]) for i in range(0, len(members), size)]
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    for length, size, members in progress(batches):
        tokens = np.zeros((size, length), np.int32)
        for place, i in enumerate(members):
            tokens[place, : len(whole[i])] = whole[i]
        rows = rows_at_once(model.config.vocab_size, size * (length - 1))
        nll, first = (np.asarray(value) for value in token_nll(model, jax.device_put(tokens), rows, keep))
        for place, i in enumerate(members):
            end = len(whole[i]) - 1
            part = slice(end - counts[i], end)
            found[i] = -float(np.asarray(nll[place, part], np.float64).sum()), bool(first[place, part].all())
            if not math.isfinite(found[i][0]):
                raise UserError(BROKEN)
    return found
