"""`own-text`: let a model write calibration and training text itself."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from uniql_jax.commands import cli
from uniql_jax.errors import UserError
from uniql_jax.train.settings import SHAPES, OwnText

if TYPE_CHECKING:
    from uniql_jax.model.causal_lm import CausalLM

DEFAULTS = OwnText()

EXAMPLES = """\
examples:
  calibration and recovery without any text (`compress --recover own` alone does the second):
    python -m uniql_jax.own_text --ckpt path/to/model --out own.npy
    python -m uniql_jax.compress --ckpt path/to/model --out small --calib own.npy --recover own.npy --recover-distill 1

  in addition to text of the kind that the model will meet:
    python -m uniql_jax.compress --ckpt path/to/model --out small --calib notes/ own.npy --recover notes/ own.npy

FILE is int32 token ids [windows, length]. Windows begin with a token drawn from the whole vocabulary, with the
word that opens a question or an instruction, or where the chat template puts a user's words; all other tokens are drawn
as the model wants them at --temperature. The same --seed and --batch write the same windows again.
"""


def parser() -> cli.Parser:
    """The arguments of the command."""
    parser = cli.parser(
        "own-text",
        "Let a model write text of its own: calibration and training data where there is no other.",
        EXAMPLES,
    )
    add = parser.add_argument
    add("--ckpt", required=True, metavar="CKPT", help="folder, hub id, .gguf file, demo, or an elastic checkpoint")
    add("--out", required=True, metavar="FILE", help=".npy to create; until it is whole, FILE.partial")
    add("--windows", type=cli.positive_int, default=DEFAULTS.windows, metavar="N", help="texts to write")
    add("--length", type=cli.positive_int, default=DEFAULTS.length, metavar="N", help="tokens of each")
    add("--batch", type=cli.positive_int, default=DEFAULTS.batch, metavar="N", help="texts written at a time")
    add("--shapes", nargs="+", choices=SHAPES, default=list(DEFAULTS.shapes), metavar="SHAPE",
        help=f"how they begin, in turns: {', '.join(SHAPES)} (default: {', '.join(DEFAULTS.shapes)}, as far as the "
        "model has a tokenizer and a chat template)")  # fmt: skip
    add("--temperature", type=cli.bounded_float(0.01, 10), nargs="+", default=list(DEFAULTS.temperatures), metavar="X",
        help="below 1: what is likelier; several take turns")  # fmt: skip
    add("--seed", type=cli.natural_int, default=0, metavar="N", help="of what is drawn")
    add("--resume", action="store_true", help="go on with an unfinished run of the same settings")
    add("--overwrite", action="store_true", help="replace FILE once all is written")
    return parser


def main(argv: list[str]) -> None:
    """Run the command; raises UserError."""
    args = parser().parse_args(argv)
    out = Path(args.out).expanduser()
    if out.suffix.lower() != ".npy":
        raise UserError(f"{args.out} must end in .npy, by which calibration and training know token ids")
    if args.length < 2:
        raise UserError("--length must be at least 2 tokens")
    from uniql_jax.locking import hold_lock  # here, and below: `--help` and argument errors need no JAX
    from uniql_jax.outputs import check_output_files, check_space
    from uniql_jax.train.own_text import ROWS, open_model
    from uniql_jax.train.work import check_work_folder

    check_output_files([out], args.overwrite, [args.ckpt])
    folder = out.with_name(f"{out.name}.partial")
    check_work_folder(folder, args.resume)
    model = open_model(args.ckpt)
    limit = model.config.max_position
    if args.length > limit:
        raise UserError(f"--length must be at most {limit} tokens, the model's limit")
    fresh = not folder.exists()
    if fresh:
        check_space(out, 2 * 4 * args.windows * args.length)  # FILE, and what is kept on the way
    with hold_lock(folder):
        try:
            sample = _write(args, model, out, folder)
        except UserError:
            if fresh and not (folder / ROWS).exists():  # there is nothing to go on from
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
    command = f"python -m uniql_jax.compress --ckpt {args.ckpt} --out elastic --recover {args.out} --recover-distill 1"
    print(f"\n{sample}Next:\n  {command}")


def _write(args: argparse.Namespace, model: CausalLM, out: Path, folder: Path) -> str:
    """Write the windows, keeping what is done in `folder`; returns the beginning of one."""
    from uniql_jax import console
    from uniql_jax.model.decoding import cache_bytes
    from uniql_jax.train.own_text import npy_bytes, tokenizer_of, written

    tokenizer = tokenizer_of(args.ckpt, model)
    how = OwnText(
        args.windows, args.length, tuple(args.shapes), tuple(args.temperature), min(args.batch, args.windows), args.seed
    )
    cache = console.format_bytes(cache_bytes(model.config, model.keep, how.batch, args.length, model.dtype))
    print(
        f"model   {args.ckpt}: {model.config.model_type}, {len(model.config.pattern)} layers\n"
        f"text    {args.windows} windows of {args.length} tokens, {args.windows * args.length / 1e6:.3g} M, "
        f"{how.batch} at a time (cache {cache}), temperature {', '.join(f'{x:g}' for x in args.temperature)}\n"
        f"output  {out}; until it is whole, {folder.name}\n"
    )
    rows = written(model, tokenizer, how, folder, lambda batches: console.progress(batches, "write"))
    console.write_whole(out, npy_bytes(rows))
    return "" if tokenizer is None else f"  {tokenizer.decode(rows[0][:40])!r} ...\n\n"
