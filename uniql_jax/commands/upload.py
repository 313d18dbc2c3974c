"""`upload`: an elastic checkpoint to the hub, with a card."""

from __future__ import annotations

from uniql_jax.commands import cli

EXAMPLES = """examples:
  {prog} elastic me/my-model-elastic --dry-run
  {prog} elastic me/my-model-elastic --public
  then, anywhere: uniql generate --ckpt me/my-model-elastic --prune-rate 0.25 --prompt "Once"
"""


def parser() -> cli.Parser:
    """The arguments of the command."""
    parser = cli.parser(
        "upload",
        "Upload an elastic checkpoint to the hub. The repository is made if there is none, private unless\n"
        "--public. DIR/README.md is its card; without one, a card with sizes and metadata is written.",
        EXAMPLES,
    )
    parser.add_argument("checkpoint", metavar="DIR", help="elastic checkpoint, as uniql compress writes it")
    parser.add_argument("repo", metavar="OWNER/NAME", help="repository on the hub")
    parser.add_argument("--public", action="store_true", help="make a new repository public (one that exists stays)")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to upload to (default: main)")
    parser.add_argument("--message", metavar="TEXT", default="Upload elastic checkpoint", help="of the commit")
    parser.add_argument("--base-model", metavar="ID", help="hub id of the original, for the card")
    parser.add_argument("--license", metavar="ID", help="license id of the hub, for the card")
    parser.add_argument("--dry-run", action="store_true", help="say what would be uploaded, print the card, and end")
    return parser


def main(argv: list[str]) -> None:
    """Run the command; raises UserError."""
    args = parser().parse_args(argv)
    from uniql_jax.runtime.upload import upload

    address = upload(
        args.checkpoint,
        args.repo,
        public=args.public,
        revision=args.revision,
        message=args.message,
        base_model=args.base_model,
        license=args.license,
        dry_run=args.dry_run,
        say=lambda text: print(text, flush=True),
    )
    if address is not None:
        print(address)
