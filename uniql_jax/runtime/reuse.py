"""What the rows of a batch have read, whether a request is at work in them or not: where a new prompt may begin.

A row keeps what it holds until another text takes its place, so that this costs no memory. Of attention alone any
number of tokens from the beginning on can be used; SSM states cannot go back, so that rows also keep those at their
prompt's end, see `steps.Marks`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from uniql_jax.runtime.lengths import SHORTEST
from uniql_jax.runtime.requests import Request


@dataclasses.dataclass
class Row:
    """A request in its row, and the tokens that were asked of the device for it, some of which may be on their way."""

    request: Request
    made: int = 0

    @property
    def held(self) -> int:
        """Tokens of it in the cache."""
        return len(self.request.prompt) + self.made - 1


@dataclasses.dataclass
class Text:
    """Tokens in a row of the cache: those of a request, from the slot `first` on.

    mark: how many of them the row's mark stands behind. used: when it was last of use; higher is later.
    """

    row: Row
    first: int
    mark: int
    used: int

    @property
    def tokens(self) -> Int[np.ndarray, " t"]:
        """Those that the cache holds, as far as they are known."""
        request = self.row.request
        made = np.asarray(request.tokens, np.int32)
        return np.concatenate([request.prompt, made])[: max(self.row.held, self.mark)]

    def usable(self, tokens: Int[np.ndarray, " t"], marks: bool) -> int:
        """How many tokens at the beginning of a prompt need not be read again. marks: only up to the mark, or none."""
        own = self.tokens
        shared = min(len(tokens), len(own))
        differ = np.flatnonzero(tokens[:shared] != own[:shared])
        common = int(differ[0]) if differ.size else shared
        if marks:
            return self.mark if common >= self.mark else 0
        return min(common, len(tokens) - 1)


class Texts:
    """The texts of all rows of a batch."""

    def __init__(self, rows: int, slots: int, padded: Callable[[int], int]):
        """padded: what so many tokens to be read are padded to."""
        self._texts: list[Text | None] = [None] * rows
        self._slots, self._padded = slots, padded
        self._clock = itertools.count()

    def forget(self) -> None:
        """The cache no longer holds them, or other weights made them."""
        self._texts = [None] * len(self._texts)

    def put(self, i: int, row: Row, first: int, count: int) -> None:
        """Row i now holds `count` tokens of a request from a slot on, and its mark is behind them."""
        self._texts[i] = Text(row, first, count, next(self._clock))

    @property
    def longest(self) -> int:
        """Most tokens of any."""
        return max((len(text.tokens) for text in self._texts if text is not None), default=0)

    def moves(self, by: int) -> Int[np.ndarray, " b"]:
        """How far each row goes where those at work go `by` slots: less where it would fall out. It then is there."""
        found = np.full(len(self._texts), by, np.int32)
        for i, text in enumerate(self._texts):
            if text is not None:
                found[i] = max(by, -text.first)
                text.first += int(found[i])
        return found

    def find(self, tokens: Int[np.ndarray, " t"], marks: bool) -> tuple[int, int, int]:
        """The row that holds most of a prompt's beginning, the slot of its first token, and how many to take: 0 where
        that is not worth it.
        """
        found = []
        for i, text in enumerate(self._texts):
            if text is not None:
                found.append((self._room(text.usable(tokens, marks), len(tokens), marks), text.used, i, text.first))
        count, _, i, first = max(found, default=(0, 0, 0, 0))
        return (i, first, count) if count >= SHORTEST else (0, 0, 0)

    def _room(self, count: int, length: int, marks: bool) -> int:
        """Fewer, where the rest and its padding would not fit behind them."""
        while count > 0 and length > count and count + self._padded(length - count) > self._slots:
            count = 0 if marks else self._slots - self._padded(length - count)
        return max(count, 0)

    def place(self, free: Sequence[int], source: int, count: int, marks: bool) -> int:
        """The free row for a prompt that takes `count` tokens of another: that row itself where all of use in it is
        taken, or most and no row is empty; else the one whose text was of use longest ago.
        """
        text = self._texts[source]
        if text is not None and count:
            text.used = next(self._clock)
            held = text.mark if marks else len(text.tokens)
            empty = any(self._texts[i] is None for i in free)
            if source in free and (count >= held - 1 or (not empty and 4 * count >= 3 * held)):
                return source
        return min(free, key=lambda i: -1 if (text := self._texts[i]) is None else text.used)
