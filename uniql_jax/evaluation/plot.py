"""The curve that a user chooses a rate by: quality and size over the prune rate."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uniql_jax import console
from uniql_jax.errors import UserError

COLORS = ("#1f5fa8", "#d1622b", "#2b8a4b", "#8a3fa0", "#6b6b6b")


def require_matplotlib() -> None:
    """Raises UserError when the plotting library is missing; asked before long work, not after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("plots need matplotlib: pip install 'uniql-jax[plot]'")


def reference(rows: Sequence[Mapping[str, Any]], source: str) -> tuple[float, str] | None:
    """What ratios are taken against: the original's value where it was measured, else rate 0's; None if neither was."""
    for rate, name in ((None, "the original"), (0.0, "rate 0")):
        for row in rows:
            if row["source"] == source and row["prune_rate"] == rate and "memory_budget" not in row:
                return float(row["value"]), name
    return None


def rate_curve(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw the rows of `evaluate` as a PNG: perplexity above, weight bytes below, over the same prune rates.

    rows: {"prune_rate", "source", "value", "weight_bytes"}; a prune_rate of None is the original model. Perplexity is
    drawn over the original's (or rate 0's) where that is known for every source. Raises UserError without matplotlib.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    sources = list(dict.fromkeys(row["source"] for row in rows))
    references = {source: reference(rows, source) for source in sources}
    known = [found for found in references.values() if found]
    ratio = len(known) == len(sources)
    figure = Figure(figsize=(6.4, 6.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    quality, size = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for i, source in enumerate(sources):
        points = sorted(
            (row["prune_rate"], row["value"])
            for row in rows
            if row["source"] == source and row["prune_rate"] is not None
        )
        found = references[source]
        base = found[0] if ratio and found else 1.0
        color = COLORS[i % len(COLORS)]
        quality.plot([x for x, _ in points], [y / base for _, y in points], "o-", color=color, label=source)
    if ratio:
        quality.axhline(1.0, color="#999999", linewidth=1, linestyle="--")
    quality.set_ylabel(f"perplexity / that of {known[0][1]}" if ratio else "perplexity")
    quality.legend(frameon=False, loc="upper left")
    quality.set_title("Quality and size at every prune rate", loc="left")

    sizes = sorted({(row["prune_rate"], row["weight_bytes"] / 1e6) for row in rows if row["prune_rate"] is not None})
    size.plot([x for x, _ in sizes], [y for _, y in sizes], "s-", color=COLORS[0])
    for x, y in sizes:
        size.annotate(f"{y:.3g}", (x, y), textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8)
    original = next((row for row in rows if row["prune_rate"] is None), None)
    if original:
        size.plot([], [], " ", label=f"the original: {original['weight_bytes'] / 1e6:.4g} MB")
        size.legend(frameon=False, loc="upper right")
    size.set_ylim(0, 1.25 * max(y for _, y in sizes))
    size.set_ylabel("weights, MB")
    size.set_xlabel("prune rate (part of the prunable parameters left out)")
    size.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for axes in (quality, size):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    console.write_whole(path, image.getvalue())
