"""What `generate` and `chat` share: which checkpoint at which rate, how tokens are chosen, and the plan."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from uniql_jax import console
from uniql_jax.commands import cli
from uniql_jax.errors import UserError
from uniql_jax.limits import MAX_PRUNE_RATE

STEPS = 350  # rates tried for a budget: every 0.001


def add_options(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """The options of a checkpoint, its size, and sampling."""
    add = parser.add_argument
    add("--ckpt", required=True, type=cli.named, metavar="DIR", help="elastic checkpoint, or its hub id (owner/name)")
    cli.add_revision(parser)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--prune-rate", type=cli.prune_rate, default=0.0, metavar="R", help="0 (all) to 0.35 (smallest)")
    size.add_argument(
        "--memory-budget", type=cli.memory_size, metavar="SIZE",
        help="3GiB, 900MB, 0.5G: least pruning whose weights fit it",
    )  # fmt: skip
    add("--max-new-tokens", type=cli.positive_int, default=max_new_tokens, metavar="N", help="tokens to make")
    add("--temperature", type=cli.bounded_float(0), default=0.0, metavar="T", help="0: always the likeliest token")
    add(
        "--top-p", type=cli.bounded_float(0, 1), default=1.0, metavar="P",
        help="draw from the likeliest tokens of mass P",
    )  # fmt: skip
    add("--top-k", type=cli.natural_int, default=0, metavar="K", help="draw from the K likeliest tokens; 0 is off")
    add("--seed", type=cli.natural_int, default=0, metavar="N", help="for a temperature above 0")
    cli.add_compilation_cache(parser)


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The options that `uniql_jax.generate` takes by the same names. Raises UserError for bad ones."""
    from uniql_jax.runtime.sampling import check_sampling

    names = ("temperature", "top_p", "top_k", "max_new_tokens")
    check_sampling(*(getattr(args, name) for name in names))
    return {name: getattr(args, name) for name in (*names, "seed")}


def choose_rate(checkpoint: Any, args: argparse.Namespace) -> float:
    """--prune-rate, or the least that fits --memory-budget, which is then said on stderr. Raises UserError."""
    if args.memory_budget is None:
        checkpoint.weight_bytes(args.prune_rate)  # an unsorted one refuses rates above 0
        return args.prune_rate
    limit = MAX_PRUNE_RATE if checkpoint.plan else 0.0
    rate = rate_for_budget(checkpoint.weight_bytes, args.memory_budget, limit)
    size, budget = console.format_bytes(checkpoint.weight_bytes(rate)), console.format_bytes(args.memory_budget)
    print(f"prune rate {rate:g}: {size} of weights fit {budget}", file=sys.stderr)
    return rate


def rate_for_budget(weight_bytes: Callable[[float], int], budget: int, limit: float) -> float:
    """The smallest prune rate from 0 to `limit` whose weights fit `budget` bytes, to a thousandth.

    Raises UserError when not even `limit` fits.
    """
    if weight_bytes(limit) > budget:
        least = console.format_bytes(weight_bytes(limit))
        raise UserError(f"{console.format_bytes(budget)} is too little: the weights take {least} at prune rate {limit}")
    low, high = 0, STEPS  # sizes fall with the rate, so halving finds the first that fits
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if weight_bytes(middle * limit / STEPS) <= budget else (middle + 1, high)
    return round(low * limit / STEPS, 6)


def cache_size(checkpoint: Any, rate: float, prompt: int, new: int, bits: int = 16) -> int:
    """Bytes of the cache for a prompt of so many tokens and `new` more, padding included."""
    from uniql_jax.model.decoding import cache_bytes
    from uniql_jax.runtime.generation import room
    from uniql_jax.runtime.lengths import read_slots, slots_for
    from uniql_jax.runtime.loading import default_dtype

    slots = slots_for(max(prompt + room(new), read_slots(prompt)))
    return cache_bytes(checkpoint.config, checkpoint.keep(rate), 1, slots, default_dtype(), bits)


def describe(ckpt: str, checkpoint: Any, rate: float) -> str:
    """The model's part of a plan, in a line."""
    from uniql_jax.evaluation.timing import device_name

    return (
        f"{ckpt}: {checkpoint.config.model_type}, {checkpoint.bits} bits, rate {rate:g}, "
        f"{console.format_bytes(checkpoint.weight_bytes(rate))} of weights; {device_name()}"
    )
