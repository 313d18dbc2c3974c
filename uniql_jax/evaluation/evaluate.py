"""Perplexity and zero-shot tasks of an elastic checkpoint at each prune rate, beside its size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from uniql_jax import console, data
from uniql_jax.errors import UserError
from uniql_jax.evaluation import plot, tasks
from uniql_jax.evaluation.likelihood import BROKEN, rows_at_once, token_nll
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.tokenizer import load_tokenizer

PERPLEXITY = "perplexity"
Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]


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
    rows = rows_at_once(model.config.vocab_size, batch_size * (length - 1))
    starts: Iterable[int] = range(0, count, batch_size)
    if progress is not None:
        starts = progress(starts, desc, -(-count // batch_size))
    total = 0.0
    for start in starts:
        batch = windows[start : start + batch_size]
        # the last batch is filled up, so that one shape is compiled
        full = np.pad(batch, ((0, batch_size - len(batch)), (0, 0)))
        total += float(np.asarray(token_nll(model, jnp.asarray(full), rows)[0], np.float64)[: len(batch)].sum())
    mean = total / (count * (length - 1))
    if not math.isfinite(mean) or mean > 700:
        raise UserError(BROKEN)
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
    zero_shot: Sequence[str] = (),
    limit: int | None = None,
    progress: Progress | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> list[dict[str, Any]]:
    """Perplexity on every text at every rate: rows {"prune_rate", "source", "metric", "value", "weight_bytes",
    "kept_fraction"}; `baseline`, the original CKPT, gives rows with prune_rate None, measured on the same windows.

    zero_shot: tasks that lm-eval knows, or .yaml files of tasks; their rows have metrics such as "acc" and "acc_norm",
    and "stderr" as well. limit: so many questions of each at most.
    weight_bytes: all tensors as stored (the original's at its own dtype). kept_fraction: of the prunable parameters.
    """
    from uniql_jax.checkpoint import open_checkpoint
    from uniql_jax.runtime.loading import load, load_source

    checkpoint = open_checkpoint(ckpt)
    config, plan = checkpoint.config, checkpoint.plan
    # asked first: a rate that cannot be served is refused before long work
    sizes = {float(rate): checkpoint.weight_bytes(float(rate)) for rate in prune_rates}
    window = min(window, config.max_position)
    names, manager = tasks.named(zero_shot) if zero_shot else ([], None)
    tokenizer = load_tokenizer(ckpt)
    if names and tokenizer is None:
        raise UserError(f"{ckpt} has no tokenizer, which tasks need")
    vocabulary = config.vocab_size
    sources = {
        text: data.evaluation_windows([text], tokenizer, window, max_tokens, vocab_size=vocabulary) for text in texts
    }
    for found in sources.values():
        say(found.description)

    def measure(model: CausalLM, rate: float | None, weight_bytes: int, kept: float, name: str) -> list[dict[str, Any]]:
        if model.config.vocab_size != vocabulary:
            raise UserError(f"the original has {model.config.vocab_size} tokens, the checkpoint {vocabulary}")
        found = [
            {
                "source": text,
                "metric": PERPLEXITY,
                "value": perplexity(model, windows.tokens, batch_size, progress, f"{name}, {text}"),
            }
            for text, windows in sources.items()
        ]
        if names:
            found += tasks.measure(
                model, tokenizer, names, manager, window=window, batch_tokens=batch_size * window, limit=limit,
                progress=progress, desc=f"{name}, tasks",
            )  # fmt: skip
        return [{"prune_rate": rate, **one, "weight_bytes": weight_bytes, "kept_fraction": kept} for one in found]

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
    """The rows as tables for people: perplexity with ratios to the original's (or rate 0's), then tasks by metric."""
    text = [row for row in rows if row["metric"] == PERPLEXITY and "stderr" not in row]
    asked = [row for row in rows if "stderr" in row]
    return "\n\n".join([*([_perplexities(text)] if text else []), *_answers(asked)])


def _name(rate: float | None) -> str:
    return "original" if rate is None else f"{rate:g}"


def _answers(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table of each metric: a line for each rate, a column for each task, and their mean."""
    tables = []
    for metric in dict.fromkeys(row["metric"] for row in rows):
        some = [row for row in rows if row["metric"] == metric]
        names = list(dict.fromkeys(row["source"] for row in some))
        lines = []
        for rate in dict.fromkeys(row["prune_rate"] for row in some):
            at = [row for row in some if row["prune_rate"] == rate]
            kept, size = f"{at[0]['kept_fraction']:.3f}", console.format_bytes(at[0]["weight_bytes"])
            values = [row["value"] for row in at]
            if len(names) > 1:
                values.append(sum(values) / len(values))
            lines.append([_name(rate), kept, size, *(f"{value:.4f}" for value in values)])
        header = ["rate", "kept", "weights", *names, *(["mean"] if len(names) > 1 else [])]
        tables.append(f"{metric}\n{console.table(lines, header)}")
    return tables


def _perplexities(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    several = len({row["source"] for row in rows}) > 1
    for row in rows:
        found = plot.reference(rows, row["source"])
        name = _name(row["prune_rate"])
        size = console.format_bytes(row["weight_bytes"])
        ratio = f"{row['value'] / found[0]:.3f}" if found else None
        lines.append([name, f"{row['kept_fraction']:.3f}", size, f"{row['value']:.2f}", ratio])
        if several:
            lines[-1].append(row["source"])
    found = plot.reference(rows, rows[0]["source"])
    header = ["rate", "kept", "weights", "perplexity", f"/ {found[1]}" if found else "ratio"]
    return console.table(lines, header + (["text"] if several else []))
