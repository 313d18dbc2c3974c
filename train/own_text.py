"""Text that a model writes itself, for sorting and recovery where no text is at hand, or beside what is.

What a model writes is spread over all kinds of text that it has learnt, so that recovery on it, with the model's own
logits as the teacher (--distill), wins back kinds that the text at hand does not hold.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from uniql_jax.checkpoint import is_elastic
from uniql_jax.errors import UserError
from uniql_jax.model.causal_lm import CausalLM, decode, init_cache, prefill
from uniql_jax.runtime import loading
from uniql_jax.tokenizer import load_tokenizer

WINDOWS, LENGTH, BATCH = 2048, 256, 64
EVERY = 30
"""Batches after which what is done is kept on disk, at least."""


@functools.partial(jax.jit, static_argnames="length")
def write_windows(
    model: CausalLM, first: Int[Array, " b"], key: PRNGKeyArray, temperature: Float[Array, ""] | float, length: int
) -> Int[Array, "b length"]:
    """Windows of `length` tokens that begin with `first`; each further token is drawn from softmax(logits /
    temperature), whatever it is: a text that ends is followed by another.
    """
    rows = jnp.zeros((first.shape[0], length), jnp.int32).at[:, 0].set(first)
    logits, cache = prefill(model, first[:, None], None, init_cache(model, first.shape[0], length))

    def body(step: Int[Array, ""], state: tuple) -> tuple:
        rows, logits, cache = state
        token = jax.random.categorical(jax.random.fold_in(key, step), logits / temperature, axis=-1).astype(jnp.int32)
        logits, cache = decode(model, token, cache)
        return rows.at[:, step].set(token), logits, cache

    return jax.lax.fori_loop(1, length, body, (rows, logits, cache))[0]


def beginnings(vocabulary: int, tokenizer: Any | None, ends: Sequence[int]) -> Int[np.ndarray, " ids"]:
    """Ids that a window may begin with: all but special ones and those that no text has."""
    special = {*ends, *(tokenizer.all_special_ids if tokenizer is not None else ())}
    known = vocabulary if tokenizer is None else min(vocabulary, len(tokenizer))
    return np.array([i for i in range(known) if i not in special], np.int32)


def own_text(
    model: CausalLM,
    windows: int,
    length: int,
    *,
    starts: Int[np.ndarray, " ids"],
    batch: int = BATCH,
    temperature: float | int = 1.0,
    seed: int = 0,
    done: Int[np.ndarray, "have length"] | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda batches: batches,
    keep: Callable[[Int[np.ndarray, "have length"]], object] = lambda rows: None,
) -> Int[np.ndarray, "windows length"]:
    """Token ids [windows, length] that the model writes, the first of each drawn from `starts`.

    `done` holds the first windows of the same call, which are not written again; `keep` gets what is done so far, now
    and then. What a window says depends on its number, `seed` and `batch` alone.
    """
    rows = [] if done is None else [done[: len(done) // batch * batch]]
    have = sum(map(len, rows)) // batch
    key = jax.random.key(seed)
    for i in progress(range(have, -(-windows // batch))):
        draw, write = jax.random.split(jax.random.fold_in(key, i))
        first = jax.random.choice(draw, jnp.asarray(starts), (batch,))
        rows.append(np.asarray(write_windows(model, first, write, jnp.float32(temperature), length)))
        if (i - have) % EVERY == EVERY - 1:
            keep(np.concatenate(rows))
    return np.concatenate(rows)[:windows]


def open_model(ckpt: str) -> CausalLM:
    """An elastic checkpoint, unpruned, or what `compress` takes as a source."""
    folder = Path(ckpt).expanduser()
    return loading.load(folder) if is_elastic(folder) else loading.load_source(ckpt)


def tokenizer_of(ckpt: str, model: CausalLM) -> Any | None:
    """The tokenizer beside a checkpoint, or None: windows then begin with any id."""
    folder = Path(model.folder or ckpt).expanduser()
    return load_tokenizer(folder) if folder.is_dir() else None


def npy_bytes(rows: Int[np.ndarray, "windows length"]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, rows)
    return buffer.getvalue()


def kept(folder: Path, told: dict[str, Any]) -> Int[np.ndarray, "have length"] | None:
    """What an unfinished run of these settings has written. Raises UserError where it is of others."""
    try:
        same = json.loads((folder / "run.json").read_text(encoding="utf-8")) == told
        rows = np.load(folder / "rows.npy") if (folder / "rows.npy").exists() else None
    except (OSError, ValueError):
        raise UserError(f"{folder} cannot be read; remove it to start anew") from None
    if not same:
        raise UserError(f"{folder} holds a run of other settings; remove it, or give the same ones again")
    return rows


if __name__ == "__main__":
    from uniql_jax.commands import run

    run("own-text")
