"""Text that a model writes itself, for sorting and recovery where no text is at hand, or in addition to what is.

What a model writes is spread over all kinds of text that it was trained on, so that recovery on it, with the model's
own logits as the teacher (--distill), wins back kinds that the text at hand does not hold.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from uniql_jax.checkpoint import is_elastic
from uniql_jax.errors import UserError
from uniql_jax.manifest import Manifest, hash_array, settings_entries
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.model.decoding import decode, init_cache, prefill
from uniql_jax.runtime import loading
from uniql_jax.tokenizer import load_tokenizer
from uniql_jax.version import __version__

BATCH = 64
ROWS = "rows.npy"
"""What is done so far, in the work folder."""
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
    """The tokenizer of a checkpoint, or None: windows then begin with any id."""
    folder = Path(model.folder or ckpt).expanduser()
    return load_tokenizer(folder) if folder.is_dir() else None


def npy_bytes(rows: Int[np.ndarray, "windows length"]) -> bytes:
    """Token ids as the content of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, rows)
    return buffer.getvalue()


def manifest(model: CausalLM, starts: Int[np.ndarray, " ids"], settings: dict[str, Any]) -> Manifest:
    """Every input that the text depends on: each tensor of the model, the ids to begin with, and the settings."""
    entries = {"version": __version__, "first ids": hash_array(starts)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        entries["model" + jax.tree_util.keystr(path)] = hash_array(leaf)
    return Manifest(entries | settings_entries(settings, ""))


def kept(folder: Path, made_from: Manifest) -> Int[np.ndarray, "have length"] | None:
    """The rows in the work folder of an unfinished run, or None where there are none; a new folder gets the manifest.

    Raises:
        UserError: the folder is of a run with other inputs, or damaged.
    """
    before = Manifest.load(folder / "run.json")
    if before is None:
        made_from.save(folder / "run.json")
        return None
    before.require(made_from, folder)
    try:
        return np.load(folder / ROWS) if (folder / ROWS).exists() else None
    except (OSError, ValueError, EOFError):
        raise UserError(f"{folder / ROWS} cannot be read; remove {folder} to start anew") from None


if __name__ == "__main__":
    from uniql_jax.commands import run

    run("own-text")
