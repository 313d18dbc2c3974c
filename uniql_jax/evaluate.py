"""Door: perplexity of an elastic checkpoint at each prune rate, beside its size and the original's.

python -m uniql_jax.evaluate --ckpt DIR --prune-rates 0,0.15,0.25,0.35 --text FILE ... [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from uniql_jax import cli, data, plot
from uniql_jax.errors import UserError
from uniql_jax.model import CausalLM, hidden_states, logits

LOGITS = 2**25  # logits held at a time: 128 MB in float32, about three times that while they are reduced
Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]


@functools.partial(jax.jit, static_argnames="rows")
def _window_nll(model: CausalLM, tokens: Int[Array, "b t"], rows: int) -> Float[Array, " b"]:
    """Sum of -log p(token | tokens before it in its window) per window, in float32, `rows` positions at a time."""
    hidden = hidden_states(model, tokens)[:, :-1]
    batch, length, width = hidden.shape
    count = batch * length
    spare = -count % rows
    hidden = jnp.pad(hidden.reshape(count, width), ((0, spare), (0, 0)))
    targets = jnp.pad(tokens[:, 1:].reshape(count), (0, spare))

    def part(chunk: tuple[Array, Array]) -> Array:
        x, target = chunk
        scores = logits(model, x)
        return jax.nn.logsumexp(scores, axis=-1) - jnp.take_along_axis(scores, target[:, None], axis=-1)[:, 0]

    nll = jax.lax.map(part, (hidden.reshape(-1, rows, width), targets.reshape(-1, rows)))
    return nll.reshape(-1)[:count].reshape(batch, length).sum(axis=1)


def perplexity(
    model: CausalLM,
    windows: Int[np.ndarray, "count length"],
    batch_size: int = 4,
    progress: Progress | None = None,
    desc: str = "perplexity",
) -> float:
    """exp of the mean negative log likelihood per predicted token (nats); a window's first token is not predicted.

    windows: int32 token ids without padding, of at least two tokens each. Memory for logits stays bounded whatever the
    window and the vocabulary. Raises UserError when the model's output is not finite.
    """
    windows = np.asarray(windows, np.int32)
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise UserError(f"windows must be [count, at least 2 tokens], not {list(windows.shape)}")
    count, length = windows.shape
    batch_size = min(batch_size, count)
    rows = max(1, min(batch_size * (length - 1), LOGITS // model.config.vocab_size))
    starts: Iterable[int] = range(0, count, batch_size)
    if progress is not None:
        starts = progress(starts, desc, -(-count // batch_size))
    total = 0.0
    for start in starts:
        batch = windows[start : start + batch_size]
        # the last batch is filled up, so that one shape is compiled
        full = np.pad(batch, ((0, batch_size - len(batch)), (0, 0)))
        total += float(np.asarray(_window_nll(model, full, rows), np.float64)[: len(batch)].sum())
    mean = total / (count * (length - 1))
    if not math.isfinite(mean) or mean > 700:
        raise UserError("the model's output is not finite; the checkpoint may be damaged")
    return math.exp(mean)


def evaluate(
    ckpt: str,
    prune_rates: Sequence[float | int],
    texts: Sequence[str],
    *,
    window: int = 1024,
    max_tokens: int | None = None,
    batch_size: int = 4,
    baseline: str | None = None,
    progress: Progress | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> list[dict[str, Any]]:
    """Perplexity on every text at every rate: rows {"prune_rate", "source", "metric", "value", "weight_bytes",
    "kept_fraction"}; `baseline`, the original CKPT, gives rows with prune_rate None, measured on the same windows.

    weight_bytes: all tensors as stored (the original's at its own dtype). kept_fraction: of the prunable parameters.
    """
    from uniql_jax.checkpoint import open_checkpoint
    from uniql_jax.loading import load, load_source

    checkpoint = open_checkpoint(ckpt)
    config, plan = checkpoint.config, checkpoint.plan
    # asked first: a rate that cannot be served is refused before long work
    sizes = {float(rate): checkpoint.weight_bytes(float(rate)) for rate in prune_rates}
    window = min(window, config.max_position)
    tokenizer = data.load_tokenizer(ckpt)
    vocabulary = config.vocab_size
    sources = {
        text: data.evaluation_windows([text], tokenizer, window, max_tokens, vocab_size=vocabulary) for text in texts
    }
    for found in sources.values():
        say(found.description)

    def measure(model: CausalLM, rate: float | None, weight_bytes: int, kept: float, name: str) -> list[dict[str, Any]]:
        if model.config.vocab_size != vocabulary:
            raise UserError(f"the original has {model.config.vocab_size} tokens, the checkpoint {vocabulary}")
        return [
            {
                "prune_rate": rate,
                "source": text,
                "metric": "perplexity",
                "value": perplexity(model, found.tokens, batch_size, progress, f"{name}, {text}"),
                "weight_bytes": weight_bytes,
                "kept_fraction": kept,
            }
            for text, found in sources.items()
        ]

    rows = []
    if baseline is not None:
        model = load_source(baseline)
        stored = sum(leaf.size for leaf in jax.tree.leaves(model.params)) * jnp.dtype(model.config.dtype).itemsize
        rows += measure(model, None, stored, 1.0, "original")
    for rate, stored in sizes.items():
        model = load(ckpt, rate)
        rows += measure(model, rate, stored, plan.kept_fraction(rate) if plan else 1.0, f"rate {rate:g}")
    return rows


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table for people, with ratios to the original's perplexity (or rate 0's)."""
    lines = []
    several = len({row["source"] for row in rows}) > 1
    for row in rows:
        found = plot.reference(rows, row["source"])
        name = "original" if row["prune_rate"] is None else f"{row['prune_rate']:g}"
        size = cli.format_bytes(row["weight_bytes"])
        ratio = f"{row['value'] / found[0]:.3f}" if found else None
        lines.append([name, f"{row['kept_fraction']:.3f}", size, f"{row['value']:.2f}", ratio])
        if several:
            lines[-1].append(row["source"])
    found = plot.reference(rows, rows[0]["source"])
    header = ["rate", "kept", "weights", "perplexity", f"/ {found[1]}" if found else "ratio"]
    return cli.table(lines, header + (["text"] if several else []))


def parser() -> cli.Parser:
    """The door's arguments."""
    parser = cli.Parser(
        prog="python -m uniql_jax.evaluate",
        description="Perplexity of an elastic checkpoint at each prune rate, beside its size and the original's.",
    )
    parser.add_argument("--ckpt", required=True, metavar="DIR", help="elastic checkpoint made by uniql_jax.compress")
    parser.add_argument(
        "--prune-rates", type=cli.prune_rates, default="0,0.15,0.25,0.35", metavar="R,R,...", help="rates to measure"
    )
    parser.add_argument(
        "--text",
        nargs="+",
        metavar="TEXT",
        help="held-out text, each measured by itself: a file, a folder, .jsonl, a datasets name, sotu:from-1981, "
        "docs:NAME, or a .npy of int32 token ids [samples, length]",
    )
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="zero-shot tasks (not available yet)")
    parser.add_argument("--baseline", metavar="CKPT", help="the original model, measured beside: folder, .gguf, demo")
    parser.add_argument("--window", type=cli.positive_int, default=1024, metavar="N", help="tokens a window")
    parser.add_argument("--max-tokens", type=cli.positive_int, metavar="N", help="at most so many tokens of each text")
    parser.add_argument("--batch-size", type=cli.positive_int, default=4, metavar="N", help="windows at a time")
    parser.add_argument("--json", metavar="FILE", help="write the rows here")
    parser.add_argument("--plot", metavar="FILE", help="write a PNG of quality and size over the rate here")
    parser.add_argument("--overwrite", action="store_true", help="replace --json and --plot files that exist")
    return parser


def main(argv: list[str]) -> None:
    """Run the door; raises UserError."""
    args = parser().parse_args(argv)
    if args.tasks:
        raise UserError("--tasks is not available yet: zero-shot tasks need the eval extra; use --text")
    if not args.text:
        raise UserError("name held-out text with --text (see --help)")
    if args.window < 2:
        raise UserError("--window must be at least 2: a window's first token is not predicted")
    for path in (args.json, args.plot):
        cli.check_output_file(path, args.overwrite)
    if args.plot:
        plot.require_matplotlib()
    rows = evaluate(
        args.ckpt,
        args.prune_rates,
        args.text,
        window=args.window,
        max_tokens=args.max_tokens,
        batch_size=args.batch_size,
        baseline=args.baseline,
        progress=cli.progress,
        say=print,
    )
    print(report(rows))
    if args.json:
        cli.write_whole(args.json, json.dumps(rows, indent=1, allow_nan=False) + "\n")
    if args.plot:
        plot.rate_curve(rows, args.plot)


if __name__ == "__main__":
    cli.run(main)
