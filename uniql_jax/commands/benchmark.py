"""`benchmark`: bytes and times of a model at each prune rate, next to a dense one of the same shape."""

from __future__ import annotations

import argparse
import json
import math

from uniql_jax import console
from uniql_jax.commands import cli, compilation_cache
from uniql_jax.compression.settings import GROUPS
from uniql_jax.errors import UserError
from uniql_jax.evaluation.published import PARTS, published
from uniql_jax.outputs import check_output_files

RATES = "0,0.15,0.25,0.35"
EXAMPLES = f"""\
examples:
  your checkpoint: bytes, times, and what they are worth next to a dense model
    python -m uniql_jax.benchmark --ckpt elastic

  the largest sizes that fit 60 MB and 50 MB, by least pruning or by the plan of nested bits
    python -m uniql_jax.benchmark --ckpt elastic --memory-budget 60MB,50MB

  a published model without its weights, nothing to download (timing does not care what the numbers are)
    python -m uniql_jax.benchmark --config llama-3.1-8b --prune-rates 0,0.25 --json llama.json

  only what it weighs, in a second, on any machine
    python -m uniql_jax.benchmark --config qwen2.5-7b --size --prompt-len 32768 --batch-size 8

  nested bits, kept in half of the units: what a budget between 3 and 4 bits decodes at
    python -m uniql_jax.benchmark --config llama-3.1-8b --bits 3.5 --prune-rates 0 --tpot --size --no-dense

  only decoding, a batch of 16, more repeats
    python -m uniql_jax.benchmark --config mamba2-8b --tpot --batch-size 16 --repeats 20 --no-dense

--config knows {", ".join(published())}; it also takes any config.json of a supported family.
TTFT is the time from prompts to their first tokens. TPOT is the time per token after that: once with calls whose tokens
the host reads, as when text is streamed (generate: one a call on CPUs, eight on GPUs), once with all of them in one
compiled loop (generate_tokens). TTLT is from prompts to the last token, with the loop. Each is the median of --repeats
runs, with the least and the most in brackets; compilation and a first run are not in it.
"Of the floor" is the least time in which the device's memory can move what a step must read (weights, keys and values,
states), at the speed of a plain copy measured in the same run, over the loop's time per token: 1 cannot be beaten.
"""


def parser() -> cli.Parser:
    """The arguments of the command."""
    parser = cli.parser(
        "benchmark", "Bytes and times of a model at each prune rate, next to a dense one of the same shape.", EXAMPLES
    )
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--ckpt", metavar="DIR", help="elastic checkpoint, or its hub id (owner/name)")
    cli.add_revision(parser)
    model.add_argument("--config", metavar="NAME", help="random weights of a published model, or of a config.json")
    bits = "of a weight, with --config: 4, 8 or 16, or 3 to 4 for nested bits of which that many are kept (default: 4)"
    add("--bits", type=_bits, metavar="N", help=bits)
    add("--groups", choices=GROUPS, help="with --config: quantization groups as compress --groups makes them")
    add(
        "--prune-rates", type=cli.prune_rates, metavar="R,R,...",
        help=f"rates to measure (default: {RATES}, or none where budgets are named)",
    )  # fmt: skip
    add(
        "--memory-budget", type=cli.memory_sizes, default=(), metavar="SIZE,SIZE,...",
        help="also the largest size of --ckpt whose weights fit each: by least pruning, or by the plan of nested bits",
    )  # fmt: skip
    dense = "a dense baseline as well (bfloat16 on GPUs, float32 on CPUs, of random weights)"
    add("--dense", action=argparse.BooleanOptionalAction, default=True, help=dense)
    add("--seed", type=cli.natural_int, default=0, metavar="N", help="of prompts and random weights")
    cli.add_devices(parser)
    what = parser.add_argument_group("what to measure (everything when none is named)")
    what.add_argument("--size", action="store_true", help="bytes of weights and cache; alone, it runs nothing")
    what.add_argument("--ttft", action="store_true", help="time to the first token")
    what.add_argument("--tpot", action="store_true", help="time per further token")
    what.add_argument("--ttlt", action="store_true", help="time to the last token")
    work = parser.add_argument_group("the work")
    add = work.add_argument
    add("--batch-size", type=cli.positive_int, default=1, metavar="N", help="sequences at a time")
    add("--prompt-len", type=cli.positive_int, default=1024, metavar="N", help="tokens of a prompt")
    add("--gen-len", type=cli.positive_int, default=128, metavar="N", help="tokens of an answer, the first included")
    add("--repeats", type=cli.positive_int, default=5, metavar="N", help="runs of each measurement")
    output = parser.add_argument_group("output")
    output.add_argument("--json", metavar="FILE", help="write everything measured, and where, here")
    output.add_argument("--overwrite", action="store_true", help="replace a --json file that exists")
    compilation_cache.add_option(parser)
    return parser


def _bits(text: str) -> float:
    try:
        bits = float(text)
    except ValueError:
        bits = math.nan
    if not (3 <= bits <= 4 or bits in (8, 16)):
        raise argparse.ArgumentTypeError(f"{text!r} is none of 3 to 4, 8 and 16")
    return int(bits) if bits == int(bits) else bits


def main(argv: list[str]) -> None:
    """Run the command; raises UserError."""
    args = parser().parse_args(argv)
    if args.bits is not None and args.ckpt is not None:
        raise UserError("--bits goes with --config: a checkpoint has bits of its own")
    if args.groups is not None and args.ckpt is not None:
        raise UserError("--groups goes with --config: a checkpoint has groups of its own")
    if args.memory_budget and args.ckpt is None:
        raise UserError("--memory-budget goes with --ckpt: name --prune-rates of a --config")
    check_output_files([args.json], args.overwrite, [args.ckpt, args.config])
    compilation_cache.use(args.compilation_cache or "none")  # compile times are measured
    from tqdm import tqdm

    from uniql_jax.evaluation import benchmark_report
    from uniql_jax.evaluation.benchmark import benchmark, checkpoint_subject, config_subject
    from uniql_jax.evaluation.timing import environment
    from uniql_jax.runtime import hub

    rates = args.prune_rates or ([] if args.memory_budget else cli.prune_rates(RATES))
    if args.ckpt is not None:
        folder = hub.local(args.ckpt, args.revision)
        subject = checkpoint_subject(folder, rates, args.devices, args.memory_budget)
    else:
        subject = config_subject(args.config, args.bits or 4, args.seed, args.devices, args.groups == "portable")
    found = benchmark(
        subject,
        rates,
        [part for part in PARTS if getattr(args, part)] or PARTS,
        batch_size=args.batch_size,
        prompt_len=args.prompt_len,
        gen_len=args.gen_len,
        repeats=args.repeats,
        dense=args.dense,
        seed=args.seed,
        progress=console.progress,
        say=tqdm.write,  # prints above a progress bar, not into it
    )
    print(benchmark_report.report(found))
    if args.json:
        where = environment(["python", "-m", "uniql_jax.benchmark", *argv])
        where["compilation_cache"] = args.compilation_cache is not None  # compile times may then be those of a reading
        console.write_whole(args.json, json.dumps({"environment": where} | found, indent=1, allow_nan=False) + "\n")
