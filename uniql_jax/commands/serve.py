"""`serve`: an OpenAI-compatible HTTP server for one elastic checkpoint, with a page and a live prune rate."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uniql_jax.commands import cli, compilation_cache, serving
from uniql_jax.errors import UserError

EXAMPLES = """\
examples:
  on this machine, page and API, whatever rate fits 3 GiB, changed as memory gets scarce:
    uniql serve elastic --memory-budget 3GiB --watch 5

  for a network, four texts at a time, with keys from files:
    uniql serve elastic --host 0.0.0.0 --batch 4 --api-key-file key --admin-key-file admin-key

  then, in another terminal:
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"model": "elastic", "messages": [{"role": "user", "content": "Hello"}], "stream": true}'
    curl http://127.0.0.1:8000/admin/rate -H 'Content-Type: application/json' -d '{"rate": 0.25}'

GET /health /status /metrics /v1/models; POST /v1/completions /v1/chat/completions /admin/rate; a page at /.
Without --host only this machine can reach it; elsewhere it insists on a key. TLS is a reverse proxy's job.
SIGTERM lets answers under way end. docs/guides/serve.md says what is defended against, and what is not.
"""
API_KEY, ADMIN_KEY = "UNIQL_API_KEY", "UNIQL_ADMIN_KEY"


def parser() -> cli.Parser:
    """The arguments of the command."""
    parser = cli.parser(
        "serve",
        "Serve an elastic checkpoint over HTTP: OpenAI's completions and chat completions, a page to talk "
        "to it, and a prune rate that changes while it runs.",
        EXAMPLES,
    )
    add = parser.add_argument
    add("checkpoint", metavar="DIR", type=cli.named, help="elastic checkpoint, as uniql compress writes it")
    _add_size(parser)
    group = parser.add_argument_group("network")
    add = group.add_argument
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen")
    add("--port", type=cli.bounded_int(0, 65535), default=8000, metavar="N", help="0 picks a free one, and prints it")
    add("--name", metavar="NAME", type=cli.named, help="what clients call the model (default: the folder's name)")
    add("--api-key-file", metavar="FILE", help=f"first line: the key that calls need (or set {API_KEY})")
    add("--admin-key-file", metavar="FILE", help=f"the key for /admin/rate (or set {ADMIN_KEY}; default: the API key)")
    add("--access-log", action="store_true", help="log every call to stderr")
    group = parser.add_argument_group("limits")
    add = group.add_argument
    add("--max-tokens", type=cli.positive_int, default=4096, metavar="N", help="of an answer")
    add("--max-streams", type=cli.positive_int, default=64, metavar="N", help="answers at work or waiting")
    add("--max-body", type=cli.memory_size, default=2**20, metavar="SIZE", help="of a call")
    add("--body-timeout", type=cli.bounded_float(0.1), default=10.0, metavar="S", help="in which a call must be sent")
    add("--call-timeout", type=cli.bounded_float(0.1), default=600.0, metavar="S", help="in which an answer must end")
    add("--drain", type=cli.bounded_float(0), default=30.0, metavar="S", help="that answers get to end after SIGTERM")
    return parser


def _add_size(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("size")
    size = group.add_mutually_exclusive_group()
    size.add_argument("--prune-rate", type=cli.prune_rate, metavar="R", help="0 (all) to 0.35 (smallest)")
    size.add_argument(
        "--memory-budget", metavar="SIZE", help="3GiB, 900MB, 80%% of the memory: least pruning whose weights, cache "
        "and work space fit",
    )  # fmt: skip
    add = group.add_argument
    add("--context", type=cli.positive_int, metavar="N", help="tokens of a text, prompt and answer (default: 2048)")
    serving.add_cache_bits(group)
    add("--batch", type=cli.positive_int, default=1, metavar="N", help="texts at a time; others wait")
    add(
        "--other-rates", type=cli.bounded_int(0, 99), metavar="N", help="prune rates at a time that calls may ask for "
        "(NAME@RATE) in addition to the server's, each with a cache of its own (default: 2; with a budget 0)",
    )  # fmt: skip
    add(
        "--no-marks", dest="marks", action="store_false", help="keep no second SSM state a row, from which prompts "
        "that begin alike go on: less memory, and all of them are read",
    )  # fmt: skip
    add("--warm-up", type=cli.prune_rates, metavar="R,R,...", help="compile these rates before it listens")
    add(
        "--watch", type=cli.bounded_float(0.1), metavar="S", help="look at free memory every S seconds, change the rate"
    )
    add("--reserve", default="10%", metavar="SIZE", help="memory that --watch keeps free, or a share such as 10%%")
    add("--quality", metavar="FILE.json", help="what uniql evaluate --json wrote: perplexities for the page")
    compilation_cache.add_option(parser)


def read_key(path: str | None, variable: str) -> str | None:
    """A key of a file's first line, or of an environment variable. Raises UserError for one that cannot be used."""
    if path is None:
        key = os.environ.get(variable)
        if key is None:
            return None
        where = f"the environment variable {variable}"
    else:
        try:
            key, where = Path(path).read_text(encoding="utf-8").partition("\n")[0].strip(), path
        except UnicodeDecodeError:
            raise UserError(f"{path} is no text") from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    if len(key) < 16 or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"the key of {where} must be at least 16 characters of ASCII without spaces")
    return key


def read_quality(path: str | None) -> dict[float, float]:
    """Prune rate -> perplexity (of the first text) from what `evaluate --json` wrote. Raises UserError."""
    from uniql_jax.evaluation.report import perplexities, read_rows

    if path is None:
        return {}
    found = perplexities(read_rows(path))
    return {rate: value for rate, value in (next(iter(found.values())) if found else {}).items() if rate is not None}


def main(argv: list[str]) -> None:
    """Run the command; raises UserError."""
    args = parser().parse_args(argv)
    try:
        import prometheus_client  # noqa: F401
        import pydantic  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"serving needs {error.name}; install the extra: pip install 'uniql-jax[serve]'") from None
    from uniql_jax.server.http import Keys, Limits, is_loopback

    keys = Keys(read_key(args.api_key_file, API_KEY), read_key(args.admin_key_file, ADMIN_KEY))
    loopback = is_loopback(args.host)
    if not loopback and keys.api is None:
        raise UserError(f"{args.host} can be reached from elsewhere: set {API_KEY} or give --api-key-file")
    quality = read_quality(args.quality)
    compilation_cache.use(args.compilation_cache)
    limits = Limits(
        body_bytes=args.max_body,
        body_seconds=args.body_timeout,
        tokens=args.max_tokens,
        streams=args.max_streams,
        seconds=args.call_timeout,
    )
    with _logging():
        _run(args, keys, limits, loopback, quality)


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """What the server and this package log goes to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    loggers = [logging.getLogger(name) for name in ("uniql_jax", "uvicorn")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def _run(args: argparse.Namespace, keys: Any, limits: Any, loopback: bool, quality: dict[float, float]) -> None:
    from uniql_jax.runtime.budget import parse_budget
    from uniql_jax.runtime.session import Elastic
    from uniql_jax.runtime.text import chat_text
    from uniql_jax.server.app import Server
    from uniql_jax.server.running import serve

    def note(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if args.watch:
        parse_budget(args.reserve)  # refused before anything is read
    session = Elastic(
        args.checkpoint,
        memory_budget=args.memory_budget,
        rate=args.prune_rate,
        context=args.context,
        batch=args.batch,
        other_rates=args.other_rates,
        cache_bits=args.cache_bits,
        marks=args.marks,
        say=note,
    )
    if session.tokenizer is None:
        raise UserError(f"{args.checkpoint} has no tokenizer, which a server needs")
    try:
        chat_text(session.tokenizer, [{"role": "user", "content": "?"}])
    except UserError as error:
        note(f"no chat: {error}")
    if args.warm_up:
        note(f"compiling for prune rates {', '.join(f'{rate:g}' for rate in args.warm_up)}")
        session.warm_up(args.warm_up)
    name = args.name or Path(args.checkpoint).expanduser().resolve().name
    server = Server(session, name, keys=keys, limits=limits, loopback=loopback, quality=quality)
    watcher = session.watch(args.watch, reserve=args.reserve) if args.watch else None
    try:
        serve(server, args.host, args.port, args.drain, lambda url: note(_ready(url, name)), args.access_log)
    finally:
        if watcher is not None:
            watcher.stop()


def _ready(url: str, name: str) -> str:
    return f"serving {json.dumps(name)} at {url} (page), {url}/v1 (OpenAI's API); Ctrl-C ends it"
