"""`export`: an elastic checkpoint at one prune rate as a dense Hugging Face folder."""

from __future__ import annotations

from uniql_jax.commands import cli

DTYPES = ("bfloat16", "float16", "float32")


def parser() -> cli.Parser:
    """The arguments of the command."""
    parser = cli.Parser(
        prog=cli.program("export"),
        description="Write an elastic checkpoint at one prune rate as a dense Hugging Face folder.",
    )
    parser.add_argument("checkpoint", metavar="DIR", help="elastic checkpoint, as uniql_jax.compress writes it")
    parser.add_argument("out", metavar="OUT", help="folder to create")
    parser.add_argument("--prune-rate", type=cli.prune_rate, default=0.0, metavar="R", help="0 to 0.35")
    parser.add_argument("--dtype", choices=DTYPES, help="number format (default: the original model's)")
    parser.add_argument("--max-shard-size", type=cli.memory_size, default="5GB", metavar="SIZE", help="of one file")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is a model folder")
    return parser


def main(argv: list[str]) -> None:
    """Run the command; raises UserError."""
    args = parser().parse_args(argv)
    from uniql_jax import console  # here: `--help` and argument errors need none of this
    from uniql_jax.convert.to_hf import export

    export(
        args.checkpoint,
        args.out,
        args.prune_rate,
        dtype=args.dtype,
        max_shard_bytes=args.max_shard_size,
        overwrite=args.overwrite,
        say=lambda text: print(text, flush=True),
        progress=console.progress,
    )
