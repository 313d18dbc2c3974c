"""`report`: one HTML page about a checkpoint, and a model card for the hub."""

from __future__ import annotations

from pathlib import Path

from uniql_jax.commands import cli

EXAMPLES = """\
examples:
  what the checkpoint's own headers say (sizes, kept sizes of each layer, order of cuts, provenance):
    uniql report elastic

  with what was measured of it:
    uniql evaluate --ckpt elastic --text held-out.txt --prune-rates 0,0.15,0.25,0.35 --json quality.json
    uniql benchmark --ckpt elastic --prune-rates 0,0.15,0.25,0.35 --json speed.json
    uniql report elastic --quality quality.json --speed speed.json --base-model meta-llama/Llama-3.2-1B --overwrite

It writes DIR/report.html, one file that loads nothing from elsewhere, and DIR/README.md, the card that the hub shows:
base model, license (of the license file next to the weights), tags, and the table of rates.
"""


def parser() -> cli.Parser:
    """The arguments of the command."""
    parser = cli.parser(
        "report",
        "Write a page and a model card: rates against quality, size and speed, what each layer keeps, "
        "the order of cuts, provenance.",
        EXAMPLES,
    )
    add = parser.add_argument
    add("checkpoint", metavar="DIR", type=cli.named, help="elastic checkpoint, as uniql compress writes it")
    add("--quality", metavar="FILE.json", help="what uniql evaluate --json wrote")
    add("--speed", metavar="FILE.json", help="what uniql benchmark --json wrote")
    add("--out", metavar="FOLDER", type=cli.named, help="where to write (default: DIR)")
    add("--name", metavar="NAME", type=cli.named, help="of the model (default: the folder's name)")
    add("--base-model", metavar="ID", help="hub id of the original (default: the source, if it was one)")
    add("--license", metavar="ID", type=cli.named, help="hub identifier (default: found in DIR's license file)")
    add("--overwrite", action="store_true", help="replace report.html and README.md")
    return parser


def main(argv: list[str]) -> None:
    """Run the command; raises UserError."""
    args = parser().parse_args(argv)
    from uniql_jax.console import write_whole
    from uniql_jax.evaluation.report import Report
    from uniql_jax.outputs import check_output_files

    report = Report(args.checkpoint, args.quality, args.speed, args.name)
    folder = Path(args.out or args.checkpoint).expanduser()
    page, card = folder / "report.html", folder / "README.md"
    check_output_files([page, card], args.overwrite, [args.quality, args.speed])
    texts = [(page, report.html()), (card, report.card(args.base_model, args.license))]
    for path, text in texts:
        write_whole(path, text)
        print(path)
