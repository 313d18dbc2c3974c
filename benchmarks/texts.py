"""Arguments and texts that the benchmarks of quality share: calibration windows, and texts that are measured."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from uniql_jax import data


def add_arguments(
    parser: argparse.ArgumentParser, calibration: Sequence[str] | None = None, eval_tokens: int = 65536
) -> None:
    """--tokenizer, and what `read` wants; `calibration` is the default of --calib, None where it must be given."""
    add = parser.add_argument
    add("--tokenizer", help="folder of tokenizer files, where texts are no .npy of token windows")
    add("--calib", nargs="+", default=calibration, required=calibration is None)
    add("--windows", type=int, default=128, help="calibration windows")
    add("--length", type=int, default=512, help="tokens per calibration window")
    add("--text", nargs="+", required=True, help="NAME=SPEC, to measure")
    add("--eval-tokens", type=int, default=eval_tokens)
    add("--eval-window", type=int, default=1024)


def read(args: argparse.Namespace, tokenizer: Any, vocab: int) -> tuple[data.Windows, dict[str, data.Windows]]:
    """Calibration windows, and those of every text by name."""
    calibration = data.token_windows(args.calib, tokenizer, args.length, args.windows, 0, vocab_size=vocab)
    texts = {}
    for item in args.text:
        name, spec = item.split("=", 1)
        texts[name] = data.evaluation_windows([spec], tokenizer, args.eval_window, args.eval_tokens, vocab_size=vocab)
    return calibration, texts
