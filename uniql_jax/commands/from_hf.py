"""`python -m convert.from_hf`: a foreign checkpoint in our format, neither sorted nor quantized."""

from __future__ import annotations

from uniql_jax.commands import cli

DEQUANTIZE = "take a model of packed integers (GPTQ, AWQ, compressed-tensors), though rounding cost it something"


def parser() -> cli.Parser:
    """The arguments of the command."""
    parser = cli.Parser(prog="python -m convert.from_hf", description=__doc__)
    parser.add_argument("checkpoint", metavar="CKPT", help="model folder, .gguf file, hub id, or the word demo")
    parser.add_argument("--dequantize-source", action="store_true", help=DEQUANTIZE)
    parser.add_argument("out", metavar="DIR", help="folder to create")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it is a model folder")
    return parser


def main(argv: list[str]) -> None:
    """Run the command; raises UserError."""
    args = parser().parse_args(argv)
    from uniql_jax import console  # here: `--help` and argument errors need none of this
    from uniql_jax.convert.from_hf import convert

    convert(
        args.checkpoint,
        args.out,
        args.overwrite,
        dequantize_source=args.dequantize_source,
        say=lambda text: print(text, flush=True),
        progress=console.progress,
    )
