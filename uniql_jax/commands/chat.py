"""`chat`: talk to an elastic checkpoint in the terminal; the prune rate can change in mid-conversation."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from uniql_jax import console
from uniql_jax.commands import cli, serving
from uniql_jax.errors import UserError

MAX_NEW_TOKENS = 512
HELP = """\
/rate R   go on at another prune rate, from 0 (all) to 0.35 (smallest)
/stats    rate, bytes, and how fast the last answer was
/reset    forget the conversation
/help     this list
/exit     leave (or Ctrl-D); Ctrl-C ends an answer"""
EXAMPLES = f"""\
in the conversation:
{HELP}

examples:
  python -m uniql_jax.chat --ckpt elastic --memory-budget 3GiB --system "Answer in one sentence."
  printf 'Who are you?\\n/rate 0.25\\nAnd now?\\n' | python -m uniql_jax.chat --ckpt elastic

Where stdin is no terminal, each line is a turn. Answers go to stdout, everything else to stderr.
"""


def parser() -> cli.Parser:
    """The arguments of the command."""
    parser = cli.Parser(
        prog=cli.program("chat"),
        description="Talk to an elastic checkpoint in its own chat template.",
        epilog=EXAMPLES,
        formatter_class=cli.ExamplesHelp,
    )
    parser.add_argument("--system", metavar="TEXT", help="instructions that come before the conversation")
    serving.add_options(parser, MAX_NEW_TOKENS)
    return parser


class Chat:
    """A conversation: its messages, the model at its present rate, and what the last answer took."""

    def __init__(self, ckpt: str, rate: float, settings: dict[str, Any], system: str | None = None):
        self.ckpt, self.settings = ckpt, dict(settings)
        self.messages: list[dict[str, str]] = []
        self.tokenizer: Any = None
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._answers = 0
        self._last: tuple[int, int, float, float] | None = None  # prompt, new tokens; seconds to the first, in all
        self.load(rate)

    def load(self, rate: float) -> None:
        """The model and its tokenizer at another rate; the conversation stays. Raises UserError."""
        from uniql_jax.checkpoint import open_checkpoint
        from uniql_jax.runtime.loading import load
        from uniql_jax.runtime.text import chat_text, folder_tokenizer

        checkpoint = open_checkpoint(self.ckpt)
        checkpoint.weight_bytes(rate)  # refused before the present model goes
        self.model = None  # two need not fit
        self.model = load(self.ckpt, rate)
        self.checkpoint, self.rate = checkpoint, rate
        self.tokenizer = folder_tokenizer(self.model.folder)
        if self.tokenizer is None:
            raise UserError("this checkpoint has no tokenizer, so there is no chat")
        chat_text(self.tokenizer, [*self._system, {"role": "user", "content": "?"}])  # refuses what it cannot serve

    def describe(self) -> str:
        """The model in a line."""
        return serving.describe(self.ckpt, self.checkpoint, self.rate)

    def reset(self) -> None:
        """Forget all turns."""
        self.messages = []

    def _prompt(self, turn: str) -> list[int]:
        """Token ids of the conversation with a new turn; the oldest turns go where they do not fit."""
        from uniql_jax.runtime.text import chat_text, encode

        room = self.checkpoint.config.max_position - min(self.settings["max_new_tokens"], 64)
        said, new = list(self.messages), {"role": "user", "content": turn}
        while True:
            ids = encode(self.tokenizer, chat_text(self.tokenizer, [*self._system, *said, new]), False)
            if len(ids) <= max(room, 1):
                break
            if not said:
                limit = self.checkpoint.config.max_position
                raise UserError(f"{len(ids)} tokens leave no room for an answer in the model's {limit}")
            said = said[2:]
        if len(said) < len(self.messages):
            _note(f"(the model reads {self.checkpoint.config.max_position} tokens: the oldest turns are forgotten)")
        self.messages = [*said, new]
        return ids

    def answer(self, turn: str) -> Iterator[str]:
        """Pieces of the answer to a turn; what was made of it is kept even where it is left unfinished."""
        from uniql_jax.runtime.generation import generate
        from uniql_jax.runtime.text import decode_stream

        if self.model is None:
            raise UserError("no model is loaded since /rate failed; /rate R loads one")
        ids = self._prompt(turn)
        settings = dict(self.settings, seed=(self.settings["seed"] + self._answers) % 2**32)
        settings["max_new_tokens"] = min(settings["max_new_tokens"], self.checkpoint.config.max_position - len(ids))
        self._answers += 1
        start, first, count, text = time.perf_counter(), None, 0, ""
        model = self.model

        def tokens() -> Iterator[int]:
            nonlocal first, count
            for token in generate(model, ids, **settings):
                first = first or time.perf_counter()
                if int(token[0]) == self.tokenizer.eos_token_id:
                    return
                count += 1
                yield int(token[0])

        try:
            for piece in decode_stream(self.tokenizer, tokens(), ids):
                text += piece
                yield piece
        finally:
            end = time.perf_counter()
            self._last = len(ids), count, (first or end) - start, end - start
            self.messages.append({"role": "assistant", "content": text})

    def stats(self) -> str:
        """Rate, bytes, and how fast the last answer was, the first of a length with its compilation."""
        lines = [self.describe()]
        if self._last is not None:
            prompt, new, first, seconds = self._last
            cache = console.format_bytes(serving.cache_size(self.checkpoint, self.rate, prompt, max(new, 1)))
            rest = f", then {(new - 1) / (seconds - first):.3g} tokens/s" if new > 1 and seconds > first else ""
            lines.append(
                f"last answer: {new} tokens after {prompt} of the conversation, cache {cache}; "
                f"the first after {first:.3g} s{rest}"
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
        chat.load(rate)
        _note(chat.describe())
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
    cli.use_compilation_cache(args.compilation_cache)
    from uniql_jax.checkpoint import open_checkpoint
    from uniql_jax.runtime import hub

    settings = serving.sampling(args)
    args.ckpt = hub.local(args.ckpt, args.revision)
    rate = serving.choose_rate(open_checkpoint(args.ckpt), args)
    chat = Chat(args.ckpt, rate, settings, args.system)
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
