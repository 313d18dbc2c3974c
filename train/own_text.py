"""Text that a model writes itself, for sorting and recovery where no text is at hand, or in addition to what is.

What a model writes is spread over all kinds of text that it was trained on, so that recovery on it, with the model's
own logits as the teacher (--distill), wins back kinds that the text at hand does not hold.
"""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from uniql_jax import console
from uniql_jax.chat_template import render_chat
from uniql_jax.checkpoint import is_elastic
from uniql_jax.compiling import jit
from uniql_jax.errors import UserError
from uniql_jax.manifest import Manifest, hash_array, settings_entries
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.model.decoding import decode, init_cache, prefill
from uniql_jax.runtime import loading
from uniql_jax.tokenizer import load_tokenizer
from uniql_jax.train.settings import OwnText
from uniql_jax.version import __version__

ROWS = "rows.npy"
"""What is done so far, in the work folder."""
EVERY = 30
"""Batches after which what is done is kept on disk, at least."""
OPENINGS = {"question": "Question:", "instruction": "Instruction:"}
MARK = "0f0f0f"
"""Stands for a user's words where the chat template is asked what comes before them."""


@functools.partial(jit, static_argnames="length")
def write_windows(
    model: CausalLM,
    begun: Int[Array, "b begun"],
    key: PRNGKeyArray,
    temperature: Float[Array, ""] | float,
    length: int,
    given: Int[Array, ""] | int | None = None,
) -> Int[Array, "b length"]:
    """Windows of `length` tokens that begin with the first `given` columns of `begun`, with all if that is None; each
    further token is drawn from softmax(logits / temperature), whatever it is: a text that ends is followed by another.
    """
    count = begun.shape[1] if given is None else given
    width = min(begun.shape[1], length)
    rows = jnp.zeros((len(begun), length), jnp.int32).at[:, :width].set(begun[:, :width])

    def body(step: Int[Array, ""], state: tuple) -> tuple:
        rows, logits, cache = state
        drawn = jax.random.categorical(jax.random.fold_in(key, step), logits / temperature, axis=-1)
        # What is given goes through the same step: one program, whatever windows begin with.
        token = jnp.where(step < count, rows[:, step], drawn.astype(jnp.int32))
        logits, cache = decode(model, token, cache)
        return rows.at[:, step].set(token), logits, cache

    logits, cache = prefill(model, rows[:, :1], None, init_cache(model, len(begun), length))
    return jax.lax.fori_loop(1, length, body, (rows, logits, cache))[0]


def beginnings(
    vocabulary: int, tokenizer: Any | None, ends: Sequence[int], shapes: Sequence[str] = ("text",)
) -> dict[str, Int[np.ndarray, "_ _"]]:
    """What windows of each shape may begin with, one to a row; shapes that the tokenizer cannot write are left out.

    A text begins with any id but special ones and those that no text has.
    """
    special = {*ends, *(tokenizer.all_special_ids if tokenizer is not None else ())}
    known = vocabulary if tokenizer is None else min(vocabulary, len(tokenizer))
    found = {"text": np.array([[i] for i in range(known) if i not in special], np.int32)}
    for shape in shapes:
        if tokenizer is None:
            continue
        if shape in OPENINGS:
            ids = list(tokenizer(OPENINGS[shape])["input_ids"])
            while len(ids) > 1 and ids[-1] in special:  # some tokenizers end every text, and here it goes on
                ids.pop()
        elif shape == "chat" and (opening := _user_turn(tokenizer)) is not None:
            ids = tokenizer(opening, add_special_tokens=False)["input_ids"]
        else:
            continue
        found[shape] = np.array([ids], np.int32)
    return {shape: found[shape] for shape in shapes if shape in found} or {"text": found["text"]}


def _user_turn(tokenizer: Any) -> str | None:
    """What the chat template writes before the words of a first user; None where it writes no such thing."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        text, mark, _ = render_chat(tokenizer, [{"role": "user", "content": MARK}]).partition(MARK)
    except UserError:
        return None
    return text if mark and text else None


def own_text(
    model: CausalLM,
    how: OwnText,
    begin: Mapping[str, Int[np.ndarray, "_ _"]],
    *,
    done: Int[np.ndarray, "have length"] | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda batches: batches,
    keep: Callable[[Int[np.ndarray, "have length"]], object] = lambda rows: None,
) -> Int[np.ndarray, "windows length"]:
    """Token ids [windows, length] that the model writes, each begun with a row of `begin`'s.

    `done` holds the first windows of the same call, which are not written again; `keep` gets what is done so far, now
    and then. What a window says depends on its number and `how` alone.
    """
    batch = min(how.batch, how.windows)
    rows = [] if done is None else [done[: len(done) // batch * batch]]
    have = sum(map(len, rows)) // batch
    key, shapes = jax.random.key(how.seed), list(begin.values())
    longest = max(shape.shape[1] for shape in shapes)
    for i in progress(range(have, -(-how.windows // batch))):
        draw, write = jax.random.split(jax.random.fold_in(key, i))
        shape = shapes[i % len(shapes)]
        first = jax.random.choice(draw, jnp.asarray(shape), (batch,))
        first, given = jnp.pad(first, ((0, 0), (0, longest - shape.shape[1]))), jnp.int32(shape.shape[1])
        temperature = jnp.float32(how.temperatures[i // len(shapes) % len(how.temperatures)])
        rows.append(np.asarray(write_windows(model, first, write, temperature, how.length, given)))
        if (i - have) % EVERY == EVERY - 1:
            keep(np.concatenate(rows))
    return np.concatenate(rows)[: how.windows]


def written(
    model: CausalLM,
    tokenizer: Any | None,
    how: OwnText,
    folder: Path,
    progress: Callable[[Iterable[int]], Iterable[int]],
    known: bool = False,
) -> Int[np.ndarray, "windows length"]:
    """`own_text` with what is done kept in a folder, from where the same call goes on.

    known: whether the folder is known to be of the same inputs; else it holds a manifest of them.

    Raises:
        UserError: the folder is of a run with other inputs, or damaged.
    """
    begin = beginnings(model.config.vocab_size, tokenizer, model.config.eos_ids, how.shapes)
    if not known:
        _require(folder, manifest(model, begin, how))

    def keep(rows: Int[np.ndarray, "have length"]) -> None:
        console.write_whole(folder / ROWS, npy_bytes(rows))

    rows = own_text(model, how, begin, done=kept(folder), progress=progress, keep=keep)
    keep(rows)
    return rows


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


def manifest(model: CausalLM, begin: Mapping[str, Int[np.ndarray, "_ _"]], how: OwnText) -> Manifest:
    """Every input that the text depends on: each tensor of the model, what windows begin with, and the settings."""
    entries = {"version": __version__} | {f"beginnings, {shape}": hash_array(rows) for shape, rows in begin.items()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        entries["model" + jax.tree_util.keystr(path)] = hash_array(leaf)
    return Manifest(entries | settings_entries(dataclasses.asdict(how), ""))


def _require(folder: Path, made_from: Manifest) -> None:
    """Give a new work folder its manifest; UserError where it has another."""
    before = Manifest.load(folder / "run.json")
    if before is None:
        made_from.save(folder / "run.json")
    else:
        before.require(made_from, folder)


def kept(folder: Path) -> Int[np.ndarray, "have length"] | None:
    """The rows in the work folder of an unfinished run, or None where there are none; UserError for damaged ones."""
    try:
        return np.load(folder / ROWS) if (folder / ROWS).exists() else None
    except (OSError, ValueError, EOFError):
        raise UserError(f"{folder / ROWS} cannot be read; remove {folder} to start anew") from None


if __name__ == "__main__":
    from uniql_jax.commands import run

    run("own-text")
