"""`export`: an elastic checkpoint at one prune rate in the format of another runtime."""

from __future__ import annotations

from uniql_jax.commands import cli

DTYPES = ("bfloat16", "float16", "float32")
FORMATS = {
    "transformers": "a dense Hugging Face folder, of every family; what was cut is zeros",
    "compressed-tensors": "a Hugging Face folder in 4 bits (pack-quantized), which transformers loads",
    "mlx": "a folder in 4 bits (affine) for mlx-lm",
    "gguf": "one file in 4 bits for llama.cpp; a smaller one at a higher rate",
}
EXAMPLES = """examples:
  {prog} elastic dense --prune-rate 0.25
  {prog} elastic model.gguf --prune-rate 0.25 --format gguf
  {prog} elastic packed --format compressed-tensors"""


def parser() -> cli.Parser:
    """The arguments of the command."""
    formats = "\n".join(f"  {name:<19}{what}" for name, what in FORMATS.items())
    parser = cli.parser(
        "export", f"Write an elastic checkpoint at one prune rate for another runtime.\n\nformats:\n{formats}", EXAMPLES
    )
    parser.add_argument("checkpoint", metavar="DIR", help="elastic checkpoint, or its hub id (owner/name)")
    cli.add_revision(parser)
    parser.add_argument("out", metavar="OUT", help="folder to create; for gguf also a file NAME.gguf")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--prune-rate", type=cli.prune_rate, default=0.0, metavar="R", help="0 to 0.35")
    size.add_argument(
        "--memory-budget", type=cli.memory_size, metavar="SIZE",
        help="the largest size whose weights in the checkpoint fit: by least pruning, or by the plan of nested bits",
    )  # fmt: skip
    parser.add_argument("--format", choices=FORMATS, default="transformers", metavar="F", help=", ".join(FORMATS))
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="number format of dense matrices (default: the original's; for gguf: none, they stay packed)",
    )
    parser.add_argument(
        "--dense-head",
        action="store_true",
        help="gguf: a float16 head for a model that was tied, instead of one more layer before a shared table",
    )
    parser.add_argument(
        "--dense-embedding",
        action="store_true",
        help="compressed-tensors: a bfloat16 embedding, for runtimes that take no quantized one (vLLM, SGLang)",
    )
    parser.add_argument("--max-shard-size", type=cli.memory_size, default="5GB", metavar="SIZE", help="of one file")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is a model folder or a .gguf file")
    return parser


def main(argv: list[str]) -> None:
    """Run the command; raises UserError."""
    args = parser().parse_args(argv)
    from uniql_jax import console  # here: `--help` and argument errors need none of this
    from uniql_jax.checkpoint import open_checkpoint
    from uniql_jax.convert.exporting import Request
    from uniql_jax.convert.formats import export_as
    from uniql_jax.runtime import hub
    from uniql_jax.runtime.choice import choose
    from uniql_jax.tokenizer import load_tokenizer

    folder = hub.local(args.checkpoint, args.revision)
    rate, setting = args.prune_rate, None
    if args.memory_budget is not None:
        chosen = choose(open_checkpoint(folder), args.memory_budget)
        rate, setting = chosen.rate, chosen.setting
    if folder != args.checkpoint:
        hub.complete(open_checkpoint(folder), rate, setting)
    export_as(
        args.format,
        Request(
            folder,
            args.out,
            rate,
            setting=setting,
            dtype=args.dtype,
            max_shard_bytes=args.max_shard_size,
            overwrite=args.overwrite,
            dense_head=args.dense_head,
            dense_embedding=args.dense_embedding,
            load_tokenizer=load_tokenizer,
            say=lambda text: print(text, flush=True),
            progress=console.progress,
        ),
    )
