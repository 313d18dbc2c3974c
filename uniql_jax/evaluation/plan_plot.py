"""A picture of a checkpoint's plan: what every layer keeps along every axis, and the size, over the prune rate."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from uniql_jax import console
from uniql_jax.checkpoint import Checkpoint
from uniql_jax.evaluation.plot import require_matplotlib
from uniql_jax.plan import MAX_PRUNE_RATE

STEPS = 36  # rates from 0 to the largest, 0.01 apart


def plan_map(checkpoint: Checkpoint, path: str | Path) -> None:
    """Draw a heat map of the kept fraction per axis and layer over the prune rate, and the size curve above, as a PNG.

    Args:
        checkpoint: an opened checkpoint; an unsorted one has the column of rate 0 only.
        path: file to write; what stands there is replaced.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state
    from matplotlib.figure import Figure

    rates = np.linspace(0, MAX_PRUNE_RATE, STEPS).round(4).tolist() if checkpoint.plan is not None else [0.0]
    full = checkpoint.keep(0.0)
    kept = [checkpoint.keep(rate) for rate in rates]
    places = [(axis, i) for axis in sorted({a for layer in full for a in layer}) for i in range(len(full))]
    places = [(axis, i) for axis, i in places if axis in full[i]]
    fractions = np.asarray([[sizes[i][axis] / full[i][axis] for sizes in kept] for axis, i in places])

    figure = Figure(figsize=(7, min(40.0, 3.5 + 0.16 * len(places))), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, height_ratios=[1, max(1.0, len(places) / 14)])
    above.plot(rates, [checkpoint.weight_bytes(rate) / 1e6 for rate in rates], marker="." if len(rates) < 2 else "")
    above.set_ylabel("weights, MB")
    above.set_ylim(bottom=0)
    above.grid(alpha=0.3)
    above.set_title(f"{checkpoint.folder.name}: {checkpoint.config.model_type}, {checkpoint.bits} bits")
    half = MAX_PRUNE_RATE / (STEPS - 1) / 2
    extent = (rates[0] - half, rates[-1] + half, len(places) - 0.5, -0.5)
    image = below.imshow(fractions, aspect="auto", vmin=0, vmax=1, extent=extent, interpolation="nearest")
    above.set_xlim(*extent[:2])
    below.set_yticks(range(len(places)), [f"{axis} {i}" for axis, i in places], fontsize=6)
    below.set_xlabel("prune rate")
    below.set_ylabel("axis and layer")
    figure.colorbar(image, ax=below, label="kept fraction")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    console.write_whole(path, buffer.getvalue())
