"""`inspect`: what an elastic checkpoint holds, without reading its weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from uniql_jax.commands import cli

EXAMPLES = """\
examples:
  sizes at every prune rate:
    uniql inspect elastic

  what each layer keeps at prune rate 0.25, and a picture of the plan:
    uniql inspect elastic --prune-rate 0.25 --plot plan.png

  which kernels run on this machine:
    uniql inspect --kernels

  for a program:
    uniql inspect elastic --json -
"""
WIDTH = 100  # of a line of provenance


def parser() -> cli.Parser:
    """The arguments of the command."""
    parser = cli.parser(
        "inspect",
        "What an elastic checkpoint holds: sizes, prune rates, kept sizes of each layer, provenance.",
        EXAMPLES,
    )
    parser.add_argument("checkpoint", metavar="DIR", nargs="?", help="elastic checkpoint, or its hub id (owner/name)")
    parser.add_argument(
        "--kernels", action="store_true", help="which kernels run on this machine, and why others do not; needs no DIR"
    )
    cli.add_revision(parser)
    parser.add_argument("--rates", type=cli.prune_rates, metavar="R,R,...", help="of the table (default: 0 to 0.35)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--prune-rate", type=cli.prune_rate, metavar="R", help="list what each layer keeps at this rate")
    size.add_argument(
        "--memory-budget", type=cli.memory_size, metavar="SIZE", help="list what each layer keeps at what fits it"
    )
    parser.add_argument("--context", type=cli.positive_int, default=4096, metavar="N", help="tokens whose state counts")
    parser.add_argument(
        "--json", metavar="FILE", help="write all of it as JSON; - is standard output, and nothing else"
    )
    parser.add_argument("--plot", metavar="FILE.png", help="draw kept fractions and size over the prune rate")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    return parser


def main(argv: list[str]) -> None:
    """Run the command; raises UserError."""
    found_parser = parser()
    args = found_parser.parse_args(argv)
    if args.kernels:
        if args.checkpoint is not None:
            found_parser.error("--kernels is about this machine: give no checkpoint")
        print(kernels())
        return
    if args.checkpoint is None:
        found_parser.error("give an elastic checkpoint, or --kernels")
    from uniql_jax import console  # here: `--help` and argument errors need none of this
    from uniql_jax.evaluation.describe import describe_checkpoint
    from uniql_jax.outputs import check_output_files
    from uniql_jax.runtime import hub

    files = [args.json if args.json != "-" else None, args.plot]
    check_output_files(files, args.overwrite, [args.checkpoint])
    if args.plot:
        from uniql_jax.evaluation.plot import require_matplotlib

        require_matplotlib()
    args.checkpoint = hub.local(args.checkpoint, args.revision)
    found = describe_checkpoint(
        args.checkpoint,
        rates=args.rates,
        prune_rate=args.prune_rate or 0.0,
        context=args.context,
        budget=args.memory_budget,
    )
    text = json.dumps(found, indent=1) + "\n"
    if args.json == "-":
        sys.stdout.write(text)
    else:
        print(report(found, with_layers=args.prune_rate is not None or args.memory_budget is not None))
        if args.json:
            console.write_whole(args.json, text)
    if args.plot:
        from uniql_jax.checkpoint import open_checkpoint
        from uniql_jax.evaluation.plan_plot import plan_map

        plan_map(open_checkpoint(args.checkpoint), args.plot)


def kernels() -> str:
    """Which kernels run on this machine, for people; each that can run is tried."""
    import warnings

    from uniql_jax import console
    from uniql_jax.pallas_kernels import dispatch, status

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all of it stands in the table
        rows = [[row.name, "yes" if row.runs else "no", row.reason] for row in status.rows()]
    lines = [
        status.device(),
        "",
        console.table([list(pair) for pair in status.defaults()], ["product or block", "runs by default"]),
        "",
        console.table(rows, ["kernel", "runs here", "why not"]),
    ]
    if named := dispatch.named():
        lines.insert(1, f"{dispatch.VARIABLE} asks for {named}")
    if dispatch.REFUSALS:
        refused = [list(refusal) for refusal in dispatch.REFUSALS]
        lines += ["", console.table(refused, ["refused in this process", "kernel", "why"])]
    return "\n".join(lines)


def report(found: Mapping[str, Any], with_layers: bool = False) -> str:
    """What `describe_checkpoint` found, for people."""
    from uniql_jax import console

    inside = found["runs"]
    groups = ", ".join(f"{axis} {size}{' in a head' * (axis in inside)}" for axis, size in found["groups"].items())
    lines = [
        f"{found['checkpoint']}: {found['family']}, {found['parameters'] / 1e6:,.1f} M parameters, "
        f"{found['prunable_parameters'] / 1e6:,.1f} M of them prunable",
        f"{found['bits']} bits{f' in groups of {groups}' if groups and found['bits'] < 16 else ''}, "
        f"format {found['format']}, {'sorted' if found['sorted'] else 'unsorted: prune rate 0 only'}",
        *(f"{key}: {_short(value)}" for key, value in (found["provenance"] or {}).items()),
        "",
        console.table(
            [
                [
                    f"{row['prune_rate']:g}",
                    f"{row['kept_fraction']:.3f}",
                    f"{row['parameters'] / 1e6:,.1f} M",
                    console.format_bytes(row["weight_bytes"]),
                    console.format_bytes(row["state_bytes"]),
                ]
                for row in found["rates"]
            ],
            ["prune rate", "kept", "parameters", "weights", f"state after {found['context']} tokens"],
        ),
    ]
    if nested := found["nested"]:
        lines += [
            "",
            f"nested bits: the leading {nested['leading_bits']} are a model of their own; budgets from "
            f"{console.format_bytes(nested['most_bytes'])} to {console.format_bytes(nested['least_bytes'])} in "
            f"{nested['steps']} steps",
        ]
    if with_layers:
        title = f"kept sizes at {found['size'] or 'prune rate ' + format(found['prune_rate'], 'g')}"
        lines += ["", f"{title}:", _layer_table(found["layers"])]
    return "\n".join(lines)


def _layer_table(layers: list[dict[str, Any]]) -> str:
    from uniql_jax import console

    axes = list(dict.fromkeys(axis for layer in layers for axis in layer["kept"]))
    rows = [
        [
            layer["layer"],
            "+".join(layer["blocks"]),
            *(_cell(layer, axis) if axis in layer["kept"] else None for axis in axes),
            console.format_bytes(layer["weight_bytes"]),
        ]
        for layer in layers
    ]
    return console.table(rows, ["layer", "blocks", *axes, "weights"])


def _cell(layer: dict[str, Any], axis: str) -> str:
    """Entries kept of all, and how many of them have all bits, where that is not all of them."""
    kept, full = layer["kept"][axis], layer.get("all_bits", layer["kept"])[axis]
    return f"{kept}/{layer['full'][axis]}" + (f" ({full} at 4 bits)" if full < kept else "")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."
