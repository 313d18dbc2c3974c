"""`generate`: continue a prompt with an elastic checkpoint, at a prune rate or within a memory budget."""

from __future__ import annotations

import sys

from uniql_jax import console
from uniql_jax.commands import cli, compilation_cache, serving
from uniql_jax.errors import UserError

MAX_NEW_TOKENS = 64


def parser() -> cli.Parser:
    """The arguments of the command."""
    parser = cli.parser("generate", "Continue a prompt with an elastic checkpoint; text appears as it is made.")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    serving.add_options(parser, MAX_NEW_TOKENS)
    cli.add_devices(parser)
    return parser


def main(argv: list[str]) -> None:
    """Run the command; raises UserError."""
    args = parser().parse_args(argv)
    compilation_cache.use(args.compilation_cache)
    import numpy as np

    from uniql_jax.checkpoint import open_checkpoint
    from uniql_jax.runtime import hub
    from uniql_jax.runtime.generation import generate
    from uniql_jax.runtime.loading import load_size
    from uniql_jax.runtime.prompts import check_prompt
    from uniql_jax.runtime.text import Folder, folder_tokenizer, prompt_ids
    from uniql_jax.weights.split import device_mesh

    settings = serving.sampling(args)
    device_mesh(args.devices)
    args.ckpt = hub.local(args.ckpt, args.revision)
    checkpoint = open_checkpoint(args.ckpt)
    size = serving.choose_size(checkpoint, args)
    tokenizer = folder_tokenizer(Folder(args.ckpt))
    if tokenizer is None:
        raise UserError("this checkpoint has no tokenizer, which a prompt needs")
    ids = prompt_ids(tokenizer, args.prompt, args.chat)[None]
    check_prompt(checkpoint.config, ids, np.ones(ids.shape, np.int32), args.max_new_tokens)
    cache = console.format_bytes(serving.cache_size(checkpoint, size, ids.size, args.max_new_tokens, args.cache_bits))
    plan = (
        f"{serving.describe(args.ckpt, checkpoint, size.rate, size, args.devices)}; "
        f"cache {cache} for {ids.size} + {args.max_new_tokens} tokens"
    )
    print(plan, file=sys.stderr)
    model = load_size(checkpoint, size, devices=args.devices)
    pieces = generate(model, args.prompt, chat=args.chat, tokenizer=tokenizer, cache_bits=args.cache_bits, **settings)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
