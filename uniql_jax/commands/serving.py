"""What `generate` and `chat` share: which checkpoint at which rate, how tokens are chosen, and the plan."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from uniql_jax import console
from uniql_jax.commands import cli, compilation_cache
from uniql_jax.errors import UserError

if TYPE_CHECKING:
    from uniql_jax.checkpoint import Checkpoint
    from uniql_jax.runtime.choice import Choice


def add_options(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """The options of a checkpoint, its size, and sampling."""
    add = parser.add_argument
    add("--ckpt", required=True, type=cli.named, metavar="DIR", help="elastic checkpoint, or its hub id (owner/name)")
    cli.add_revision(parser)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--prune-rate", type=cli.prune_rate, default=0.0, metavar="R", help="0 (all) to 0.35 (smallest)")
    size.add_argument(
        "--memory-budget", type=cli.memory_size, metavar="SIZE",
        help="3GiB, 900MB, 0.5G: the largest size whose weights fit, by least pruning or by the plan of nested bits",
    )  # fmt: skip
    add("--max-new-tokens", type=cli.positive_int, default=max_new_tokens, metavar="N", help="tokens to make")
    add("--temperature", type=cli.bounded_float(0), default=0.0, metavar="T", help="0: always the likeliest token")
    add(
        "--top-p", type=cli.bounded_float(0, 1), default=1.0, metavar="P",
        help="draw from the likeliest tokens of mass P",
    )  # fmt: skip
    add("--top-k", type=cli.natural_int, default=0, metavar="K", help="draw from the K likeliest tokens; 0 is off")
    add("--seed", type=cli.natural_int, default=0, metavar="N", help="for a temperature above 0")
    add_cache_bits(parser)
    compilation_cache.add_option(parser)


def add_cache_bits(parser: argparse._ActionsContainer) -> None:
    """--cache-bits."""
    parser.add_argument(
        "--cache-bits", type=int, choices=(8, 16), default=16, help="of keys and values; 8: int8, half the memory"
    )


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The options that `uniql_jax.generate` takes by the same names. Raises UserError for bad ones."""
    from uniql_jax.runtime.sampling import check_sampling

    names = ("temperature", "top_p", "top_k", "max_new_tokens")
    check_sampling(*(getattr(args, name) for name in names))
    if not args.temperature and (args.top_k or args.top_p < 1):
        raise UserError("--top-k and --top-p say what is drawn from: that wants a --temperature above 0")
    return {name: getattr(args, name) for name in (*names, "seed")}


def choose_size(checkpoint: Checkpoint, args: argparse.Namespace) -> Choice:
    """--prune-rate, or what fits --memory-budget, which is then said on stderr. Raises UserError."""
    from uniql_jax.runtime.choice import Choice, choose

    if args.memory_budget is None:
        # an unsorted one refuses rates above 0
        return Choice(checkpoint.weight_bytes(args.prune_rate), args.prune_rate)
    found = choose(checkpoint, args.memory_budget)
    size, budget = console.format_bytes(found.bytes), console.format_bytes(args.memory_budget)
    print(f"{found}: {size} of weights fit {budget}", file=sys.stderr)
    return found


def cache_size(checkpoint: Checkpoint, size: Choice, prompt: int, new: int, bits: int = 16) -> int:
    """Bytes of the cache for a prompt of so many tokens and `new` more, padding included."""
    from uniql_jax.model.decoding import cache_bytes
    from uniql_jax.runtime.generation import room
    from uniql_jax.runtime.lengths import read_slots, slots_for
    from uniql_jax.runtime.loading import default_dtype

    slots = slots_for(max(prompt + room(new), read_slots(prompt)))
    return cache_bytes(checkpoint.config, size.keep(checkpoint), 1, slots, default_dtype(), bits)


def describe(ckpt: str, checkpoint: Checkpoint, rate: float, size: Choice | None = None, devices: int = 1) -> str:
    """The model's part of a plan, in a line."""
    from uniql_jax.evaluation.timing import device_name

    return (
        f"{ckpt}: {checkpoint.config.model_type}, {checkpoint.bits} bits, "
        f"{f'rate {rate:g}' if size is None or size.setting is None else size}, "
        f"{console.format_bytes(checkpoint.weight_bytes(rate) if size is None else size.bytes)} of weights; "
        f"{device_name(devices)}"
    )
