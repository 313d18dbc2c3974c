"""Text in and out: prompts as token ids, and the text of tokens as they arrive."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from uniql_jax.chat_template import render_chat
from uniql_jax.errors import UserError
from uniql_jax.tokenizer import TOKENIZER_FILES, load_tokenizer

REPLACEMENT = "\ufffd"
SHORTEST_WINDOW = 16
"""Tokens that are decoded again for each new one before the window is moved on."""
NEVER_VALID = "<0xFF>"
"""A byte token that no UTF-8 text holds: appended, it shows what a byte-fallback decoder may still take back."""


# ---------------------------------------------------------------------------------------------- tokenizers


class Folder(str):
    """A model's folder as an absolute path that remembers which tokenizer files it held when the model was loaded.

    Another checkpoint in the same place must not lend its tokenizer to a model that is already in memory.
    """

    identity: tuple

    def __new__(cls, folder: str | Path) -> Folder:
        """Take down the files of a folder that need not exist."""
        self = super().__new__(cls, Path(folder).expanduser().absolute())
        self.identity = _identity(self)
        return self


def _identity(folder: str) -> tuple:
    """Name, inode, size and time of the files that a tokenizer is loaded from."""
    found = []
    for name in (*TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        try:
            stat = (Path(folder) / name).stat()
        except OSError:
            continue
        found.append((name, stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return tuple(found)


_loading = threading.Lock()


def folder_tokenizer(folder: str | None) -> Any | None:
    """The tokenizer of a model's folder, loaded once for as long as its files stay the same.

    Args:
        folder: a `Folder`, or any path; None for a model that came from no folder.

    Returns:
        A transformers tokenizer; None when the folder has none.

    Raises:
        UserError: the files cannot be used, or were replaced since the model was loaded (see `Folder`).
    """
    if folder is None:
        return None
    identity = _identity(folder)
    if isinstance(folder, Folder) and folder.identity != identity:
        raise UserError(f"the tokenizer files in {folder} have changed since the model was loaded; load it again")
    with _loading:  # transformers' imports do not bear several threads at a time
        return _load(str(Path(folder).absolute()), identity)


@functools.lru_cache(maxsize=4)
def _load(folder: str, identity: tuple) -> Any | None:
    return load_tokenizer(folder)


# ---------------------------------------------------------------------------------------------- prompts


def encode(tokenizer: Any, text: str, add_special_tokens: bool | None = None) -> list[int]:
    """Token ids of a text.

    Args:
        tokenizer: a transformers tokenizer.
        text: what to encode.
        add_special_tokens: None adds them as the tokenizer does by default, but no second BOS to a text that begins
            with one.

    Raises:
        UserError: the text is not Unicode.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise UserError(f"the text holds U+{code:04X} at character {error.start}, half of a surrogate pair") from None
    bos = getattr(tokenizer, "bos_token", None)
    if add_special_tokens is None:
        add_special_tokens = not (bos and text.startswith(bos))
    return list(
        tokenizer(text, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False)["input_ids"]
    )


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """Messages in the chat template, ready for the assistant's answer.

    Args:
        tokenizer: a transformers tokenizer.
        messages: {"role", "content"} of each turn.

    Raises:
        UserError: there is no template, or it refuses these messages.
    """
    return render_chat(tokenizer, messages, prompt=True)


def prompt_ids(tokenizer: Any, prompt: str, chat: bool = False) -> Int[np.ndarray, " t"]:
    """Token ids of a prompt.

    Args:
        tokenizer: a transformers tokenizer.
        prompt: the text.
        chat: whether the chat template is applied, with the prompt as the user's turn.

    Returns:
        int32 [length].

    Raises:
        UserError: as `encode` and `chat_text` do.
    """
    if not chat:
        return np.asarray(encode(tokenizer, prompt), np.int32)
    # a chat template writes its own special tokens
    return np.asarray(encode(tokenizer, chat_text(tokenizer, [{"role": "user", "content": prompt}]), False), np.int32)


# ---------------------------------------------------------------------------------------------- streams


class TextStream:
    """Text of tokens as they arrive; joined, it is the tokenizer's text of context and tokens less that of the context.

    A piece waits until no later token can change it: until a character whose bytes span tokens is whole, and, with byte
    fallback, until a run of byte tokens ends, all of which the decoder would take back for one byte too many.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()):
        """Begin after some tokens.

        Args:
            tokenizer: a transformers tokenizer.
            context: the ids before the first one.
        """
        self._tokenizer, self._probe = tokenizer, _byte_token(tokenizer)
        # ids: a window of what there is, which begins where text can be cut (at first: at the beginning).
        # shown: the window's text that is out already, or belongs to the context. cut: the last place to cut it.
        self._ids, self._cut = list(context), None
        self._shown = self._text(self._ids)

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def push(self, token: int) -> str:
        """The text that one more token makes certain; empty where it must wait."""
        ids = self._ids
        ids.append(token)
        whole, piece = self._text(ids), ""
        fixed = whole if self._probe is None else whole[: _common(whole, self._text([*ids, self._probe]))]
        fixed = fixed.rstrip(REPLACEMENT)
        # a context that ends inside a character has less text alone than within the whole
        known = _common(fixed, self._shown)
        if len(fixed) > known:
            piece, self._shown = fixed[known:], fixed
        if fixed == whole and self._shown == whole:
            window = ids[self._cut :] if self._cut is not None and len(ids) >= SHORTEST_WINDOW else []
            # The window may begin anew where its own text is the end of the whole; it must hold some text, since some
            # tokenizers drop the space of a first word.
            if window and (found := self._text(window)) and whole.endswith(found):
                self._ids, self._shown = window, found
            self._cut = len(self._ids)
        return piece

    def end(self) -> str:
        """The text that waited, once no more tokens come; characters that were never finished are dropped."""
        whole = self._text(self._ids)
        return whole[_common(whole, self._shown) :].rstrip(REPLACEMENT)


def decode_stream(tokenizer: Any, tokens: Iterator[int], context: Sequence[int] = ()) -> Iterator[str]:
    """`TextStream` over an iterator of ids.

    Args:
        tokenizer: a transformers tokenizer.
        tokens: ids as they are made.
        context: the ids before the first one.

    Yields:
        Text, never empty.
    """
    stream = TextStream(tokenizer, context)
    for token in tokens:
        if piece := stream.push(token):
            yield piece
    if rest := stream.end():
        yield rest


def _common(a: str, b: str) -> int:
    """Length of the longest common beginning."""
    if a.startswith(b) or b.startswith(a):
        return min(len(a), len(b))
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)


def _byte_token(tokenizer: Any) -> int | None:
    """The id of a byte that is never valid, where the tokenizer falls back to bytes."""
    found = tokenizer.convert_tokens_to_ids(NEVER_VALID)
    if found is None or tokenizer.convert_ids_to_tokens(found) != NEVER_VALID:
        return None
    return int(found)
