"""`chat`: talk to an elastic checkpoint in the terminal; the prune rate can change in mid-conversation."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from uniql_jax import console
from uniql_jax.commands import cli, compilation_cache, serving
from uniql_jax.errors import UserError

MAX_NEW_TOKENS = 512
CONTEXT = 2048
HELP = """\
/rate R   go on at another prune rate, from 0 (all) to 0.35 (smallest), in place
/budget S go on at the largest size that fits, such as 3GiB, in place
/stats    size, bytes, and how fast the last answer was
/reset    forget the conversation
/help     this list
/exit     leave (or Ctrl-D); Ctrl-C ends an answer"""
EXAMPLES = f"""\
in the conversation:
{HELP}

examples:
  python -m uniql_jax.chat --ckpt elastic --memory-budget 3GiB --system "Answer in one sentence."
  printf 'Who are you?\\n/rate 0.25\\nAnd now?\\n' | python -m uniql_jax.chat --ckpt elastic

Where stdin is no terminal, each line is a turn. Answers go to stdout, everything else to stderr. A budget covers
weights, the cache of a whole context, and the work space of compiled steps.
"""


def parser() -> cli.Parser:
    """The arguments of the command."""
    parser = cli.parser("chat", "Talk to an elastic checkpoint in its own chat template.", EXAMPLES)
    parser.add_argument("--system", metavar="TEXT", help="instructions that come before the conversation")
    parser.add_argument(
        "--context", type=cli.positive_int, metavar="N", help=f"tokens of a conversation (default: {CONTEXT}, or what "
        "the model takes); the oldest turns are forgotten beyond",
    )  # fmt: skip
    serving.add_options(parser, MAX_NEW_TOKENS)
    return parser


class Chat:
    """A conversation: its messages, the model at its present rate, and what the last answer took."""

    def __init__(
        self,
        ckpt: str,
        rate: float,
        settings: dict[str, Any],
        system: str | None = None,
        memory_budget: int | None = None,
        context: int | None = None,
        cache_bits: int = 16,
    ):
        """Load a checkpoint at a rate, or at the least that a budget allows. Raises UserError."""
        from uniql_jax.runtime.session import Elastic
        from uniql_jax.runtime.text import chat_text

        self.ckpt, self.settings = ckpt, dict(settings)
        self.messages: list[dict[str, str]] = []
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._answers = 0
        self._last: tuple[int, int, int, float, float] | None = (
            None  # prompt, cached, new; seconds to the first, in all
        )
        budget: dict[str, Any] = {"rate": rate} if memory_budget is None else {"memory_budget": memory_budget}
        say = _note if memory_budget else lambda line: None
        self.session = Elastic(ckpt, context=context, cache_bits=cache_bits, say=say, **budget)
        self.checkpoint, self.tokenizer = self.session.checkpoint, self.session.tokenizer
        if self.tokenizer is None:
            raise UserError("this checkpoint has no tokenizer, so there is no chat")
        chat_text(self.tokenizer, [*self._system, {"role": "user", "content": "?"}])  # refuses what it cannot serve

    @property
    def rate(self) -> float:
        """The present prune rate."""
        return self.session.rate

    def change(self, rate: float | None, budget: str = "") -> str:
        """Go on at another rate or within a budget; says what that took. Raises UserError."""
        start = time.perf_counter()
        if rate is not None:
            self.session.set_rate(rate)
        else:
            self.session.fit(budget)
        return f"{self.describe()}; changed in {time.perf_counter() - start:.2g} s"

    def describe(self) -> str:
        """The model in a line."""
        return serving.describe(self.ckpt, self.checkpoint, self.rate, self.session.size)

    def reset(self) -> None:
        """Forget all turns."""
        self.messages = []

    def _prompt(self, turn: str) -> list[int]:
        """Token ids of the conversation with a new turn; the oldest turns go where they do not fit."""
        from uniql_jax.runtime.text import chat_text, encode

        limit = self.session.shape.context
        room = limit - min(self.settings["max_new_tokens"], 64)
        said, new = list(self.messages), {"role": "user", "content": turn}
        while True:
            ids = encode(self.tokenizer, chat_text(self.tokenizer, [*self._system, *said, new]), False)
            if len(ids) <= max(room, 1):
                break
            if not said:
                raise UserError(f"{len(ids)} tokens leave no room for an answer in a context of {limit}")
            said = said[2:]
        if len(said) < len(self.messages):
            _note(f"(a context of {limit} tokens: the oldest turns are forgotten)")
        self.messages = [*said, new]
        return ids

    def answer(self, turn: str) -> Iterator[str]:
        """Pieces of the answer to a turn; what was made of it is kept even where it is left unfinished."""
        from uniql_jax.runtime.requests import Settings
        from uniql_jax.runtime.text import decode_stream

        ids = self._prompt(turn)
        settings = dict(self.settings, seed=(self.settings["seed"] + self._answers) % 2**32)
        settings["max_new_tokens"] = min(settings["max_new_tokens"], self.session.shape.context - len(ids))
        self._answers += 1
        start, first, count, text = time.perf_counter(), None, 0, ""
        stops = frozenset(self.session.stops(chat=True))
        request = self.session.submit(ids, Settings(**settings, stops=stops))

        def tokens() -> Iterator[int]:
            nonlocal first, count
            for item in request:
                first = first or time.perf_counter()
                count += 1
                yield item.token

        try:
            for piece in decode_stream(self.tokenizer, tokens(), ids):
                text += piece
                yield piece
        finally:
            end = time.perf_counter()
            request.cancel()
            self._last = len(ids), request.cached, count, (first or end) - start, end - start
            self.messages.append({"role": "assistant", "content": text})

    def stats(self) -> str:
        """Size, bytes, and how fast the last answer was, the first of a length with its compilation."""
        lines = [self.describe()]
        if self._last is not None:
            prompt, cached, new, first, seconds = self._last
            cache = console.format_bytes(self.session.memory()["cache"])
            rest = f", then {(new - 1) / (seconds - first):.3g} tokens/s" if new > 1 and seconds > first else ""
            lines.append(
                f"last answer: {new} tokens after {prompt} of the conversation ({cached} of them read before), "
                f"cache {cache}; the first after {first:.3g} s{rest}"
            )
        return "\n".join(lines)


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _lines(interactive: bool) -> Iterator[str]:
    """Turns as they are entered, or the lines of stdin."""
    if not interactive:
        yield from sys.stdin or ()
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _command(chat: Chat, line: str) -> bool:
    """Carry out a /command; whether the conversation goes on. Raises UserError for one that is unknown."""
    name, _, value = line.partition(" ")
    if name in ("/exit", "/quit"):
        return False
    if name == "/rate":
        try:
            rate = cli.prune_rate(value.strip())
        except argparse.ArgumentTypeError as error:
            raise UserError(str(error)) from None
        _note(chat.change(rate))
    elif name == "/budget":
        _note(chat.change(None, value.strip()))
    elif name == "/stats":
        _note(chat.stats())
    elif name == "/reset":
        chat.reset()
    elif name == "/help":
        _note(HELP)
    else:
        raise UserError(f"no command {name}; /help lists them")
    return True


def _say(chat: Chat, line: str, interactive: bool) -> None:
    """Print the answer as it comes; on a terminal, Ctrl-C ends it."""
    pieces = chat.answer(line)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
        if not interactive:
            raise
    print(flush=True)


def main(argv: list[str]) -> None:
    """Run the command; raises UserError."""
    args = parser().parse_args(argv)
    compilation_cache.use(args.compilation_cache)
    from uniql_jax.runtime import hub

    settings = serving.sampling(args)
    args.ckpt = hub.local(args.ckpt, args.revision)
    chat = Chat(args.ckpt, args.prune_rate, settings, args.system, args.memory_budget, args.context, args.cache_bits)
    interactive = sys.stdin is not None and sys.stdin.isatty()
    _note(chat.describe() + ("; /help lists commands" if interactive else ""))
    for line in _lines(interactive):
        line = line.strip()
        if not line:
            continue
        try:
            if not line.startswith("/"):
                _say(chat, line, interactive)
            elif not _command(chat, line):
                return
        except UserError as error:
            if not interactive:
                raise
            _note(f"error: {error}")
