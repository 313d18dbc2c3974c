"""The commands: one module a verb (arguments, one call, output), the console script `uniql`, and how a command starts.

Nothing heavy is imported here: `--help` must answer at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import NoReturn

VERBS = {
    "compress": "one pass over a model: sort, plan, rotate, quantize; one checkpoint for every prune rate",
    "generate": "continue a prompt at a prune rate, or within a memory budget",
    "chat": "talk to a checkpoint in the terminal",
    "serve": "an OpenAI-compatible HTTP server and a page, at a prune rate that changes while it runs",
    "evaluate": "perplexity and task accuracy at each prune rate",
    "benchmark": "bytes and times at each prune rate, next to a dense model",
    "export": "one prune rate for transformers or llama.cpp",
    "report": "one HTML page and a model card: rates against quality, size and speed",
    "inspect": "what a checkpoint holds: sizes, rates, plan, provenance",
    "upload": "a checkpoint to the hub, with a card",
    "finetune": "recover a sorted 16-bit checkpoint by fine-tuning at all rates",
    "own-text": "let a model write calibration and training text itself",
}
"""Verb of the console script -> what it does; the module has its name, with _ for -."""


def run(verb: str, argv: list[str] | None = None) -> NoReturn:
    """Run the command of a verb and exit with its code."""
    _leave_working_folder()
    from uniql_jax.commands import cli

    def main(argv: list[str]) -> int | None:
        # within `cli.run`, so that Ctrl-C while a command's modules load is one line as well
        return importlib.import_module(f"uniql_jax.commands.{verb.replace('-', '_')}").main(argv)

    cli.run(main, argv)


def entry_point(name: str, verb: str) -> None:
    """What `uniql_jax/<verb>.py` does: run under `python -m`, refuse to be imported.

    Importing it would hide the public function of the same name, `uniql_jax.<verb>`.
    """
    if name == "__main__":
        run(verb)
    if name == f"uniql_jax.{verb.replace('-', '_')}":
        raise ImportError(f"{name} is a command (python -m {name}); the function is `from uniql_jax import ...`")


def main() -> NoReturn:
    """The console script `uniql VERB ...`."""
    argv = sys.argv[1:]
    if argv and argv[0] in VERBS:
        run(argv[0], argv[1:])
    _leave_working_folder()
    from uniql_jax.commands import cli

    rows = "\n".join(f"  {verb:<10} {what}" for verb, what in VERBS.items())
    parser = cli.Parser(
        prog="uniql",
        usage="uniql VERB [options]   (uniql VERB --help explains one)",
        description=f"Compress a language model once; every device chooses its own size.\n\nverbs:\n{rows}",
        formatter_class=cli.ExamplesHelp,
    )
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="one of the above")
    cli.run(lambda argv: parser.parse_args(argv) and None, argv or ["--help"])


def _leave_working_folder() -> None:
    """Take the working folder off the import path, unless the package itself lies there.

    `python -m` puts it first, so that a user's own train.py or datasets.py would be imported in a library's place.
    """
    home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    if sys.path and sys.path[0] in ("", os.getcwd()) and os.path.realpath(os.getcwd()) != os.path.realpath(home):
        del sys.path[0]
