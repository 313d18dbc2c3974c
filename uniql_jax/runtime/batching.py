"""Continuous batching: requests of any length join rows of one running batch, and leave them as they end.

The host knows everything but the tokens: which rows run, the slot, how many tokens each row holds. Not thread-safe:
`engine.Engine` holds its lock around every call.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from uniql_jax.runtime import steps
from uniql_jax.runtime.choice import Choice
from uniql_jax.runtime.compiled import Compiled, Shape
from uniql_jax.runtime.flights import Flight, variant_of
from uniql_jax.runtime.generation import chunk
from uniql_jax.runtime.lengths import SHORTEST
from uniql_jax.runtime.requests import Request
from uniql_jax.runtime.reuse import Row, Texts
from uniql_jax.runtime.steps import Chosen, Sampling, Variant

_NOTHING = steps.Source(0, 0, 0)


class Batch:
    """Rows, queue and cache of a running batch. `size` is what new tokens are reported to be made at."""

    def __init__(self, shape: Shape):
        self.shape = shape
        self.rows: list[Row | None] = [None] * shape.rows
        self.waiting: collections.deque[Request] = collections.deque()
        self.size: Choice
        self.slot = 0
        self.cache: Any = None
        self.marks: Any = None
        self.params: Any = None
        self._compiled: Compiled
        self._token: Any = np.zeros(shape.rows, np.int32)
        self._sampling = Sampling.empty(shape.rows)
        self._flights: collections.deque[Flight] = collections.deque()
        self._whole = False  # whether the cache holds what the rows say
        self._texts = Texts(shape.rows, shape.slots, shape.padded)

    def use(self, compiled: Compiled, params: Any, cache: Any, size: Choice) -> None:
        """Go on with these weights. cache: of their sizes, with all rows in it; None: rows are read again."""
        assert not self._flights
        self._compiled, self.params, self.size = compiled, params, size
        self.cache = cache
        self._texts.forget()  # what other weights made of them
        self.marks = None if cache is None or compiled.marks is None else compiled.empty_marks()(cache)
        self._whole = cache is not None

    def give_cache(self) -> Any:
        """The cache, if it holds what the rows say, to be changed; the batch has none until `use`."""
        assert not self._flights
        cache, self.cache, self.marks = (self.cache if self._whole else None), None, None
        self._whole = False
        return cache

    def cache_bytes(self) -> int:
        """Bytes of the cache as it is, and of its marks."""
        cache, marks = self.cache, self.marks  # another thread may take them away
        return (0 if cache is None else int(cache.nbytes)) + sum(int(x.nbytes) for x in jax.tree.leaves(marks))

    def seconds_per_token(self, repeats: int = 5) -> float:
        """Least seconds of several steps without requests, per token of a row."""
        assert not self.busy
        self._read_again()
        self._whole = False
        program, sampling = self._compiled.advance(Variant()), Sampling.empty(self.shape.rows)
        forced = np.full((self.shape.rows, chunk()), steps.FREE, np.int32)
        taken = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(self._run(program, sampling, forced))
            taken.append(time.perf_counter() - start)
        self._whole = True
        return min(taken) / chunk()

    @property
    def active(self) -> list[tuple[int, Row]]:
        """Rows at work."""
        return [(i, row) for i, row in enumerate(self.rows) if row is not None]

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self._flights or self.active)

    def step(self) -> None:
        """Let requests join, make the next tokens of all rows, and hand out those that are there."""
        for i, row in self.active:
            if row.request.reason is not None:
                self.rows[i] = None
        if not self._whole:
            self._read_again()
        self._join()
        dispatched = bool(self.active)
        if dispatched:
            self._advance()
        # The newest step stays on its way while the host looks at the one before, so that a device never waits.
        self.land(1 if dispatched else 0)

    def land(self, stay: int = 0) -> None:
        """Look at all steps but the newest `stay`."""
        while len(self._flights) > stay:
            self._flights[0].hand_out()
            self._flights.popleft()  # last: after an interrupt, what is handed out already is left out

    @property
    def requests(self) -> list[Request]:
        """Those at work, then those that wait."""
        return [*(row.request for _, row in self.active), *self.waiting]

    def drop(self, requests: Collection[Request]) -> None:
        """Go on without these; what was made for them must have landed."""
        assert not self._flights
        self.rows = [None if row is None or row.request in requests else row for row in self.rows]
        self.waiting = collections.deque(request for request in self.waiting if request not in requests)

    def fail(self, error: BaseException) -> None:
        """End every request with an error."""
        self._flights.clear()
        for _, row in self.active:
            row.request.finish("error", error)
        while self.waiting:
            self.waiting.popleft().finish("error", error)
        self.rows = [None] * self.shape.rows
        self._whole = False

    # ---------------------------------------------------------------------------------------- what a step does
    # `_whole` is false while cache and rows do not agree. An interrupt in between leaves it so, and the next step reads
    # all texts again: the cache is donated to the step that fills it, so that an interrupted one may have lost it.

    def _run(self, program: Any, *rest: Any) -> Chosen:
        chosen, self._token, self.cache = program(self.params, self._placed(), self._token, *rest)
        return chosen

    def _read(self, program: Any, *rest: Any) -> Any:
        logits, self.cache, self.marks = program(*rest)
        return logits

    def _placed(self) -> Any:
        # A row without a request begins at the slot, so that nothing is read for it.
        held = [0 if row is None else row.held for row in self.rows]
        start = np.maximum(self.slot - np.asarray(held, np.int32), 0)
        return dataclasses.replace(self.cache, start=start, slot=np.int32(self.slot))

    def _move(self, slot: int) -> None:
        """Move all rows so that the next token goes to `slot`."""
        if slot != self.slot and self.active:
            by = self._texts.moves(slot - self.slot)
            self.cache = self._compiled.shift()(self._placed(), by, np.int32(slot))
        self.slot = slot

    def _join(self) -> None:
        free = [i for i, row in enumerate(self.rows) if row is None]
        while free and self.waiting:
            requests = self._next(len(free))
            # One of several that another thread cancels now is read all the same, as their program takes so many.
            going = requests if len(requests) > 1 or requests[0].reason is None else []
            if going:
                self._whole = False
                longest = max(request.length for request in going)
                if longest > self.slot:
                    self._move(longest)
                reuses, marks = self._compiled.reuses, self.marks is not None
                # Those that are read together have nothing in a row.
                source = self._texts.find(going[0].text, marks) if reuses and len(going) == 1 else _NOTHING
                joined = {}
                for request in going:
                    i = self._texts.place(free, source[0], source[2], marks)
                    free.remove(i)
                    joined[i] = self.rows[i] = Row(request)
                self._admit(joined, steps.Source(*source))
                self._whole = True
            for request in requests:
                if self.waiting and self.waiting[0] is request:
                    self.waiting.popleft()

    def _next(self, free: int) -> list[Request]:
        """The first of those that wait, and those after it that are read together with it."""
        many, _ = self.shape.together
        found = list(itertools.islice(self.waiting, many)) if free >= many else []
        return found if self._together(found) else [self.waiting[0]]

    def _together(self, requests: Sequence[Request]) -> bool:
        """Whether these are read at once: as many as are, short, and with nothing to take from a row or each other."""
        many, short = self.shape.together
        if many == 1 or len(requests) != many or any(r.reason or r.length > short for r in requests):
            return False
        texts, marks = [request.text for request in requests], self.marks is not None
        if not self._compiled.reuses:
            return True
        if any(self._texts.find(text, marks)[2] for text in texts):
            return False
        beginnings = {text[:SHORTEST].tobytes() for text in texts if len(text) > SHORTEST}
        return len(beginnings) == sum(len(text) > SHORTEST for text in texts)

    def _admit(self, joined: Mapping[int, Row], source: steps.Source = _NOTHING) -> None:
        """Read the texts of rows, which end just before the slot: one from what the source has of it on, or several."""
        index, rows = np.asarray(list(joined), np.int32), list(joined.values())
        requests = [row.request for row in rows]
        texts = [request.text for request in requests]
        logits = self._prompt(texts[0], index[0], source) if len(rows) == 1 else self._prompts(texts, index)
        sampling: Any = Sampling.empty(len(rows))
        for j, (i, request) in enumerate(zip(joined, requests, strict=True)):
            settings = request.settings
            own = settings.temperature, settings.top_p, min(settings.top_k, 2**31 - 1), settings.seed, 0
            for whole, part, value in zip(jax.tree.leaves(self._sampling), jax.tree.leaves(sampling), own, strict=True):
                whole[i] = part[j] = value
        made = [request.tokens for request in requests]
        last = [m[-1] if m else r.forced(0, 1)[0] for m, r in zip(made, requests, strict=True)]
        first = self._compiled.first(variant_of(requests), len(rows))
        chosen, self._token = first(logits, self._token, index, sampling, np.asarray(last, np.int32))
        new = [(j, request, 0) for j, request in enumerate(requests) if not made[j]]
        if new:
            self._flights.append(Flight(chosen, new, self.size))
        for (i, row), text, tokens in zip(joined.items(), texts, made, strict=True):
            row.made = len(tokens)
            if not tokens:
                row.request.cached = int(source.count)
                row.made = 1
            self._texts.put(i, row, self.slot - len(text), len(text))
            if row.made >= row.request.settings.max_new_tokens:
                self.rows[i] = None

    def _prompts(self, texts: Sequence[np.ndarray], index: np.ndarray) -> Any:
        """The logits after texts that rows then hold."""
        tokens = np.stack([np.pad(text, (self.shape.together[1] - len(text), 0)) for text in texts])
        counts = np.asarray([len(text) for text in texts], np.int32)
        program = self._compiled.admit_together()
        return self._read(program, self.params, self._placed(), self.marks, index, (tokens, counts))

    def _prompt(self, text: np.ndarray, index: np.ndarray | np.int32, source: steps.Source) -> Any:
        """The logits after a text, which row `index` then holds."""
        taken = int(source.count)
        source = steps.Source(*(np.int32(value) for value in source))
        if taken == len(text):
            return self._read(self._compiled.again(), self._placed(), self.marks, index, source)
        length = self.shape.padded(len(text) - taken)
        rest = np.pad(text[None, taken:], ((0, 0), (0, length - (len(text) - taken)))), np.int32(len(text) - taken)
        state = self.params, self._placed(), self.marks, index
        if not taken:
            return self._read(self._compiled.admit(length), *state, rest)
        return self._read(self._compiled.extend(length), *state, source, rest)

    def _read_again(self) -> None:
        """Fill a new cache with the rows' texts."""
        self.land()
        self.rows = [None if row is None or row.request.reason else row for row in self.rows]
        self._texts.forget()
        self.cache = self.marks = None  # first, so that two never stand side by side
        (self.cache, self.marks), self._token = self._compiled.empty()(), np.zeros(self.shape.rows, np.int32)
        self.slot = max((row.request.length for _, row in self.active), default=0)
        left = dict(self.active)
        while left:
            some = dict(itertools.islice(left.items(), self.shape.together[0]))
            if not self._together([row.request for row in some.values()]):
                some = dict(itertools.islice(left.items(), 1))
            self._admit(some)
            for i in some:
                del left[i]
        self._whole = True

    def _advance(self) -> None:
        self._whole = False
        count, longest = chunk(), max(self._texts.longest, *(row.held for _, row in self.active))
        # Where texts are short and the slot is far on, attention over all the slots before it is wasted on a GPU.
        if self.slot + count > self.shape.slots or self.slot - longest > max(longest, self.shape.slots // 4):
            self._move(longest)
        forced = np.full((self.shape.rows, count), steps.FREE, np.int32)
        for i, row in self.active:
            self._sampling.step[i] = row.made
            forced[i] = row.request.forced(row.made, count)
        requests = [row.request for _, row in self.active]
        sampling = jax.tree.map(np.copy, self._sampling)  # the device may still read it when the next step fills it
        chosen = self._run(self._compiled.advance(variant_of(requests)), sampling, forced)
        self._flights.append(Flight(chosen, [(i, row.request, row.made) for i, row in self.active], self.size))
        self.slot += count
        for i, row in self.active:
            row.made += count
            if row.made >= row.request.settings.max_new_tokens:
                self.rows[i] = None  # all its tokens are on their way
        self._whole = True
