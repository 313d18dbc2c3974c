"""What `evaluate` prints at its end: tables of perplexity and of task results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from uniql_jax import console
from uniql_jax.evaluation import plot
from uniql_jax.evaluation.evaluate import PERPLEXITY


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as tables for people: perplexity with ratios to the original's (or rate 0's), then tasks by metric."""
    text = [row for row in rows if row["metric"] == PERPLEXITY and "stderr" not in row]
    asked = [row for row in rows if "stderr" in row]
    return "\n\n".join([*([_perplexities(text)] if text else []), *_answers(asked), *_pairs(asked)])


def _name(row: dict[str, Any]) -> str:
    """What a row measures: a rate, a budget, or the original."""
    if "memory_budget" in row:
        return console.format_bytes(row["memory_budget"])
    return "original" if row["prune_rate"] is None else f"{row['prune_rate']:g}"


def _answers(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table of each metric: a line for each rate, a column for each task, and their mean."""
    tables = []
    for metric in dict.fromkeys(row["metric"] for row in rows):
        some = [row for row in rows if row["metric"] == metric]
        names = list(dict.fromkeys(row["source"] for row in some))
        lines = []
        for name in dict.fromkeys(map(_name, some)):
            at = [row for row in some if _name(row) == name]
            kept, size = f"{at[0]['kept_fraction']:.3f}", console.format_bytes(at[0]["weight_bytes"])
            cells = [_value(row) for row in at]
            if len(names) > 1:
                cells.append(f"{sum(row['value'] for row in at) / len(at):.4f}")
            lines.append([name, kept, size, *cells])
        header = ["rate", "kept", "weights", *names, *(["mean"] if len(names) > 1 else [])]
        tables.append(f"{metric}\n{console.table(lines, header)}")
    return tables


def _value(row: dict[str, Any]) -> str:
    spread = f" ± {row['stderr']:.4f}" if row["stderr"] is not None else ""
    return f"{row['value']:.4f}{spread}"


def _pairs(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each rate, task and metric that was compared with the original."""
    lines = []
    for row in rows:
        if pair := row.get("paired"):
            spread = f"{pair['low']:+.4f} .. {pair['high']:+.4f}" if "low" in pair else None
            counts = [str(pair["better"]), str(pair["worse"]), f"{pair['p_value']:.3g}"]
            first = [_name(row), row["source"], row["metric"], str(row["items"])]
            lines.append([*first, f"{pair['difference']:+.4f}", spread, *counts])
    header = ["rate", "task", "metric", "items", "difference", "95 % interval", "better", "worse", "p (exact)"]
    return [f"difference from the original, item by item\n{console.table(lines, header)}"] if lines else []


def _perplexities(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    several = len({row["source"] for row in rows}) > 1
    for row in rows:
        found = plot.reference(rows, row["source"])
        name = _name(row)
        size = console.format_bytes(row["weight_bytes"])
        ratio = f"{row['value'] / found[0]:.3f}" if found else None
        lines.append([name, f"{row['kept_fraction']:.3f}", size, f"{row['value']:.2f}", ratio])
        if several:
            lines[-1].append(row["source"])
    found = plot.reference(rows, rows[0]["source"])
    header = ["rate", "kept", "weights", "perplexity", f"/ {found[1]}" if found else "ratio"]
    return console.table(lines, header + (["text"] if several else []))
