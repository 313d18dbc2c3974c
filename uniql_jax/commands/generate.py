"""Door: continue a prompt with an elastic checkpoint, at a prune rate or within a memory budget.

python -m uniql_jax.generate --ckpt DIR [--prune-rate R | --memory-budget 3GiB] --prompt "..."
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from uniql_jax import console
from uniql_jax.commands import cli
from uniql_jax.errors import UserError

STEPS = 350  # rates tried for a budget: every 0.001


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


def parser() -> cli.Parser:
    """The arguments of the command."""
    parser = cli.Parser(
        prog=cli.program("generate"),
        description="Continue a prompt with an elastic checkpoint; text appears as it is made.",
    )
    parser.add_argument("--ckpt", required=True, metavar="DIR", help="elastic checkpoint made by uniql_jax.compress")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--prune-rate", type=cli.prune_rate, default=0.0, metavar="R", help="0 (all) to 0.35 (smallest)")
    size.add_argument(
        "--memory-budget", type=cli.memory_size, metavar="SIZE", help="3GiB, 900MB: least pruning whose weights fit it"
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    parser.add_argument("--max-new-tokens", type=cli.positive_int, default=64, metavar="N", help="tokens to make")
    parser.add_argument(
        "--temperature", type=cli.bounded_float(0), default=0.0, metavar="T", help="0: always the likeliest token"
    )
    parser.add_argument(
        "--top-p",
        type=cli.bounded_float(0, 1),
        default=1.0,
        metavar="P",
        help="draw from the likeliest tokens of mass P",
    )
    parser.add_argument(
        "--top-k", type=cli.natural_int, default=0, metavar="K", help="draw from the K likeliest tokens; 0 is off"
    )
    parser.add_argument("--seed", type=cli.natural_int, default=0, metavar="N", help="for a temperature above 0")
    cli.add_compilation_cache(parser)
    return parser


def main(argv: list[str]) -> None:
    """Run the command; raises UserError."""
    args = parser().parse_args(argv)
    cli.use_compilation_cache(args.compilation_cache)
    from uniql_jax.checkpoint import open_checkpoint
    from uniql_jax.plan import MAX_PRUNE_RATE
    from uniql_jax.runtime.generation import generate
    from uniql_jax.runtime.loading import load

    rate = args.prune_rate
    if args.memory_budget is not None:
        checkpoint = open_checkpoint(args.ckpt)
        limit = MAX_PRUNE_RATE if checkpoint.plan else 0.0
        rate = rate_for_budget(checkpoint.weight_bytes, args.memory_budget, limit)
        size, budget = console.format_bytes(checkpoint.weight_bytes(rate)), console.format_bytes(args.memory_budget)
        print(f"prune rate {rate:g}: {size} of weights fit {budget}", file=sys.stderr)
    pieces = generate(
        load(args.ckpt, rate),
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        chat=args.chat,
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
